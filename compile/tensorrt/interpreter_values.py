"""Types and constants of a network as the interpreter holds them: torch tensors on the CPU.

In an exact run every floating-point type is float32, FP8 included: nothing is rounded but what
float32 itself rounds. Otherwise a tensor has the network's own type, and INT4 values, which torch
lacks, lie one in an int8.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from headrace.serving.errors import UnsupportedModel

Constants = Mapping[str, npt.NDArray[Any]]
"""Constant layer's name to its values as stored: what the bindings hide. BF16 as uint16, FP8 as
uint8 and INT4 as uint8, two in a byte, the earlier one in the low half."""

_TYPES: Mapping[str, torch.dtype] = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "FP8": torch.float8_e4m3fn,
    "INT4": torch.int8,
    "INT8": torch.int8,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "BOOL": torch.bool,
}


def torch_type(kind: Any, *, exact: bool) -> torch.dtype:
    """What holds a tensor of a trt.DataType.

    Raises:
        UnsupportedModel: FP4 and the other types that nothing here computes with.
    """
    if kind.name not in _TYPES:
        raise UnsupportedModel(
            f"A tensor of type {kind.name} cannot be computed on the CPU.",
            why=f"The interpreter knows {', '.join(_TYPES)}.",
            fix="Build without it, or verify the plan on a GPU.",
        )
    found = _TYPES[kind.name]
    return torch.float32 if exact and found.is_floating_point else found


def constant(layer: Any, constants: Constants, *, exact: bool) -> torch.Tensor:
    """The values of an IConstantLayer; a view of the builder's memory where the type allows.

    Raises:
        UnsupportedModel: its values are hidden by the bindings and not among `constants`.
    """
    kind, shape = layer.get_output(0).dtype, tuple(layer.shape)
    stored = layer.weights
    if not isinstance(stored, np.ndarray):
        if layer.name not in constants:
            raise UnsupportedModel(
                f"The constant {layer.name!r} of type {kind.name} cannot be read.",
                why="The bindings show float32, float16 and whole numbers only.",
                fix="Give its values to the interpreter, as `Network.constants` has them.",
            )
        stored = constants[layer.name]
    values = _typed(_view(stored), kind.name, shape)
    return values.float() if exact and values.is_floating_point() else values


def _view(stored: npt.NDArray[Any]) -> torch.Tensor:
    flat = np.ascontiguousarray(stored).reshape(-1)
    with warnings.catch_warnings():
        # Torch warns of memory that must not be written, as a mapped file is; nothing here does.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(flat)


def _typed(stored: torch.Tensor, kind: str, shape: Sequence[int]) -> torch.Tensor:
    if kind == "INT4":
        # Sign-extend both halves of each byte: shift up, then down again as a signed number.
        packed = stored.view(torch.int8)
        pairs = torch.stack((packed << 4 >> 4, packed >> 4), dim=-1).reshape(-1)
        return pairs[: int(np.prod(shape))].reshape(tuple(shape))
    wanted = _TYPES[kind]
    if stored.dtype != wanted:
        assert stored.element_size() == wanted.itemsize, f"{kind} held as {stored.dtype}"
        stored = stored.view(wanted)
    return stored.reshape(tuple(shape))
