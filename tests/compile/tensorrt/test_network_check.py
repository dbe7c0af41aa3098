"""A decoder's networks on the CPU against transformers, whole and split over processes."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tensorrt_rtx as trt
import torch
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from headrace.compile.checkpoint import open_checkpoint
from headrace.compile.families.registry import describe
from headrace.compile.host import fingerprint
from headrace.compile.reference import reference_logits
from headrace.compile.tensorrt.network_check import MakeNetwork, NetworkEngine, verify_network
from headrace.compile.tensors import Array
from headrace.compile.verify import step_through
from headrace.serving.domain.artifact import (
    Decoder,
    Precision,
    Sharding,
    Verification,
    VerifyMethod,
)
from headrace.serving.engine.base import Row
from headrace.serving.errors import OutsideTolerance

PROMPTS = [list(b"The wheel turned all night"), list(b"in August it hung still"), list(b"rain")]


class Case:
    """A small random model whose weights bf16 holds exactly, so that only the network can err."""

    def __init__(self, folder: Path, functions: ModuleType) -> None:
        self.decoder: Decoder = describe(open_checkpoint(folder)).decoder
        self.references: list[Array] = list(reference_logits(open_checkpoint(folder), PROMPTS))
        self._folder, self._functions = folder, functions

    def make(self, sharding: Sharding) -> MakeNetwork:
        return partial(self._functions.decoder_network, self._folder, sharding)

    def verified(
        self,
        precision: Precision,
        *,
        make: MakeNetwork | None = None,
        references: list[Array] | None = None,
        **split: int,
    ) -> Verification:
        sharding = Sharding(**split)
        return verify_network(
            make or self.make(sharding),
            PROMPTS,
            references or self.references,
            decoder=self.decoder,
            sharding=sharding,
            precision=precision,
            reference="transformers",
            exact=precision is Precision.FP32,
        )

    def engine(self) -> NetworkEngine:
        whole = Sharding()
        return NetworkEngine.made(
            self.make(whole), self.decoder, whole, None, rows_max=3, exact=True
        )


def mixture() -> PreTrainedModel:
    torch.manual_seed(7)
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            hidden_size=64,
            head_dim=16,
            moe_intermediate_size=32,
            num_experts=6,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=260,
            max_position_embeddings=256,
        )
    )
    for values in model.parameters():
        torch.nn.init.normal_(values, 0.0, 0.3)
    return model


@pytest.fixture(params=["qwen3"])
def case(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    make_model: Callable[[str], PreTrainedModel],
    save_model: Callable[..., None],
    functions: ModuleType,
) -> Case:
    model = mixture() if request.param == "mixture" else make_model(request.param)
    with torch.no_grad():
        for values in model.parameters():
            values.copy_(values.bfloat16())
    save_model(model, tmp_path)
    return Case(tmp_path, functions)


@pytest.mark.parametrize(
    "case",
    ["qwen3", "qwen2", "llama tied", "llama with biases", "llama yarn", "mixture"],
    indirect=True,
)
def test_a_network_is_the_model(case: Case) -> None:
    """In float32 throughout it has transformers' logits to six digits."""
    found = case.verified(Precision.FP32)

    assert found.method is VerifyMethod.NETWORK
    assert found.tokens == sum(map(len, PROMPTS))
    assert found.logit_error < 1e-5
    assert found.top1_agreement == 1.0


def test_the_networks_own_types_cost_what_bf16_costs(case: Case) -> None:
    found = case.verified(Precision.BF16)

    assert 1e-3 < found.logit_error < 0.1


@pytest.mark.parametrize("split", [{"tp": 2, "pp": 2}, {"cp": 2}], ids=str)
def test_ranks_together_are_the_whole(case: Case, split: dict[str, int]) -> None:
    """Each in a process of its own: their logits are those of one rank, to within the order of
    float32 sums (stated: 1e-5 of the logits' spread).
    """
    whole = list(step_through(case.engine(), PROMPTS).decoded)

    found = case.verified(Precision.FP32, references=whole, **split)

    assert found.logit_error < 1e-5
    assert found.top1_agreement == 1.0


def test_a_network_that_attends_wrongly_is_refused(case: Case) -> None:
    """The trap of ONNX: a causal mask that starts at the cache's first place, not at the row's."""

    def make(rank: int) -> Any:
        network, constants = case.make(Sharding())(rank)
        for index in range(network.num_layers):
            layer = network.get_layer(index)
            if layer.type == trt.LayerType.ATTENTION_OUTPUT:
                layer.__class__ = trt.IAttentionOutputLayer
                layer.attention.causal_kind = trt.CausalMaskKind.UPPER_LEFT
        return network, constants

    with pytest.raises(OutsideTolerance):
        case.verified(Precision.BF16, make=make)


def test_a_row_between_two_others_keeps_what_it_holds(case: Case) -> None:
    """Rows 0 and 2 step, and row 1 with them for want of a gap, into places that do not count."""
    engine = case.engine()
    for row, prompt in enumerate(PROMPTS):
        engine.step([Row(prompt[:3], 0, [row + 1], samples=False)])
    engine.step([Row(PROMPTS[row][3:4], 3, [row + 1], samples=True) for row in (0, 2)])

    logits = engine.step([Row(PROMPTS[1][3:4], 3, [2], samples=True)])

    np.testing.assert_allclose(logits[0], case.references[1][3], atol=1e-4)


def test_a_host_is_told_apart_and_not_named() -> None:
    assert fingerprint() == fingerprint()
    assert len(fingerprint()) == 16
    assert int(fingerprint(), 16)
