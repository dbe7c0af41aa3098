"""What a model occupies is arithmetic, so the tests do arithmetic."""

import pytest

from headrace.compile.memory import (
    CpuFootprint,
    StepSize,
    activation_bytes,
    available_bytes,
    fit,
    require_fit,
    weight_bytes,
)
from headrace.serving.domain.artifact import Decoder, Precision, Sharding
from headrace.serving.engine.native_weights import source_shapes
from headrace.serving.errors import DoesNotFit, InvalidRequest

SMOLLM2 = Decoder(
    layers=30,
    hidden=576,
    heads=9,
    kv_heads=3,
    head_dim=64,
    ffn=1536,
    vocab=49_152,
    rms_eps=1e-5,
    qkv_bias=False,
    qk_norm=False,
    tied=True,
    context_tokens=8192,
)
QWEN3_8B = Decoder(
    layers=36,
    hidden=4096,
    heads=32,
    kv_heads=8,
    head_dim=128,
    ffn=12_288,
    vocab=151_936,
    rms_eps=1e-6,
    qkv_bias=False,
    qk_norm=True,
    tied=False,
    context_tokens=40_960,
)
GIB = 2**30
FP32, INT8 = CpuFootprint(Precision.FP32), CpuFootprint(Precision.INT8)


@pytest.mark.parametrize(
    ("decoder", "precision", "expected"),
    [
        # 134,515,008 parameters and 32 frequencies, 4 bytes each.
        pytest.param(SMOLLM2, Precision.FP32, 538_060_160, id="smollm2 in fp32"),
        # 8,190,735,360 parameters and 64 frequencies, 4 bytes each.
        pytest.param(QWEN3_8B, Precision.FP32, 32_762_941_696, id="qwen3 8b in fp32"),
    ],
)
def test_weights_of_published_models(decoder: Decoder, precision: Precision, expected: int) -> None:
    assert weight_bytes(source_shapes(decoder), precision) == expected


def test_a_token_keeps_a_key_and_a_value_in_each_layer() -> None:
    """2 x 30 layers x 3 heads x 64 values x 4 bytes."""
    (rank,) = fit(SMOLLM2, FP32, device_bytes=GIB).ranks

    assert rank.kv_bytes_per_token == 46_080


def test_a_step_of_the_onnx_engine_holds_its_scores() -> None:
    """512 x 6,720 + 3,145,728 values, then 75,497,472 scores and 6,291,456 of context."""
    step = StepSize(rows=32, tokens=512)

    assert activation_bytes(SMOLLM2, Precision.INT8, step) == 4 * 6_586_368
    assert activation_bytes(SMOLLM2, Precision.FP32, step) == 4 * (6_586_368 + 81_788_928)


def test_two_ranks_share_weights_and_cache() -> None:
    one = fit(QWEN3_8B, FP32, device_bytes=80 * GIB).ranks[0]
    two = fit(QWEN3_8B, FP32, device_bytes=80 * GIB, sharding=Sharding(tp=2)).ranks

    assert len(two) == 2
    assert two[0].kv_bytes_per_token * 2 == one.kv_bytes_per_token
    assert two[0].weight_bytes * 2 == pytest.approx(one.weight_bytes, rel=1e-3)


def test_more_ranks_than_kv_heads_hold_them_twice() -> None:
    eight = fit(QWEN3_8B, FP32, device_bytes=80 * GIB, sharding=Sharding(tp=8)).ranks[0]
    sixteen = fit(QWEN3_8B, FP32, device_bytes=80 * GIB, sharding=Sharding(tp=16)).ranks[0]

    assert eight.kv_bytes_per_token == sixteen.kv_bytes_per_token


def test_a_refusal_names_the_split_that_would_do() -> None:
    with pytest.raises(DoesNotFit) as refusal:
        require_fit(QWEN3_8B, FP32, device_bytes=24 * GIB)

    assert "--tp 2" in refusal.value.fix
    assert "--precision int8" in refusal.value.fix
    assert fit(QWEN3_8B, FP32, device_bytes=24 * GIB, sharding=Sharding(tp=2)).fits
    assert fit(QWEN3_8B, INT8, device_bytes=24 * GIB).fits


def test_a_refusal_names_the_memory_that_would_do() -> None:
    with pytest.raises(DoesNotFit) as refusal:
        require_fit(SMOLLM2, INT8, device_bytes=10 * 2**20)

    needed = int(refusal.value.fix.split()[-2].replace(",", ""))
    assert fit(SMOLLM2, INT8, device_bytes=needed).fits
    assert not fit(SMOLLM2, INT8, device_bytes=needed - 2**20).fits


@pytest.mark.parametrize("tp", [0, -1, 2, 5])
def test_heads_that_do_not_divide_are_refused(tp: int) -> None:
    with pytest.raises(InvalidRequest, match="split"):
        fit(SMOLLM2, INT8, device_bytes=GIB, sharding=Sharding(tp=tp))


def test_this_machine_has_some_memory() -> None:
    assert 2**20 < available_bytes() < 2**50
