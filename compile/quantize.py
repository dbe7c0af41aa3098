"""Weights to the native engine's file: one tensor in, its quantised form out, never all at once.

The file's format is described in `serving/engine/native_weights.py`. A tensor that was dequantised
from blocks of GGUF's Q4_1 (or an embedding from Q8_0) lies on such a grid already, and the
quantiser finds that very grid, so that such weights pass through without loss.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import numpy as np
import numpy.typing as npt

from headrace.serving.domain.artifact import Decoder, Precision
from headrace.serving.engine.native_weights import (
    BLOCK,
    WEIGHTS_FILE,
    file_layout,
    source_shapes,
    tensor_layout,
)
from headrace.serving.errors import CheckpointUnreadable, StorageFull

__all__ = [
    "WEIGHTS_FILE",
    "Quantized",
    "file_layout",
    "quantize_decoder",
    "source_shapes",
]

Array = npt.NDArray[np.generic]
Floats = npt.NDArray[np.float32]

_HALF_MAX = float(np.finfo(np.float16).max)
_DTYPES = {"F32": np.float32, "F16": np.float16, "I8": np.int8, "U8": np.uint8}


@dataclass(frozen=True, slots=True)
class Quantized:
    """What was written."""

    weight_bytes: int
    """Of all tensors together."""
    exact_tensors: int
    """Matrices whose quantised form equals the source to the last bit."""


@dataclass(frozen=True, slots=True)
class _Slot:
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def quantize_decoder(
    decoder: Decoder,
    tensors: Iterable[tuple[str, Floats]] | Mapping[str, Floats],
    precision: Precision,
    out_path: Path,
) -> Quantized:
    """Write `out_path` from the source's tensors, holding one of them at a time.

    Args:
        decoder: the model's facts; they decide which tensors there are and their shapes.
        tensors: canonical name and float32 array of each, in any order: `embed`, `final_norm`,
            `rope.inv_freq`, `lm_head` (if untied) and `layers.{i}.` + `attn_norm`, `q`, `k`, `v`,
            `o`, `mlp_norm`, `gate`, `up`, `down`, `q_norm`, `k_norm`, `q_bias`, `k_bias`,
            `v_bias`, `o_bias` as the facts say. Matrices are [outputs, inputs].
        precision: INT8 or INT4.
        out_path: replaced if it exists; removed again when something fails.

    Raises:
        CheckpointUnreadable: a tensor is missing, unknown, given twice, of another shape, or
            holds a value that is not finite.
        StorageFull: the disk has no room for the file.
    """
    assert precision in (Precision.INT8, Precision.INT4)
    expected = source_shapes(decoder)
    header, slots = _header(file_layout(decoder, precision))
    left = set(expected)
    exact = 0
    pairs: Iterable[tuple[str, Floats]]
    pairs = tensors.items() if isinstance(tensors, Mapping) else tensors  # type: ignore[assignment]
    try:
        with _reporting_full_disk(out_path, slots), out_path.open("wb", buffering=0) as file:
            _write_all(file, header)
        for name, tensor in pairs:
            _check(name, tensor, expected, left)
            left.discard(name)
            parts, is_exact = _quantize(name, tensor, precision)
            exact += is_exact
            with _reporting_full_disk(out_path, slots), out_path.open("r+b", buffering=0) as file:
                for part, array in parts.items():
                    _put(file, len(header), slots[part], array)
        if left:
            raise CheckpointUnreadable(
                f"The checkpoint has no tensor {min(left)!r} ({len(left)} are missing).",
                why="The model's facts say that it must be there.",
                fix="Check that every shard of the checkpoint was downloaded.",
            )
    except BaseException:
        out_path.unlink(missing_ok=True)
        raise
    return Quantized(max(slot.end for slot in slots.values()), exact)


def _header(
    layout: Mapping[str, tuple[str, tuple[int, ...]]],
) -> tuple[bytes, dict[str, _Slot]]:
    """The safetensors header (length, JSON, padding to 64 bytes) and where each tensor goes.

    Every tensor starts at a multiple of 64 bytes from the first, so that a reader can map them.
    """
    slots: dict[str, _Slot] = {}
    at = 0
    entries: dict[str, object] = {}
    for name, (dtype, shape) in layout.items():
        size = int(np.prod(shape)) * np.dtype(_DTYPES[dtype]).itemsize
        slots[name] = _Slot(dtype, shape, at, at + size)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text, slots


@contextmanager
def _reporting_full_disk(path: Path, slots: Mapping[str, _Slot]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageFull(
            f"{path} could not be written: {error.strerror}.",
            why=f"The quantised weights take {max(s.end for s in slots.values()):,} bytes.",
            fix="Free space on that disk, or point HEADRACE_HOME at another one.",
        ) from error


def _put(file: FileIO, data_begin: int, slot: _Slot, array: Array) -> None:
    assert array.shape == slot.shape
    assert array.dtype == _DTYPES[slot.dtype]
    file.seek(data_begin + slot.begin)
    _write_all(file, np.ascontiguousarray(array).data.cast("B"))


def _write_all(file: FileIO, content: bytes | memoryview) -> None:
    left = memoryview(content)
    while left:
        left = left[file.write(left) :]


def _check(
    name: str, tensor: Floats, expected: Mapping[str, tuple[int, ...]], left: set[str]
) -> None:
    if name not in expected or name not in left:
        raise CheckpointUnreadable(
            f"The tensor {name!r} is {'given twice' if name in expected else 'not known'}.",
            why="The model's facts say which tensors there are, each once.",
            fix="Check that the checkpoint's configuration belongs to its weights.",
        )
    if tensor.shape != expected[name]:
        raise CheckpointUnreadable(
            f"The tensor {name!r} has shape {list(tensor.shape)}.",
            why=f"The model's facts say {list(expected[name])}.",
            fix="Check that the checkpoint's configuration belongs to its weights.",
        )
    if not np.isfinite(tensor).all():
        raise CheckpointUnreadable(
            f"The tensor {name!r} holds a value that is not finite.",
            why="Such a model answers with nothing but NaN.",
            fix="Download the checkpoint again; if its checksum is right, it is broken upstream.",
        )


def _quantize(name: str, tensor: Floats, precision: Precision) -> tuple[dict[str, Array], bool]:
    """The file's tensors for one of the model, and whether they are the source exactly."""
    values = np.asarray(tensor, np.float32)
    parts = tensor_layout(name, values.shape, precision)
    if values.ndim == 1:
        return {name: values}, False
    if len(parts) == 3:
        codes, scale, low = quantize_int4(values)
        arrays: tuple[Array, ...] = (codes, scale, low)
        back = dequantize_int4(codes, scale, low, values.shape[1])
    elif parts[f"{name}.scale"][0] == "F16":
        arrays = (codes, scale) = quantize_int8_blocks(values)
        back = codes * np.repeat(scale.astype(np.float32), BLOCK, axis=1)[:, : values.shape[1]]
    else:
        arrays = (codes, scale) = quantize_int8(values)
        back = codes * scale[:, None]
    return dict(zip(parts, arrays, strict=True)), bool(np.array_equal(back, values))


def quantize_int8(weights: Floats) -> tuple[npt.NDArray[np.int8], Floats]:
    """Symmetric, one scale for each output.

    Returns:
        codes (outputs, inputs) int8 in [-127, 127] and scale (outputs,) float32.
    """
    scale = (np.abs(weights).max(axis=1) / np.float32(127)).astype(np.float32)
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
    codes = np.rint(weights * inverse[:, None]).clip(-127, 127).astype(np.int8)
    return codes, scale


def quantize_int8_blocks(
    weights: Floats,
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float16]]:
    """Symmetric, one scale for each block of 32 inputs, as in GGUF's Q8_0.

    Returns:
        codes (outputs, inputs) int8 in [-127, 127] and scale (outputs, blocks) float16.
    """
    outputs, inputs = weights.shape
    values = np.pad(weights, ((0, 0), (0, -inputs % BLOCK))).reshape(outputs, -1, BLOCK)
    scale = _half(np.abs(values).max(axis=2) / np.float32(127))
    step = scale.astype(np.float32)
    inverse = np.divide(1, step, out=np.zeros_like(step), where=step > 0)
    codes = np.rint(values * inverse[..., None]).clip(-127, 127).astype(np.int8)
    return codes.reshape(outputs, -1)[:, :inputs], scale


def quantize_int4(
    weights: Floats,
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float16], npt.NDArray[np.float16]]:
    """Asymmetric, a scale and a minimum for each block of 32 inputs.

    Two grids are tried for each block and the closer one is kept: from the block's least to its
    greatest value, as Q4_1 was made (so that such a block is found again exactly), and the
    least-squares line through the values at that grid's codes.

    Returns:
        codes (outputs, blocks * 16) uint8, two to a byte, and scale and min (outputs, blocks)
        float16.
    """
    outputs, inputs = weights.shape
    blocks = -(-inputs // BLOCK)
    if inputs % BLOCK:
        first = weights[:, (blocks - 1) * BLOCK, None]
        weights = np.concatenate([weights, np.repeat(first, -inputs % BLOCK, axis=1)], axis=1)
    values = weights.reshape(outputs, blocks, BLOCK)
    low, high = values.min(axis=2), values.max(axis=2)
    scale, low = _half((high - low) / np.float32(15)), _half(low)
    codes = _codes(values, scale, low)
    fitted_scale, fitted_low = _fit(values, codes)
    fitted_codes = _codes(values, fitted_scale, fitted_low)
    better = _error(values, fitted_codes, fitted_scale, fitted_low) < _error(
        values, codes, scale, low
    )
    codes = np.where(better[..., None], fitted_codes, codes).reshape(outputs, -1)
    return (
        (codes[:, 0::2] | codes[:, 1::2] << 4).astype(np.uint8),
        np.where(better, fitted_scale, scale),
        np.where(better, fitted_low, low),
    )


def dequantize_int4(
    codes: npt.NDArray[np.uint8],
    scale: npt.NDArray[np.float16],
    low: npt.NDArray[np.float16],
    inputs: int,
) -> Floats:
    """(outputs, inputs) float32: scale * code + min, computed as GGUF's readers do."""
    outputs, blocks = scale.shape
    full = np.empty((outputs, blocks * BLOCK), np.float32)
    full[:, 0::2], full[:, 1::2] = codes & 15, codes >> 4
    full = full.reshape(outputs, blocks, BLOCK)
    full = full * scale.astype(np.float32)[..., None] + low.astype(np.float32)[..., None]
    return full.reshape(outputs, -1)[:, :inputs]


def _half(values: Floats) -> npt.NDArray[np.float16]:
    return values.clip(-_HALF_MAX, _HALF_MAX).astype(np.float16)


def _codes(
    values: Floats, scale: npt.NDArray[np.float16], low: npt.NDArray[np.float16]
) -> npt.NDArray[np.uint8]:
    step = scale.astype(np.float32)
    inverse = np.divide(1, step, out=np.zeros_like(step), where=step > 0)
    codes = np.rint((values - low.astype(np.float32)[..., None]) * inverse[..., None])
    return codes.clip(0, 15).astype(np.uint8)


def _fit(
    values: Floats, codes: npt.NDArray[np.uint8]
) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.float16]]:
    """The line min + scale * code with the least squared error, block by block."""
    x = codes.astype(np.float32)
    x_mean, y_mean = x.mean(axis=2), values.mean(axis=2)
    centred = x - x_mean[..., None]
    spread = (centred * centred).sum(axis=2)
    covariance = (centred * (values - y_mean[..., None])).sum(axis=2)
    scale = np.divide(covariance, spread, out=np.zeros_like(spread), where=spread > 0)
    return _half(scale), _half(y_mean - scale * x_mean)


def _error(
    values: Floats,
    codes: npt.NDArray[np.uint8],
    scale: npt.NDArray[np.float16],
    low: npt.NDArray[np.float16],
) -> Floats:
    grid = codes * scale.astype(np.float32)[..., None] + low.astype(np.float32)[..., None]
    return np.square(values - grid).sum(axis=2)
