"""Writing an INetworkDefinition: the operations that decoders are made of, one method each.

TensorRT and TensorRT-RTX share this API, so the library's module is an argument and nothing here
imports it. A layer that the library refuses is an error here, with the layer's name; the bindings
answer None and go on.
"""

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.serving.errors import UnsupportedModel

Tensor = Any
"""An ITensor of either library."""

DYNAMIC = -1


class Network:
    """Builds one network. Keeps the constants' memory, which TensorRT reads when it builds."""

    def __init__(self, trt: Any, definition: Any) -> None:
        self.trt = trt
        self.definition = definition
        self.constants: dict[str, npt.NDArray[Any]] = {}
        """Constant layer's name to its values as stored; bf16 as uint16, FP8 and INT4 as uint8."""

    # Inputs, outputs and constants.

    def input(self, name: str, dtype: str, shape: Sequence[int]) -> Tensor:
        """Add an input; -1 in its shape is decided by the profile."""
        found = self.definition.add_input(name, self.dtype(dtype), tuple(shape))
        return self._made(found, f"input {name}")

    def output(self, tensor: Tensor, name: str, dtype: str) -> None:
        tensor = self.cast(tensor, dtype, name=f"{name}.as_{dtype}")
        tensor.name = name
        self.definition.mark_output(tensor)

    def constant(self, name: str, values: npt.NDArray[Any], dtype: str | None = None) -> Tensor:
        """Add a constant.

        Args:
            name: of the layer; each once.
            values: C-contiguous; kept alive until the network is dropped.
            dtype: "bf16", "fp8" or "int4" where `values` are bit patterns; None takes numpy's.
        """
        assert name not in self.constants, name
        stored = np.ascontiguousarray(values).reshape(values.shape)  # 0-d stays 0-d
        self.constants[name] = stored
        kind = self.dtype(dtype or stored.dtype.name)
        weights = self.trt.Weights(kind, stored.ctypes.data, stored.size)
        layer = self._made(self.definition.add_constant(stored.shape, weights), name)
        layer.name = name
        return layer.get_output(0)

    def mark_refittable(self) -> None:
        """Allow the model's weights to be replaced in the built plan, under their layers' names.

        Not sizes and tables: what computes a shape may not change.

        Raises:
            UnsupportedModel: the library does not know one of them.
        """
        held = [self.dtype(name) for name in ("bf16", "fp8", "int4")]
        for index in range(self.definition.num_layers):
            layer = self.definition.get_layer(index)
            if layer.type != self.trt.LayerType.CONSTANT:
                continue
            made = layer.get_output(0)
            if made.dtype not in held and not layer.name.endswith(".scale"):
                continue
            values, count = self.constants[layer.name], math.prod(made.shape)
            weights = self.trt.Weights(made.dtype, values.ctypes.data, count)
            named = self.definition.set_weights_name(weights, layer.name)
            self._made(named and self.definition.mark_weights_refittable(layer.name), layer.name)

    def dtype(self, name: str) -> Any:
        kinds = {
            "float32": "FLOAT",
            "bf16": "BF16",
            "fp8": "FP8",
            "int4": "INT4",
            "int32": "INT32",
            "int64": "INT64",
            "bool": "BOOL",
        }
        return getattr(self.trt.DataType, kinds[name])

    # Element by element.

    def cast(self, x: Tensor, dtype: str, *, name: str) -> Tensor:
        if x.dtype == self.dtype(dtype):
            return x
        return self._only(self.definition.add_cast(x, self.dtype(dtype)), name)

    def elementwise(self, a: Tensor, b: Tensor, operation: str, *, name: str) -> Tensor:
        """Apply an operation by its name in trt.ElementWiseOperation: SUM, PROD, SUB, LESS."""
        kind = getattr(self.trt.ElementWiseOperation, operation)
        return self._only(self.definition.add_elementwise(a, b, kind), name)

    def add(self, a: Tensor, b: Tensor, *, name: str) -> Tensor:
        return self.elementwise(a, b, "SUM", name=name)

    def multiply(self, a: Tensor, b: Tensor, *, name: str) -> Tensor:
        return self.elementwise(a, b, "PROD", name=name)

    def unary(self, x: Tensor, operation: str, *, name: str) -> Tensor:
        kind = getattr(self.trt.UnaryOperation, operation)
        return self._only(self.definition.add_unary(x, kind), name)

    def silu(self, x: Tensor, *, name: str) -> Tensor:
        """Multiply x by sigmoid(x)."""
        sigmoid = self._only(
            self.definition.add_activation(x, self.trt.ActivationType.SIGMOID), f"{name}.sigmoid"
        )
        return self.multiply(x, sigmoid, name=name)

    def rms_norm(self, x: Tensor, weight: Tensor, *, eps: float, name: str) -> Tensor:
        """RMS norm over the last axis, in float32; `weight` is bf16 and of x's rank.

        Neither library has a layer for it; this is the spelling that their own ONNX parser emits
        for RMSNormalization, which the builder fuses.
        """
        wide = self.cast(x, "float32", name=f"{name}.wide")
        square = self.multiply(wide, wide, name=f"{name}.square")
        mean = self.reduce(square, "AVG", axis=len(x.shape) - 1, name=f"{name}.mean")
        small = self.scalar(eps, rank=len(x.shape), name=f"{name}.eps")
        root = self.unary(self.add(mean, small, name=f"{name}.floor"), "SQRT", name=f"{name}.root")
        normed = self.elementwise(wide, root, "DIV", name=f"{name}.normed")
        narrow = self.cast(normed, "bf16", name=f"{name}.narrow")
        return self.multiply(narrow, weight, name=name)

    def scalar(self, value: float, *, rank: int, name: str, dtype: str = "float32") -> Tensor:
        """A constant that broadcasts against a tensor of this rank."""
        return self.constant(name, np.full((1,) * rank, value, np.dtype(dtype)))

    # Sums, products, choices.

    def reduce(
        self, x: Tensor, operation: str, *, axis: int, name: str, keeps: bool = True
    ) -> Tensor:
        kind = getattr(self.trt.ReduceOperation, operation)
        return self._only(self.definition.add_reduce(x, kind, 1 << axis, keeps), name)

    def matmul(self, x: Tensor, weight: Tensor, *, name: str, transposed: bool = True) -> Tensor:
        """Multiply x [.., M, in] by [.., out, in], or by [.., in, out] where not `transposed`."""
        none, turned = self.trt.MatrixOperation.NONE, self.trt.MatrixOperation.TRANSPOSE
        layer = self.definition.add_matrix_multiply(x, none, weight, turned if transposed else none)
        return self._only(layer, name)

    def softmax(self, x: Tensor, *, axis: int, name: str) -> Tensor:
        layer = self._made(self.definition.add_softmax(x), name)
        layer.axes = 1 << axis
        return self._only(layer, name)

    def top(self, x: Tensor, count: int, *, axis: int, name: str) -> tuple[Tensor, Tensor]:
        """The largest values along an axis and their indices (int32)."""
        layer = self.definition.add_topk(x, self.trt.TopKOperation.MAX, count, 1 << axis)
        layer = self._made(layer, name)
        layer.name = name
        return layer.get_output(0), layer.get_output(1)

    def one_hot(self, indices: Tensor, depth: int, *, name: str) -> Tensor:
        """[.., depth] float32, one where the index is."""
        values = self.constant(f"{name}.values", np.array([0, 1], np.float32))
        size = self.constant(f"{name}.depth", np.array(depth, np.int32))
        return self._only(self.definition.add_one_hot(indices, values, size, -1), name)

    def gather(self, data: Tensor, indices: Tensor, *, axis: int, name: str) -> Tensor:
        return self._only(self.definition.add_gather(data, indices, axis), name)

    def select(self, condition: Tensor, then: Tensor, otherwise: Tensor, *, name: str) -> Tensor:
        return self._only(self.definition.add_select(condition, then, otherwise), name)

    def concatenate(self, tensors: Sequence[Tensor], *, axis: int, name: str) -> Tensor:
        layer = self._made(self.definition.add_concatenation(list(tensors)), name)
        layer.axis = axis
        return self._only(layer, name)

    # Shapes.

    def shape(self, x: Tensor, *, name: str) -> Tensor:
        """The sizes of x, int64."""
        return self._only(self.definition.add_shape(x), name)

    def reshape(
        self,
        x: Tensor,
        sizes: Sequence[int] | Tensor,
        *,
        name: str,
        before: Sequence[int] | None = None,
        after: Sequence[int] | None = None,
    ) -> Tensor:
        """Permute by `before`, reshape, permute by `after`.

        `sizes` are numbers, of which one may be -1, or a tensor that holds them.
        """
        layer = self._made(self.definition.add_shuffle(x), name)
        layer.zero_is_placeholder = False
        if before is not None:
            layer.first_transpose = tuple(before)
        if isinstance(sizes, Sequence):
            layer.reshape_dims = tuple(sizes)
        else:
            layer.set_input(1, sizes)
        if after is not None:
            layer.second_transpose = tuple(after)
        return self._only(layer, name)

    # What the library has layers of its own for.

    def rope(
        self, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, *, width: int, name: str
    ) -> Tensor:
        """Turn pairs (i, i + H/2) of x [B, N, T, H] by tables [places, H/2] at `positions` [B, T].

        `width` is H: the whole head turns.
        """
        interleaved = False
        layer = self.definition.add_rotary_embedding(x, cos, sin, interleaved, width)
        layer = self._made(layer, name)
        layer.set_input(3, positions)
        return self._only(layer, name)

    def kv_update(self, cache: Tensor, fresh: Tensor, at: Tensor, *, name: str) -> Tensor:
        """Write `fresh` [B, K, T, H] into `cache` [B, K, S, H] from each row's place `at` [B]."""
        mode = self.trt.KVCacheMode.LINEAR
        return self._only(self.definition.add_kv_cache_update(cache, fresh, at, mode), name)

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, kv_lengths: Tensor, *, name: str
    ) -> Tensor:
        """Causal attention of queries [B, N, T, H] over caches [B, K, S, H].

        Row b's first kv_lengths[b] places count; its last query sees them all, each earlier one a
        place fewer.

        The build fails where no fused kernel serves it: `decomposable` stays False.
        """
        trt = self.trt
        layer = self.definition.add_attention_v2(
            query,
            key,
            value,
            trt.AttentionNormalizationOp.SOFTMAX,
            trt.CausalMaskKind.LOWER_RIGHT,
        )
        layer = self._made(layer, name)
        layer.name = name
        layer.decomposable = False
        layer.key_value_lengths = kv_lengths
        return layer.get_output(0)

    def collective(
        self, x: Tensor, operation: str, ranks: Sequence[int], *, name: str, reduces: bool = False
    ) -> Tensor:
        """ALL_REDUCE (a sum), ALL_GATHER or ALL_TO_ALL, along axis 0.

        `ranks` are those of the stage's communicator that take part. The layer tells nobody what it
        does, so its metadata does: the inspection and the interpreter read that.
        """
        trt = self.trt
        reduction = trt.ReduceOperation.SUM if reduces else trt.ReduceOperation.NONE
        kind = getattr(trt.CollectiveOperation, operation)
        group = np.array(ranks, np.int64)
        layer = self.definition.add_dist_collective(x, kind, reduction, -1, group)
        layer = self._made(layer, name)
        layer.num_ranks = len(ranks)
        layer.metadata = json.dumps({"collective": operation, "ranks": list(ranks)})
        return self._only(layer, name)

    def _only(self, layer: Any, name: str) -> Tensor:
        layer = self._made(layer, name)
        layer.name = name
        return layer.get_output(0)

    def _made(self, made: Any, name: str) -> Any:
        if made is None or made is False:
            raise UnsupportedModel(
                f"TensorRT refused the layer {name!r}.",
                why="Its build log says what it did not accept.",
                fix="Report the model with that log: the network is written wrongly for it.",
            )
        return made
