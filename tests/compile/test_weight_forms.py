"""Weights in bf16, FP8 and INT4: the nearest number there is, and bits as TensorRT reads them."""

import numpy as np
import numpy.typing as npt
import pytest
import torch

from headrace.compile.tensorrt.weight_forms import (
    Bf16Form,
    Fp8Form,
    Int4Form,
    bf16,
    bf16_to_float,
    e4m3,
    form_bytes,
    fp8_e4m3,
    fp8_outputs_scale,
    fp8_scale,
    fp8_to_float,
    int4_blocks,
    pack_int4,
    unpack_int4,
    weight_form,
)
from headrace.serving.domain.artifact import Precision
from headrace.serving.errors import CheckpointUnreadable

Floats = npt.NDArray[np.float32]


def matrix(outputs: int, inputs: int) -> Floats:
    return np.random.default_rng(1).normal(0, 0.05, (outputs, inputs)).astype(np.float32)


def awkward_values() -> Floats:
    """Every E4M3 number, the middle of each pair of neighbours, what lies beside it, and more."""
    numbers = fp8_to_float(np.arange(256, dtype=np.uint8))
    numbers = np.unique(numbers[np.isfinite(numbers)])
    middles = (numbers[1:] + numbers[:-1]) / np.float32(2)
    above, below = (np.nextafter(middles, np.float32(to)) for to in (1e9, -1e9))
    drawn = np.random.default_rng(0).normal(0, 1, 100_000) * np.repeat([1e-3, 1, 100, 1e4], 25_000)
    small = [0.0, -0.0, 1e-30, -1e-45, 2**-10, 3 * 2**-10]
    return np.concatenate([numbers, middles, above, below, drawn, small]).astype(np.float32)


def test_every_fp8_number_is_its_own_code() -> None:
    """A checkpoint that is FP8 already passes through without loss."""
    codes = np.arange(256, dtype=np.uint8)
    codes = codes[codes & 0x7F != 0x7F]

    np.testing.assert_array_equal(e4m3(fp8_to_float(codes)), codes)


def test_fp8_is_what_torch_calls_float8_e4m3fn() -> None:
    """Two implementations agree on every tie, on subnormal numbers and at the border."""
    values = awkward_values()
    cut = torch.from_numpy(values.clip(-448, 448))
    expected = cut.to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    np.testing.assert_array_equal(e4m3(values), expected)


def test_fp8_rounds_ties_to_even_and_cuts_off_beyond_448() -> None:
    """17 lies between 16 and 18, 19 between 18 and 20: 16 and 20 have the even mantissas."""
    values = np.float32([17, 19, -17, 2**-10, 3 * 2**-10, 448, 464, 1e30, -1e30])

    rounded = fp8_to_float(e4m3(values))

    assert rounded.tolist() == [16, 20, -16, 0, 2**-8, 448, 448, 448, -448]


def test_bf16_rounds_as_torch_does() -> None:
    values = np.append(awkward_values(), np.float32([np.inf, -np.inf, 3.4e38, np.nan]))
    expected = torch.from_numpy(values).to(torch.bfloat16)

    np.testing.assert_array_equal(bf16_to_float(bf16(values)), expected.float().numpy())


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_what_is_not_finite_is_refused(broken: float) -> None:
    """A cut-off infinity would answer, and wrongly."""
    weights = matrix(4, 128)
    weights[3, 5] = broken

    for precision in (Precision.FP8, Precision.INT4):
        with pytest.raises(CheckpointUnreadable, match="not finite"):
            weight_form("layers.0.q", weights, precision)


def test_fp8_cuts_nothing_off_and_stays_within_its_own_rounding() -> None:
    """Three bits of mantissa: 1/16 of a number, or half of the least step, and then bf16's."""
    weights = matrix(300, 256)
    weights[7] = 0

    for scale in (fp8_scale(weights), fp8_outputs_scale(weights)):
        form = fp8_e4m3(weights, scale)
        least_step = np.broadcast_to(scale, 300)[:, None] * 2**-9
        error = np.abs(form.dequantised() - weights)
        assert (error <= np.maximum(np.abs(weights) * (2**-4 + 2**-8), least_step / 2 * 1.01)).all()
        assert np.abs(fp8_to_float(form.codes)).max() == 448


def test_matrices_of_one_input_share_the_scale_of_the_largest() -> None:
    small, large = np.full((2, 64), 0.5, np.float32), np.full((3, 64), -7, np.float32)

    assert fp8_scale(small, large) == np.float32(7 / 448)


def test_zero_weights_keep_a_scale_above_zero() -> None:
    """TensorRT divides by it."""
    zero = np.zeros((2, 128), np.float32)

    assert fp8_scale(zero) == 1
    form = int4_blocks(zero, block=128)
    assert (bf16_to_float(form.scale) > 0).all()
    assert not form.dequantised().any()


def test_the_first_of_two_int4_codes_lies_in_the_low_bits() -> None:
    """TensorRT-RTX prints a constant of these bytes as -7, -3, 3, -6."""
    codes = np.array([[-7, -3, 3, -6]], np.int8)

    assert pack_int4(codes).tolist() == [[0xD9, 0xA3]]
    every = np.arange(-8, 8, dtype=np.int8).reshape(1, 16)
    np.testing.assert_array_equal(unpack_int4(pack_int4(every)), every)


@pytest.mark.parametrize("largest", [7, -8])
def test_weights_on_an_int4_grid_pass_through_without_loss(largest: int) -> None:
    """A checkpoint that was INT4 already is found again."""
    codes = np.random.default_rng(3).integers(-7, 8, (5, 256)).astype(np.float32)
    codes[:, ::64] = largest
    weights = codes * np.float32(0.25)

    form = int4_blocks(weights, block=128, importance=np.ones(256, np.float32))

    np.testing.assert_array_equal(form.dequantised(), weights)


def test_int4_spares_the_inputs_that_count() -> None:
    """What is multiplied with large inputs is rounded better than the plain rounding does it."""
    weights = matrix(64, 128)
    weights[:, 5] *= 8
    importance = np.full(128, 1, np.float32)
    importance[64:] = 100

    def loss(form: Int4Form) -> float:
        return float((np.square(form.dequantised() - weights) * importance).sum())

    plain = int4_blocks(weights, block=128)
    weighed = int4_blocks(weights, block=128, importance=importance)

    assert loss(weighed) < 0.8 * loss(plain)


@pytest.mark.parametrize(
    ("name", "shape", "precision", "kind", "expected"),
    [
        pytest.param("layers.0.q", (8, 256), Precision.BF16, Bf16Form, 4096, id="bf16"),
        pytest.param("layers.0.q", (8, 256), Precision.FP8, Fp8Form, 2080, id="fp8"),
        pytest.param("layers.0.q", (8, 256), Precision.INT4, Int4Form, 1056, id="blocks of 128"),
        pytest.param("layers.0.o", (8, 64), Precision.INT4, Int4Form, 272, id="blocks of 64"),
        pytest.param("layers.0.o", (8, 96), Precision.INT4, Bf16Form, 1536, id="no block divides"),
        pytest.param("lm_head", (8, 256), Precision.FP8, Bf16Form, 4096, id="head stays bf16"),
        pytest.param("embed", (8, 256), Precision.INT4, Bf16Form, 4096, id="embedding too"),
    ],
)
def test_the_memory_plan_knows_what_each_matrix_takes(
    name: str, shape: tuple[int, int], precision: Precision, kind: type, expected: int
) -> None:
    """`--dry-run` computes what a build then holds."""
    form = weight_form(name, matrix(*shape), precision)

    assert type(form) is kind
    parts = [getattr(form, part) for part in type(form).__slots__]
    assert sum(part.nbytes for part in parts) == expected
    assert form_bytes(name, shape, precision) == expected


def test_a_matrix_of_a_calibrated_input_has_one_scale() -> None:
    weights = matrix(8, 256)

    form = weight_form("layers.0.q", weights, Precision.FP8, scale=fp8_scale(weights))

    assert isinstance(form, Fp8Form)
    assert form.scale.shape == ()
    assert form_bytes("layers.0.q", (8, 256), Precision.FP8, is_calibrated=True) == 2052
