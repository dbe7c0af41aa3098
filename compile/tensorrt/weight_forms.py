"""How a matrix becomes what a TensorRT network holds: bf16, FP8 or INT4 bits, and their scales.

A matrix is (outputs, inputs) float32, as the canonical names state it. TensorRT multiplies codes by
their scale and does nothing else: every form is symmetric. Numpy has none of these types, so they
are carried as their bits. `weight_layers.py` adds them to a network and says what they cost there.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from headrace.serving.domain.artifact import Precision
from headrace.serving.errors import CheckpointUnreadable

Floats = npt.NDArray[np.float32]
Bits8 = npt.NDArray[np.uint8]
Bits16 = npt.NDArray[np.uint16]

FP8_MAX = 448.0
"""Largest E4M3FN number, code 0x7E: 1.75 x 2^8. There is no infinity; 0x7F and 0xFF are NaN."""

INT4_BLOCKS = (128, 64)
"""Inputs that share a scale, the preferred first: those that TensorRT supports (its manual,
"Quantization Schemes"). TensorRT-RTX 1.7.1 builds 32 and 16 too."""

QUANTISED = frozenset({"q", "k", "v", "o", "gate", "up", "down"})
"""Matrices that fp8 and int4 change, by the last part of their canonical name. The embedding, which
is gathered from, `lm_head`, on whose error every token depends, and routers stay bf16."""

_CHUNK_VALUES = 2**16
"""Values rounded at a time: 256 KiB of float32, so that the passes over them stay in the cache.
Measured: 0.5 s for 135 million values as E4M3, four times faster than the whole at once."""

_SHRINKS = np.array([0.6, 0.68, 0.76, 7 / 8, 0.94, 1.0, 1.06], np.float32)
"""A block's scale is the best of these times (its largest magnitude / 7). With 7/8 and above one
that magnitude may be -8, so that weights which were INT4 already are found again."""

_WHOLE = np.ones(1, np.float32)
"""Without importance nothing is cut off. Measured on SmolLM2-135M: the least error of the matrix
itself cuts off weights that matter, and gives a logit error of 1.48 instead of 1.14."""

_TINY = np.finfo(np.float32).tiny


@dataclass(frozen=True, slots=True, eq=False)
class Bf16Form:
    """The matrix rounded to bf16."""

    bits: Bits16
    """(outputs, inputs)."""

    def dequantised(self) -> Floats:
        return bf16_to_float(self.bits)


@dataclass(frozen=True, slots=True, eq=False)
class Fp8Form:
    """E4M3FN codes and what they are multiplied with."""

    codes: Bits8
    """(outputs, inputs)."""
    scale: Floats
    """() for the whole matrix, or (outputs,)."""

    def dequantised(self) -> Floats:
        """As the network multiplies with it: rounded to bf16."""
        return bf16_to_float(bf16(fp8_to_float(self.codes) * self.scale.reshape(-1, 1)))


@dataclass(frozen=True, slots=True, eq=False)
class Int4Form:
    """Codes in [-8, 7], and a bf16 scale for each block of inputs."""

    packed: Bits8
    """(outputs, inputs / 2); of two inputs the earlier in the four low bits."""
    scale: Bits16
    """(outputs, inputs / block)."""

    @property
    def block(self) -> int:
        return 2 * self.packed.shape[1] // self.scale.shape[1]

    def dequantised(self) -> Floats:
        """As the network multiplies with it: rounded to bf16."""
        scale = np.repeat(bf16_to_float(self.scale), self.block, axis=1)
        return bf16_to_float(bf16(unpack_int4(self.packed) * scale))


WeightForm = Bf16Form | Fp8Form | Int4Form


def weight_form(
    name: str,
    matrix: Floats,
    precision: Precision,
    *,
    scale: Floats | None = None,
    importance: Floats | None = None,
) -> WeightForm:
    """What a network of `precision` holds for a matrix.

    Args:
        name: its canonical name.
        matrix: (outputs, inputs) float32; under tensor parallelism the rank's part.
        precision: BF16, FP8 or INT4.
        scale: FP8 only, where the input is FP8 too: `fp8_scale` of all matrices with this input. A
            scale for each output when None.
        importance: INT4 only: see `int4_blocks`.

    Raises:
        CheckpointUnreadable: fp8 or int4 of a value that is not finite.
    """
    if precision is Precision.FP8 and is_quantised(name):
        return fp8_e4m3(matrix, fp8_outputs_scale(matrix) if scale is None else scale)
    block = int4_block(matrix.shape[1])
    if precision is Precision.INT4 and is_quantised(name) and block is not None:
        return int4_blocks(matrix, block=block, importance=importance)
    assert precision in (Precision.BF16, Precision.FP8, Precision.INT4)
    return Bf16Form(bf16(matrix))


def form_bytes(
    name: str, shape: tuple[int, int], precision: Precision, *, is_calibrated: bool = False
) -> int:
    """Bytes of `weight_form` for a matrix of `shape`, scales included; computed, not built.

    For example 2,105,344 for (2048, 1024) in fp8: a byte each and 2,048 float32 scales.
    """
    outputs, inputs = shape
    if precision is Precision.FP8 and is_quantised(name):
        return outputs * inputs + (4 if is_calibrated else 4 * outputs)
    block = int4_block(inputs)
    if precision is Precision.INT4 and is_quantised(name) and block is not None:
        return outputs * inputs // 2 + 2 * outputs * (inputs // block)
    return 2 * outputs * inputs


def is_quantised(name: str) -> bool:
    """Whether fp8 and int4 change the matrix of this canonical name."""
    return name.rpartition(".")[2] in QUANTISED


def int4_block(inputs: int) -> int | None:
    """How many inputs share an INT4 scale. None where no block divides them: it stays bf16."""
    return next((block for block in INT4_BLOCKS if inputs % block == 0), None)


def bf16(array: Floats) -> Bits16:
    """Round to the nearest bf16, ties to even; infinity stays, and NaN stays NaN."""
    flat = np.ascontiguousarray(array, np.float32).reshape(-1)
    found = np.empty(flat.shape, np.uint16)
    for begin in range(0, flat.size, _CHUNK_VALUES):
        part = flat[begin : begin + _CHUNK_VALUES]
        bits = part.view(np.uint32)
        rounded = (bits + (np.uint32(0x7FFF) + (bits >> 16 & 1))) >> 16
        found[begin : begin + _CHUNK_VALUES] = np.where(np.isnan(part), 0x7FC0, rounded)
    return found.reshape(array.shape)


def bf16_to_float(bits: Bits16) -> Floats:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def fp8_scale(*matrices: Floats) -> Floats:
    """The scale () that suits all `matrices`: their largest magnitude / 448.

    Matrices that share an FP8 input become one product, and that absorbs one scale; of several, or
    of one for each output, TensorRT makes a kernel that passes over the result again.

    Raises:
        CheckpointUnreadable: a matrix holds a value that is not finite.
    """
    largest = max(_outputs_largest(matrix).max() for matrix in matrices)
    return _positive(np.array(largest / FP8_MAX, np.float32))


def fp8_outputs_scale(matrix: Floats) -> Floats:
    """A scale (outputs,) for each output: its row's largest magnitude / 448.

    Raises:
        CheckpointUnreadable: the matrix holds a value that is not finite.
    """
    return _positive(_outputs_largest(matrix) / np.float32(FP8_MAX))


def fp8_e4m3(matrix: Floats, scale: Floats) -> Fp8Form:
    """Round the matrix, divided by its `scale`, () or (outputs,), to E4M3FN."""
    each = np.broadcast_to(scale, len(matrix))
    codes = np.empty(matrix.shape, np.uint8)
    for rows in _row_chunks(matrix):
        codes[rows] = e4m3(matrix[rows] / each[rows, None])
    return Fp8Form(codes, scale)


def e4m3(values: Floats) -> Bits8:
    """Round to the nearest E4M3FN code, ties to even; beyond ±448 to ±448.

    `values` may not hold NaN, which is near to no number.
    """
    sign = (values.view(np.uint32) >> 24).astype(np.uint8) & np.uint8(0x80)
    size = np.minimum(np.abs(values), np.float32(FP8_MAX))
    # Below 2^-6 codes count steps of 2^-9, which is the last bit of a float32 near 2^14.
    small = (size + np.float32(2**14)).view(np.uint32) & 0xFF
    # From there on 3 of 23 bits of mantissa remain, and the exponent's bias is 7 instead of 127.
    bits = size.view(np.uint32)
    large = ((bits + (np.uint32(0x7FFFF) + (bits >> 20 & 1))) >> 20) - np.uint32((127 - 7) << 3)
    return np.where(size < np.float32(2**-6), small, large).astype(np.uint8) | sign


def fp8_to_float(codes: Bits8) -> Floats:
    return _E4M3[codes]


def int4_blocks(matrix: Floats, *, block: int, importance: Floats | None = None) -> Int4Form:
    """INT4 with a bf16 scale for each `block` of inputs, that of the least weighted error.

    Args:
        matrix: (outputs, inputs), whose inputs are a multiple of `block`.
        block: one of `INT4_BLOCKS`.
        importance: (inputs,) positive; how much an input's error counts: the mean square of what it
            is multiplied with, as calibration records it. When None, scales are those of the
            blocks' largest magnitudes.

    Raises:
        CheckpointUnreadable: the matrix holds a value that is not finite.
    """
    outputs, inputs = matrix.shape
    assert inputs % block == 0, (inputs, block)
    shrinks = _WHOLE if importance is None else _SHRINKS
    counts = np.ones(inputs, np.float32) if importance is None else importance.astype(np.float32)
    packed = np.empty((outputs, inputs // 2), np.uint8)
    scale = np.empty((outputs, inputs // block), np.uint16)
    for rows in _row_chunks(matrix):
        values = np.ascontiguousarray(matrix[rows], np.float32).reshape(-1, inputs // block, block)
        chosen = _least_error(values, counts.reshape(-1, block), shrinks)
        codes = _int4_codes(values, chosen).astype(np.int8).reshape(-1, inputs)
        packed[rows], scale[rows] = pack_int4(codes), bf16(chosen)
    return Int4Form(packed, scale)


def pack_int4(codes: npt.NDArray[np.int8]) -> Bits8:
    """Two to a byte: of neighbours the first in the four low bits, as TensorRT reads them.

    Its manual says so ("Explicit Quantization"), and TensorRT-RTX prints the bytes 0xD9, 0xA3 of a
    constant as -7, -3, 3, -6.
    """
    bits = codes.view(np.uint8) & np.uint8(0x0F)
    return bits[:, 0::2] | bits[:, 1::2] << np.uint8(4)


def unpack_int4(packed: Bits8) -> npt.NDArray[np.int8]:
    codes = np.empty((packed.shape[0], 2 * packed.shape[1]), np.int8)
    signed = packed.view(np.int8)
    codes[:, 0::2], codes[:, 1::2] = signed << 4 >> 4, signed >> 4
    return codes


def _row_chunks(matrix: Floats) -> Iterator[slice]:
    rows = max(1, _CHUNK_VALUES // matrix.shape[1])
    for begin in range(0, len(matrix), rows):
        yield slice(begin, begin + rows)


def _outputs_largest(matrix: Floats) -> Floats:
    parts = [_largest(matrix[rows]) for rows in _row_chunks(matrix)]
    return _require_finite(np.concatenate(parts))


def _largest(values: Floats) -> Floats:
    """Largest magnitude over the last axis; NaN where there is one."""
    return np.maximum(values.max(axis=-1), -values.min(axis=-1)).astype(np.float32)


def _require_finite(largest: Floats) -> Floats:
    if not np.isfinite(largest).all():
        raise CheckpointUnreadable(
            "A matrix holds a value that is not finite.",
            why="No FP8 or INT4 number is near to it.",
            fix="Download the checkpoint again; if its checksum is right, it is broken upstream.",
        )
    return largest


def _positive(scale: Floats) -> Floats:
    """TensorRT wants scales above zero. Where all is zero, or as good as that, it is 1."""
    return np.where(scale > _TINY, scale, np.float32(1)).astype(np.float32)


def _least_error(values: Floats, counts: Floats, shrinks: Floats) -> Floats:
    """The scale of each block, exact in bf16. (rows, blocks, block) and (blocks, block)."""
    largest = _require_finite(_largest(values))
    chosen, least = np.ones_like(largest), np.full_like(largest, np.inf)
    for shrink in shrinks:
        scale = bf16_to_float(bf16(_positive(largest * (shrink / np.float32(7)))))
        error = _int4_codes(values, scale)
        error *= scale[..., None]
        error -= values
        error = np.einsum("rbi,rbi,bi->rb", error, error, counts)
        better = error < least
        chosen, least = np.where(better, scale, chosen), np.where(better, error, least)
    return chosen


def _int4_codes(values: Floats, scale: Floats) -> Floats:
    codes = np.rint(values * (np.float32(1) / scale)[..., None])
    return np.clip(codes, -8, 7, out=codes)


def _e4m3_values() -> Floats:
    """The number of each code; NaN for two."""
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    size = np.where(exponent == 0, np.ldexp(mantissa, -9), np.ldexp(8.0 + mantissa, exponent - 10))
    size[code & 127 == 127] = np.nan
    return np.where(code < 128, size, -size).astype(np.float32)


_E4M3 = _e4m3_values()
