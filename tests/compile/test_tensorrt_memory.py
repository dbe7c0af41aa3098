"""What a TensorRT plan occupies, rank by rank: expected values are worked by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
import tensorrt_rtx

from headrace.compile.families.registry import describe_config
from headrace.compile.memory import fit, parameters, require_fit
from headrace.compile.published import open_config
from headrace.compile.sharding import held_shapes, parts
from headrace.compile.tensorrt.decoder_network import Plan, write_decoder
from headrace.compile.tensorrt.linear_forms import held as held_forms
from headrace.compile.tensorrt.network import Network
from headrace.compile.tensorrt.profiles import default_profiles
from headrace.compile.tensorrt.targets import find_target
from headrace.compile.tensorrt_memory import TensorRtFootprint
from headrace.serving.domain.artifact import Decoder, Precision, Sharding
from headrace.serving.engine.native_weights import source_shapes
from headrace.serving.errors import DoesNotFit

SMALL = Decoder(
    layers=3,
    hidden=128,
    heads=4,
    kv_heads=2,
    head_dim=64,
    ffn=256,
    vocab=1_000,
    rms_eps=1e-6,
    qkv_bias=True,
    qk_norm=True,
    tied=True,
    o_bias=True,
    context_tokens=1_024,
)
H200 = 141 * 10**9
BF16 = TensorRtFootprint(Precision.BF16)
ONE = Sharding()


def published(name: str) -> Decoder:
    return describe_config(open_config(name)).decoder


SMALL_MIXTURE = replace(SMALL, experts=6, experts_per_token=2, expert_ffn=64)
QWEN3_8B = published("qwen3-8b")
QWEN3_06B = published("qwen3-0.6b")
MIXTURE = published("qwen3-235b-a22b")
TABLES_8B = 41_472 * 128 * 4
"""cos and sin of 40,960 + 512 places, 64 pairs each, in float32."""


def values_by_tensor(decoder: Decoder, sharding: Sharding) -> dict[str, int]:
    """What all ranks hold of each tensor, added up."""
    held: dict[str, int] = {}
    for part in parts(decoder, sharding):
        for name, shape in held_shapes(part).items():
            held[name] = held.get(name, 0) + math.prod(shape)
    return held


def test_bf16_is_two_bytes_a_parameter_and_the_rope_tables() -> None:
    (rank,) = fit(QWEN3_8B, BF16, device_bytes=H200).ranks

    assert rank.weight_bytes == 2 * 8_190_735_360 + TABLES_8B
    assert rank.kv_bytes_per_token == 2 * 36 * 8 * 128 * 2
    # A chunk of 512: keys and values of 41,472 places for 32 heads, and 13,312 values a token.
    assert rank.activation_bytes == 2 * 2 * 41_472 * 32 * 128 + 2 * 512 * 13_312


def test_fp8_and_int4_change_the_layers_matrices_alone() -> None:
    """Each layer of Qwen3-8B: 192,937,984 values in seven matrices with 38,912 outputs between
    them; 2 x 4,096 + 2 x 128 norm values stay bf16, as do embedding, head and the final norm.
    """
    outside = 2 * (2 * 151_936 * 4096 + 4096 + 36 * 8_448) + TABLES_8B
    fp8 = fit(QWEN3_8B, replace(BF16, precision=Precision.FP8), device_bytes=H200).ranks[0]
    int4 = fit(QWEN3_8B, replace(BF16, precision=Precision.INT4), device_bytes=H200).ranks[0]

    assert fp8.weight_bytes == outside + 36 * (192_937_984 + 4 * 38_912)
    assert int4.weight_bytes == outside + 36 * (192_937_984 // 2 + 2 * 192_937_984 // 128)


@pytest.mark.parametrize("sharding", [ONE, Sharding(tp=2, pp=2), Sharding(cp=2)], ids=str)
@pytest.mark.parametrize("precision", [Precision.BF16, Precision.FP8, Precision.INT4], ids=str)
@pytest.mark.parametrize("facts", [SMALL, SMALL_MIXTURE], ids=["dense", "mixture"])
def test_weights_are_the_constants_of_the_network(
    sharding: Sharding, precision: Precision, facts: Decoder
) -> None:
    """The network as it is written for TensorRT-RTX holds what was planned, shapes' sizes aside."""
    footprint = replace(BF16, precision=precision)
    tensors = {name: np.zeros(shape, np.float32) for name, shape in source_shapes(facts).items()}
    for part in parts(facts, sharding):
        builder = tensorrt_rtx.Builder(tensorrt_rtx.Logger())
        net = Network(tensorrt_rtx, builder.create_network(0))
        plan = Plan(part=part, sharding=sharding, cache_tokens=footprint.cache_tokens(facts))
        forms = held_forms(precision, facts, tensors, calibrated=None, activations=False)
        write_decoder(net, plan, forms.tensors, forms.products)

        held = sum(values.nbytes for values in net.constants.values())
        assert 0 <= held - footprint.weight_bytes(part) < 4_096


def test_tensor_ranks_split_every_matrix_and_hold_norms_and_tables_whole() -> None:
    held = values_by_tensor(QWEN3_8B, Sharding(tp=4))

    assert held.pop("rope.inv_freq") == 4 * 64
    replicated = {name for name in held if name.endswith("norm")}
    assert sum(held[name] for name in replicated) == 4 * (4096 + 36 * (2 * 4096 + 2 * 128))
    split = sum(count for name, count in held.items() if name not in replicated)
    assert split == parameters(QWEN3_8B) - (4096 + 36 * (2 * 4096 + 2 * 128))


def test_experts_are_split_in_width_and_routers_are_whole() -> None:
    held = values_by_tensor(MIXTURE, Sharding(tp=4))

    experts = sum(count for name, count in held.items() if ".experts." in name)
    routers = sum(count for name, count in held.items() if name.endswith("router"))
    assert experts == 94 * 128 * 3 * 1536 * 4096
    assert routers == 4 * 94 * 128 * 4096


def test_stages_hold_their_layers_and_their_end_of_the_model() -> None:
    """An untied model's stages hold each of its tensors once."""
    first, last = (set(held_shapes(part)) for part in parts(QWEN3_8B, Sharding(pp=2)))

    assert first & last == {"rope.inv_freq"}
    assert {"embed", "layers.17.q"} <= first
    assert {"final_norm", "lm_head", "layers.18.q", "layers.35.q"} <= last
    held = values_by_tensor(QWEN3_8B, Sharding(pp=2))
    assert sum(held.values()) == parameters(QWEN3_8B) + 2 * 64


def test_a_tied_embedding_is_held_at_both_ends() -> None:
    first, middle, last = (set(held_shapes(p)) for p in parts(QWEN3_06B, Sharding(pp=3)))

    assert "embed" in first & last
    assert "embed" not in middle
    assert "lm_head" not in first | middle | last


def test_context_ranks_hold_all_weights_and_their_share_of_the_cache() -> None:
    (one,) = fit(QWEN3_8B, BF16, device_bytes=H200).ranks
    four = fit(QWEN3_8B, BF16, device_bytes=H200, sharding=Sharding(cp=4)).ranks

    assert {rank.weight_bytes for rank in four} == {one.weight_bytes}
    assert {4 * rank.kv_bytes_per_token for rank in four} == {one.kv_bytes_per_token}
    assert four[0].activation_bytes < one.activation_bytes


def test_the_fullest_stage_decides_how_many_tokens_a_replica_keeps() -> None:
    """Three stages of 12, 12 and 12 layers; the ends hold a vocabulary of 1.2 GB besides."""
    found = fit(QWEN3_8B, BF16, device_bytes=16 * 10**9, sharding=Sharding(pp=3))

    assert found.ranks[1].kv_tokens_max > found.ranks[2].kv_tokens_max
    assert found.kv_tokens == min(rank.kv_tokens_max for rank in found.ranks)


def test_one_row_of_the_longest_sequence_must_fit() -> None:
    """The cache of a row is linear: 41,472 places of 147,456 bytes are 6.1 GB at once."""
    step = 2 * 2 * 41_472 * 32 * 128 + 2 * 512 * 13_312
    used = 2 * 8_190_735_360 + TABLES_8B + step + 41_472 * 147_456

    assert fit(QWEN3_8B, BF16, device_bytes=math.ceil(used / 0.9) + 1).fits
    assert not fit(QWEN3_8B, BF16, device_bytes=math.floor(used / 0.9) - 1_000).fits


def test_a_refusal_offers_a_wider_split_and_a_narrower_precision() -> None:
    with pytest.raises(DoesNotFit) as refusal:
        require_fit(QWEN3_8B, BF16, device_bytes=24 * 10**9, sharding=ONE)

    assert "--tp 2" in refusal.value.fix
    assert "--precision fp8" in refusal.value.fix


def test_profiles_cover_every_number_of_rows_once() -> None:
    prefill, *decode = default_profiles(48, 512)

    assert (prefill.rows, prefill.tokens) == ((1, 1, 1), (1, 512, 512))
    assert [each.rows for each in decode] == [(1, 2, 2), (3, 8, 8), (9, 32, 32), (33, 48, 48)]
    assert {each.tokens for each in decode} == {(1, 1, 1)}
    assert [each.rows[2] for each in default_profiles(4)] == [1, 2, 4]


def test_profiles_deal_tokens_out_evenly_to_context_ranks() -> None:
    prefill, *decode = default_profiles(30, 500, cp=8)

    assert prefill.tokens == (8, 504, 504)
    assert [each.rows for each in decode] == [(8, 16, 16), (24, 32, 32)]


def test_fp8_needs_ada_or_later() -> None:
    """TensorRT-RTX refuses 8.0 and 8.6: "the model contains HW-specific datatypes"."""
    rtx = find_target("rtx")

    assert rtx.capabilities(Precision.BF16) == ("8.0", "8.6", "8.9", "12.0")
    assert rtx.capabilities(Precision.FP8) == ("8.9", "12.0")
    assert find_target("h200").capabilities(Precision.FP8) == ("9.0",)
