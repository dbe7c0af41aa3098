"""Before INT4: large inputs are made smaller and the columns they meet larger, in equal measure.

Inputs of a matrix differ by orders of magnitude, and what large ones are multiplied with is rounded
as coarsely as the rest of a block. So each column is multiplied by a power of its input's size, and
whatever makes the input is divided by it: the norm before q, k, v and before gate, up; the rows of
up before down; the rows of v before o. The decoder computes the same, and its rounding matters less
(AWQ, arXiv:2306.00978, section 3.2). The power is that of the least weighted error of the matrices.

SmolLM2-135M, weights in INT4 blocks of 128, the rest float32 (logit error; perplexity): rounded to
the nearest 1.14, +40 %; columns weighted in the choice of scales 0.91, +29 %; smoothed too 0.59,
+20 %. GPTQ reaches 0.55 and +15 %, but needs each input's covariance: 3 GB a layer of Qwen3-32B.
"""

from collections.abc import Iterator, Mapping

import numpy as np

from headrace.compile.calibration import InputFacts
from headrace.compile.tensorrt.weight_forms import Floats, int4_block, int4_blocks
from headrace.serving.domain.artifact import Decoder

POWERS = (0.0, 0.15, 0.3)
"""Tried for each group; of 0, 1/4, 1/2 and 3/4 the last two hardly ever won on SmolLM2-135M."""

_SMALLEST = 1e-6
"""Of an input, relative to the layer's mean: dead inputs do not make columns without bound."""

_GROUPS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "attention": (("attn_norm",), ("q", "k", "v")),
    "values": (("v", "v_bias"), ("o",)),
    "mlp": (("mlp_norm",), ("gate", "up")),
    "gated": (("up",), ("down",)),
}
"""Who makes an input, and which matrices are multiplied with it."""


class Smoothed(Mapping[str, Floats]):
    """The canonical tensors of a dense decoder, smoothed; each made when asked for."""

    def __init__(
        self, decoder: Decoder, tensors: Mapping[str, Floats], facts: Mapping[str, InputFacts]
    ) -> None:
        assert not decoder.experts, "a router reads mlp_norm's output too"
        self._decoder = decoder
        self._tensors = tensors
        self._facts = facts
        self._factors: dict[tuple[str, str], Floats] = {}

    def __getitem__(self, name: str) -> Floats:
        tensor = self._tensors[name]
        layer, _, part = name.rpartition(".")
        for group, (makers, readers) in _GROUPS.items():
            if not layer or part not in (*makers, *readers):
                continue
            factors = self._of(layer, group)
            if part in readers:
                tensor = tensor * factors
            if part in makers:
                made = self._made(group, factors)
                tensor = tensor / (made if tensor.ndim == 1 else made[:, None])
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def importance(self, name: str) -> Floats:
        """The mean square of the inputs (inputs,) that the smoothed matrix `name` meets."""
        layer, _, part = name.rpartition(".")
        group = next(group for group, (_, readers) in _GROUPS.items() if part in readers)
        return _smaller(self._facts[name].mean_square, self._of(layer, group))

    def _of(self, layer: str, group: str) -> Floats:
        """What the columns of a group's readers are multiplied by, (inputs,)."""
        if (found := self._factors.get((layer, group))) is None:
            found = self._factors[layer, group] = self._least_error(layer, group)
        return found

    def _least_error(self, layer: str, group: str) -> Floats:
        names = [f"{layer}.{part}" for part in _GROUPS[group][1]]
        mean_square = self._facts[names[0]].mean_square
        if (block := int4_block(len(mean_square))) is None:
            return np.ones_like(mean_square)
        matrices = [self._tensors[name] for name in names]
        tried = [self._factors_of(mean_square, power, group) for power in POWERS]
        errors = [
            sum(
                _error(matrix * factors, _smaller(mean_square, factors), block)
                for matrix in matrices
            )
            for factors in tried
        ]
        return tried[int(np.argmin(errors))]

    def _factors_of(self, mean_square: Floats, power: float, group: str) -> Floats:
        size = np.sqrt(mean_square)
        logs = power * np.log(np.maximum(size, _SMALLEST * max(float(size.mean()), _SMALLEST)))
        logs -= logs.mean()
        if group == "values":
            # One value head feeds several query heads' part of o: they share their factors.
            heads = logs.reshape(self._decoder.kv_heads, -1, self._decoder.head_dim)
            logs = np.broadcast_to(heads.mean(axis=1, keepdims=True), heads.shape).reshape(-1)
        return np.exp(logs).astype(np.float32)

    def _made(self, group: str, factors: Floats) -> Floats:
        """The factors of what a group's makers make."""
        if group != "values":
            return factors
        heads = factors.reshape(self._decoder.kv_heads, -1, self._decoder.head_dim)
        return heads[:, 0].reshape(-1)


def _smaller(mean_square: Floats, factors: Floats) -> Floats:
    """The mean square of inputs that were divided by their columns' factors."""
    return (mean_square / np.square(factors)).astype(np.float32)


def _error(matrix: Floats, importance: Floats, block: int) -> float:
    """The expected square of what INT4 changes in the product with the matrix."""
    form = int4_blocks(matrix, block=block, importance=importance)
    return float(np.einsum("oi,oi,i->", *(2 * [form.dequantised() - matrix]), importance))
