"""A decoder as ONNX for the `cpu` target: the paged contract that `OnnxEngine` runs.

The KV cache is a pool of slots, one token each, per layer and kind: `past_k_{i}`, `past_v_{i}`
[slots, K, H]. A step writes its tokens' keys and values at `write_slots` and reads its context from
`read_slots`. `present_*` is `past_*` after the write; bound to the same buffer it is written in
place, and nothing is copied. Spelling: opset 23, ScatterND and Attention with a bool mask.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from headrace.compile.families.decoder import DecoderModule, Tensors
from headrace.serving.domain.artifact import Decoder

OPSET = 23


class _Paged(nn.Module):
    """The decoder with a `kv_update` that scatters into the pool and gathers from it."""

    def __init__(self, decoder: DecoderModule) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        write_slots: torch.Tensor,
        read_slots: torch.Tensor,
        mask: torch.Tensor,
        sample_index: torch.Tensor,
        past: tuple[torch.Tensor, ...],
    ) -> tuple[torch.Tensor, ...]:
        facts = self.decoder.decoder
        written, context = write_slots.reshape(-1), read_slots.reshape(-1)
        heads = (facts.kv_heads, facts.head_dim)
        present: list[torch.Tensor] = []

        def update(pool: torch.Tensor, fresh: torch.Tensor) -> torch.Tensor:
            pool = pool.index_put((written,), fresh.reshape(-1, *heads))
            present.append(pool)
            return pool.index_select(0, context).reshape(*read_slots.shape, *heads).transpose(1, 2)

        def kv_update(
            layer: int, keys: torch.Tensor, values: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            return update(past[2 * layer], keys), update(past[2 * layer + 1], values)

        logits = self.decoder(input_ids, position_ids, mask, sample_index, kv_update)
        return logits, *present


def pool_names(decoder: Decoder, prefix: str) -> list[str]:
    """`past_k_0`, `past_v_0`, `past_k_1`, … in the order of the graph."""
    return [f"{prefix}_{kind}_{index}" for index in range(decoder.layers) for kind in "kv"]


def export_decoder(decoder: Decoder, tensors: Tensors, out_path: Path) -> None:
    """Write the graph to `out_path` and its weights, in fp32, to `out_path`.data beside it.

    Raises:
        OSError: the files could not be written.
    """
    module = _Paged(DecoderModule.from_tensors(decoder, tensors)).eval()
    # Sizes that differ from each other, so that the exporter does not take two for one.
    rows, tokens, context, slots = 2, 3, 32, 64
    pool = torch.zeros(slots, decoder.kv_heads, decoder.head_dim)
    example = (
        torch.zeros(rows, tokens, dtype=torch.int64),
        torch.zeros(rows, tokens, dtype=torch.int64),
        torch.arange(rows * tokens).reshape(rows, tokens),
        torch.zeros(rows, context, dtype=torch.int64),
        torch.ones(rows, 1, tokens, context, dtype=torch.bool),
        torch.zeros(5, dtype=torch.int64),
        tuple(pool.clone() for _ in range(2 * decoder.layers)),
    )
    any_size = torch.export.Dim.DYNAMIC
    by_token = {0: any_size, 1: any_size}
    sizes = (
        by_token,
        by_token,
        by_token,
        by_token,
        {0: any_size, 2: any_size, 3: any_size},
        {0: any_size},
        tuple({0: any_size} for _ in range(2 * decoder.layers)),
    )
    first = ["input_ids", "position_ids", "write_slots", "read_slots", "mask", "sample_index"]
    with _quiet():
        program = torch.onnx.export(
            module,
            example,
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=sizes,
            input_names=[*first, *pool_names(decoder, "past")],
            output_names=["logits", *pool_names(decoder, "present")],
            verbose=False,
        )
        assert program is not None
        program.save(out_path, external_data=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter reports on packages we do not use and on its own deprecations."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        log.setLevel(level)
