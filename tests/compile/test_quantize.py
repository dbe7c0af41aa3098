"""Quantised weights: exact where the source lies on the grid, close elsewhere, all or nothing."""

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file

from headrace.compile.quantize import (
    dequantize_int4,
    file_layout,
    quantize_decoder,
    quantize_int4,
    quantize_int8,
    quantize_int8_blocks,
    source_shapes,
)
from headrace.serving.domain.artifact import Decoder, Precision
from headrace.serving.engine.native_weights import read_weights
from headrace.serving.errors import CheckpointUnreadable, StorageFull

Floats = npt.NDArray[np.float32]
Q4_1, Q8_0 = gguf.GGMLQuantizationType.Q4_1, gguf.GGMLQuantizationType.Q8_0

DECODER = Decoder(
    layers=2,
    hidden=64,
    heads=4,
    kv_heads=2,
    head_dim=16,
    ffn=96,
    vocab=50,
    rms_eps=1e-5,
    qkv_bias=True,
    qk_norm=True,
    tied=False,
    o_bias=True,
    context_tokens=128,
)


def random_weights(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).normal(0, 0.05, shape).astype(np.float32)


def source(decoder: Decoder = DECODER) -> dict[str, Floats]:
    return {name: random_weights(*shape) for name, shape in source_shapes(decoder).items()}


def test_weights_from_q4_1_pass_through_int4_without_loss() -> None:
    """The demo model comes as Q4_1: its int4 artifact has the very same weights."""
    blocks = gguf.quants.quantize(random_weights(96, 160), Q4_1)
    weights = gguf.quants.dequantize(blocks, Q4_1).astype(np.float32)

    codes, scale, low = quantize_int4(weights)

    np.testing.assert_array_equal(dequantize_int4(codes, scale, low, 160), weights)


def test_an_embedding_from_q8_0_passes_through_without_loss() -> None:
    blocks = gguf.quants.quantize(random_weights(50, 64), Q8_0)
    weights = gguf.quants.dequantize(blocks, Q8_0).astype(np.float32)

    codes, scale = quantize_int8_blocks(weights)

    dense = codes * np.repeat(scale.astype(np.float32), 32, axis=1)
    np.testing.assert_array_equal(dense, weights)


def test_int8_is_within_half_a_step() -> None:
    weights = random_weights(40, 100)

    codes, scale = quantize_int8(weights)

    assert np.abs(codes * scale[:, None] - weights).max() <= scale.max() * 0.501


@pytest.mark.parametrize("inputs", [32, 100, 7])
def test_int4_is_no_worse_than_from_least_to_greatest(inputs: int) -> None:
    """Fitting the grid may only help; widths need not be whole blocks."""
    weights = random_weights(64, inputs)
    codes, scale, low = quantize_int4(weights)

    error = np.square(dequantize_int4(codes, scale, low, inputs) - weights).mean()

    step = (weights.max() - weights.min()) / 15
    assert codes.shape == (64, -(-inputs // 32) * 16)
    assert error <= step**2 / 12


@pytest.mark.parametrize("quantise", [quantize_int8, quantize_int8_blocks, quantize_int4])
@pytest.mark.parametrize("value", [0.0, 0.25, -0.25])
def test_constant_weights_stay_what_they_are(
    value: float, quantise: Callable[[Floats], tuple[npt.NDArray[np.generic], ...]]
) -> None:
    """A row of zeros has no range to divide by."""
    parts = quantise(np.full((3, 64), value, np.float32))

    assert all(np.isfinite(part.astype(np.float32)).all() for part in parts)
    if len(parts) == 3:
        found = dequantize_int4(*parts, 64)  # type: ignore[call-arg]
        np.testing.assert_allclose(found, value, atol=1e-6)


@pytest.mark.parametrize("precision", [Precision.INT8, Precision.INT4])
def test_the_file_holds_what_its_layout_says(precision: Precision, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    written = quantize_decoder(DECODER, source(), precision, path)

    stored = load_file(path)

    names = {"F32": np.float32, "F16": np.float16, "I8": np.int8, "U8": np.uint8}
    layout = file_layout(DECODER, precision)
    assert {n: (a.dtype, a.shape) for n, a in stored.items()} == {
        n: (np.dtype(names[dtype]), shape) for n, (dtype, shape) in layout.items()
    }
    assert written.weight_bytes == sum(array.nbytes for array in stored.values())


@pytest.mark.parametrize("precision", [Precision.INT8, Precision.INT4])
def test_the_engine_reads_back_every_tensor(precision: Precision, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    tensors = source()
    quantize_decoder(DECODER, tensors, precision, path)

    read = {weight.name: weight for weight in read_weights(path, DECODER, precision)}

    assert read.keys() == tensors.keys()
    np.testing.assert_array_equal(read["layers.1.q_norm"].values, tensors["layers.1.q_norm"])
    assert (read["layers.0.down"].low is not None) is (precision is Precision.INT4)


def test_the_order_of_tensors_does_not_matter(tmp_path: Path) -> None:
    """Shards of a checkpoint come in any order, and the same model has the same hash."""
    forwards, backwards = tmp_path / "forwards", tmp_path / "backwards"
    tensors = source()
    quantize_decoder(DECODER, tensors, Precision.INT4, forwards)
    quantize_decoder(DECODER, iter(reversed(tensors.items())), Precision.INT4, backwards)

    assert forwards.read_bytes() == backwards.read_bytes()


def _missing(tensors: dict[str, Floats]) -> list[tuple[str, Floats]]:
    return [(name, array) for name, array in tensors.items() if name != "layers.1.up"]


def _twice(tensors: dict[str, Floats]) -> list[tuple[str, Floats]]:
    return [*tensors.items(), ("embed", tensors["embed"])]


def _unknown(tensors: dict[str, Floats]) -> list[tuple[str, Floats]]:
    return [*tensors.items(), ("layers.2.up", tensors["layers.1.up"])]


def _transposed(tensors: dict[str, Floats]) -> list[tuple[str, Floats]]:
    return [(name, array.T if name == "layers.0.k" else array) for name, array in tensors.items()]


def _infinite(tensors: dict[str, Floats]) -> list[tuple[str, Floats]]:
    tensors["layers.0.o"][3, 4] = np.inf
    return list(tensors.items())


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        pytest.param(_missing, "no tensor 'layers.1.up'", id="a tensor is missing"),
        pytest.param(_twice, "'embed' is given twice", id="a tensor comes twice"),
        pytest.param(_unknown, "'layers.2.up' is not known", id="a tensor is unknown"),
        pytest.param(_transposed, "'layers.0.k' has shape", id="a tensor is transposed"),
        pytest.param(_infinite, "not finite", id="a value is infinite"),
    ],
)
def test_a_checkpoint_that_contradicts_its_facts_leaves_no_file(
    spoil: Callable[[dict[str, Floats]], list[tuple[str, Floats]]], why: str, tmp_path: Path
) -> None:
    path = tmp_path / "weights.safetensors"

    with pytest.raises(CheckpointUnreadable, match=why):
        quantize_decoder(DECODER, spoil(source()), Precision.INT8, path)

    assert not path.exists()


def test_a_disk_that_refuses_the_file_is_reported(tmp_path: Path) -> None:
    """/dev/full takes nothing, as a disk without room does. A link to it: it gets removed."""
    path = tmp_path / "weights.safetensors"
    path.symlink_to("/dev/full")

    with pytest.raises(StorageFull, match="No space left"):
        quantize_decoder(DECODER, source(), Precision.INT8, path)

    assert not path.is_symlink()
