"""Arithmetic layers on the CPU: what each computes, as TensorRT's documentation states it.

A function here takes a layer (its `Site`) once, before anything runs, and answers the function that
computes it; all that a layer's attributes decide is decided there. An attribute that is not
computed is refused by its name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.serving.errors import UnsupportedModel

Compute = Callable[..., Any]
"""Input tensors (None where an optional one is missing) to the output, or a tuple of outputs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One layer of the network, and how it is to be computed."""

    layer: Any
    """Of its own class, not ILayer."""
    kind: str
    """Its trt.LayerType."""
    exact: bool
    """Whether roundings of the network's types are left out."""
    types: tuple[torch.dtype, ...]
    """Of its outputs."""

    def refuse(self, what: str) -> UnsupportedModel:
        return UnsupportedModel(
            f"The layer {self.layer.name!r} ({self.kind}) has {what}.",
            why="The CPU interpreter does not compute that, and guesses nothing.",
            fix="Build without it, or verify the plan on a GPU.",
        )


def axes_of(mask: int) -> tuple[int, ...]:
    """Bits to dimension numbers."""
    return tuple(axis for axis in range(mask.bit_length()) if mask >> axis & 1)


def _divide(a: Tensor, b: Tensor) -> Tensor:
    # Whole numbers divide as in C, towards zero.
    return torch.div(a, b, rounding_mode=None if a.is_floating_point() else "trunc")


_ELEMENTWISE: Mapping[str, Compute] = {
    "SUM": torch.add,
    "PROD": torch.mul,
    "MAX": torch.maximum,
    "MIN": torch.minimum,
    "SUB": torch.sub,
    "DIV": _divide,
    "POW": torch.pow,
    "FLOOR_DIV": torch.floor_divide,
    "AND": torch.logical_and,
    "OR": torch.logical_or,
    "XOR": torch.logical_xor,
    "EQUAL": torch.eq,
    "GREATER": torch.gt,
    "LESS": torch.lt,
}
_UNARY: Mapping[str, Compute] = {
    "EXP": torch.exp,
    "LOG": torch.log,
    "SQRT": torch.sqrt,
    "RECIP": torch.reciprocal,
    "ABS": torch.abs,
    "NEG": torch.neg,
    "SIN": torch.sin,
    "COS": torch.cos,
    "CEIL": torch.ceil,
    "FLOOR": torch.floor,
    "ERF": torch.erf,
    "NOT": torch.logical_not,
    "SIGN": torch.sign,
    "ROUND": torch.round,
    "ISINF": torch.isinf,
    "ISNAN": torch.isnan,
}
_ACTIVATION: Mapping[str, Compute] = {
    "RELU": torch.relu,
    "SIGMOID": torch.sigmoid,
    "TANH": torch.tanh,
    "SOFTSIGN": F.softsign,
    "GELU_ERF": F.gelu,
    "GELU_TANH": lambda x: F.gelu(x, approximate="tanh"),
}


def _named(site: Site, table: Mapping[str, Compute], operation: Any) -> Compute:
    if operation.name not in table:
        raise site.refuse(f"the operation {operation.name}")
    return table[operation.name]


def elementwise(site: Site) -> Compute:
    return _named(site, _ELEMENTWISE, site.layer.op)


def unary(site: Site) -> Compute:
    return _named(site, _UNARY, site.layer.op)


def activation(site: Site) -> Compute:
    if site.layer.type.name == "CLIP":
        low, high = site.layer.alpha, site.layer.beta
        return lambda x: x.clamp(low, high)
    return _named(site, _ACTIVATION, site.layer.type)


def cast(site: Site) -> Compute:
    (wanted,) = site.types
    return lambda x: x.to(wanted)


def identity(site: Site) -> Compute:
    del site
    return lambda x: x


def reduce(site: Site) -> Compute:
    axes, keeps, operation = axes_of(site.layer.axes), site.layer.keep_dims, site.layer.op.name
    (wanted,) = site.types
    match operation:
        case "SUM":
            return lambda x: torch.sum(x, axes, keepdim=keeps, dtype=wanted)
        case "AVG" if wanted.is_floating_point:
            return lambda x: torch.mean(x, axes, keepdim=keeps)
        case "MAX":
            return lambda x: torch.amax(x, axes, keepdim=keeps)
        case "MIN":
            return lambda x: torch.amin(x, axes, keepdim=keeps)
        case "PROD" if len(axes) == 1:
            return lambda x: torch.prod(x, axes[0], keepdim=keeps, dtype=wanted)
        case _:
            raise site.refuse(f"the reduction {operation} of {wanted} over axes {axes}")


def softmax(site: Site) -> Compute:
    (axis,) = axes_of(site.layer.axes)
    return lambda x: torch.softmax(x, axis)


def top_k(site: Site) -> Compute:
    (axis,) = axes_of(site.layer.axes)
    largest, stated, index_type = site.layer.op.name == "MAX", site.layer.k, site.types[1]

    def compute(x: Tensor, count: Tensor | None = None) -> tuple[Tensor, Tensor]:
        size = stated if count is None else int(count)
        # Sorted stably, so that of equal values the first counts: the same on every run.
        values, indices = torch.sort(x, dim=axis, descending=largest, stable=True)
        return values.narrow(axis, 0, size), indices.narrow(axis, 0, size).to(index_type)

    return compute


def matrix_multiply(site: Site) -> Compute:
    first, second = site.layer.op0.name, site.layer.op1.name

    def compute(a: Tensor, b: Tensor) -> Tensor:
        if first != "NONE":
            a = a.unsqueeze(-2) if first == "VECTOR" else a.transpose(-1, -2)
        if second != "NONE":
            b = b.unsqueeze(-1) if second == "VECTOR" else b.transpose(-1, -2)
        # One matrix for the whole batch: a product of two matrices, instead of one for each row.
        if b.ndim > 2 and b.shape[:-2].numel() == 1:
            b = b.reshape(b.shape[-2:])
        out = torch.matmul(a, b)
        if second == "VECTOR":
            out = out.squeeze(-1)
        if first == "VECTOR":
            out = out.squeeze(-1 if second == "VECTOR" else -2)
        return out

    return compute


def einsum(site: Site) -> Compute:
    equation = site.layer.equation
    return lambda *inputs: torch.einsum(equation, *inputs)


def select(site: Site) -> Compute:
    del site
    return torch.where


def cumulative(site: Site) -> Compute:
    if site.layer.op.name != "SUM":
        raise site.refuse(f"the operation {site.layer.op.name}")
    exclusive, reverse = site.layer.exclusive, site.layer.reverse
    (wanted,) = site.types

    def compute(x: Tensor, axis: Tensor) -> Tensor:
        along = int(axis)
        source = x.flip(along) if reverse else x
        total = torch.cumsum(source, along, dtype=wanted)
        if exclusive:
            # What stands before each: the sums, one place later.
            total = torch.cat((torch.zeros_like(total.narrow(along, 0, 1)), total), along)
            total = total.narrow(along, 0, source.shape[along])
        return total.flip(along) if reverse else total

    return compute


def normalization(site: Site) -> Compute:
    """(x - mean) / sqrt(variance + epsilon) * scale + bias, in float32, rounded once."""
    layer = site.layer
    if layer.num_groups != 1:
        raise site.refuse(f"{layer.num_groups} groups")
    axes, epsilon, (wanted,) = axes_of(layer.axes), layer.epsilon, site.types

    def compute(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        wide = x.float()
        variance, mean = torch.var_mean(wide, axes, correction=0, keepdim=True)
        normed = (wide - mean) * torch.rsqrt(variance + epsilon)
        return (normed * scale.float() + bias.float()).to(wanted)

    return compute


_RANGES: Mapping[str, tuple[float, float]] = {"INT8": (-128, 127), "INT4": (-8, 7)}
_FP8_MAX = 448.0
"""The largest E4M3 number; what is larger saturates."""


def spread(scale: Tensor, x: Tensor, axis: int) -> Tensor:
    """A scale made to multiply `x`: one for all, one for each index of an axis, or one a block.

    A block's size along a dimension is the quotient of both sizes there.
    """
    if scale.numel() == 1:
        return scale.reshape(())
    if scale.ndim == 1 and x.ndim != 1:
        shape = [1] * x.ndim
        shape[axis] = -1
        return scale.reshape(shape)
    for dim, (whole, blocks) in enumerate(zip(x.shape, scale.shape, strict=True)):
        assert whole % blocks == 0, f"{whole} values in {blocks} blocks"
        if blocks not in (1, whole):
            scale = scale.repeat_interleave(whole // blocks, dim)
    return scale


def quantize(site: Site) -> Compute:
    """Round(x / scale) to the type's range; in an exact run the quotient itself."""
    if site.layer.num_inputs > 2 and site.layer.get_input(2) is not None:
        raise site.refuse("a zero point")
    kind, axis = site.layer.get_output(0).dtype.name, site.layer.axis
    if kind not in {*_RANGES, "FP8"}:
        raise site.refuse(f"the type {kind}")

    def compute(x: Tensor, scale: Tensor, zero: None = None) -> Tensor:
        del zero
        quotient = x.float() / spread(scale.float(), x, axis)
        if site.exact:
            return quotient
        if kind == "FP8":
            return quotient.clamp(-_FP8_MAX, _FP8_MAX).to(torch.float8_e4m3fn)
        return quotient.round().clamp(*_RANGES[kind]).to(torch.int8)

    return compute


def dequantize(site: Site) -> Compute:
    if site.layer.num_inputs > 2 and site.layer.get_input(2) is not None:
        raise site.refuse("a zero point")
    axis, (wanted,) = site.layer.axis, site.types

    def compute(x: Tensor, scale: Tensor, zero: None = None) -> Tensor:
        del zero
        return (x.float() * spread(scale.float(), x, axis)).to(wanted)

    return compute


ARITHMETIC: Mapping[str, Callable[[Site], Compute]] = {
    "ACTIVATION": activation,
    "CAST": cast,
    "CUMULATIVE": cumulative,
    "DEQUANTIZE": dequantize,
    "EINSUM": einsum,
    "ELEMENTWISE": elementwise,
    "IDENTITY": identity,
    "MATRIX_MULTIPLY": matrix_multiply,
    "NORMALIZATION": normalization,
    "QUANTIZE": quantize,
    "REDUCE": reduce,
    "SELECT": select,
    "SOFTMAX": softmax,
    "TOPK": top_k,
    "UNARY": unary,
}
