"""Each layer against ONNX's own reference: NVIDIA's parser says which layer an operator is.

An operator is parsed into a network by the library, computed here in float32, and compared with
`onnx.reference`, so that neither side was written by us. Every tensor on the way is held against
the shape and type that TensorRT infers.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import pytest
import tensorrt_rtx as trt
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from headrace.compile.tensorrt.interpreter import Interpreter

RANDOM = np.random.default_rng(3)


def normal(*shape: int) -> np.ndarray:
    return RANDOM.normal(size=shape).astype(np.float32)


def whole(*values: Any) -> np.ndarray:
    return np.array(values[0] if len(values) == 1 else values, np.int64)


def node(operator: str, *inputs: Any, **attributes: Any) -> Any:
    """An operator with its inputs: arrays are constants; the first is the network's input."""
    return pytest.param(operator, inputs, attributes, id=f"{operator} {attributes or ''}".strip())


A, B = normal(2, 3, 4), normal(2, 3, 4)
POSITIVE = np.abs(A) + 0.1
COUNTS, OTHERS = whole([[7, -7, 5]]).astype(np.int32), whole([[2, 2, -3]]).astype(np.int32)
TRUE = A > 0
ROWS = normal(2, 3, 4, 8)
CASES = [
    *(node(name, A, B) for name in ("Add", "Sub", "Mul", "Div", "Equal", "Greater", "Less")),
    *(node(name, A, normal(1, 3, 1)) for name in ("Max", "Min", "GreaterOrEqual")),
    node("Pow", POSITIVE, B),
    node("Div", COUNTS, OTHERS),
    node("Mod", COUNTS, OTHERS),
    *(node(name, TRUE, B > 0) for name in ("And", "Or", "Xor")),
    *(node(name, A) for name in ("Exp", "Abs", "Neg", "Sin", "Cos", "Ceil", "Floor", "Erf")),
    *(node(name, POSITIVE) for name in ("Log", "Sqrt", "Reciprocal")),
    *(node(name, A) for name in ("Sign", "Round", "IsNaN", "Relu", "Sigmoid", "Tanh")),
    *(node(name, A) for name in ("Softsign", "Identity", "Shape", "Gelu")),
    node("Gelu", A, approximate="tanh"),
    node("Not", TRUE),
    node("Clip", A, np.float32(-0.5), np.float32(0.5)),
    *(
        node(f"Reduce{name}", A, whole([0, 2]), keepdims=keeps)
        for name in ("Sum", "Max", "Min", "Mean")
        for keeps in (0, 1)
    ),
    node("ReduceProd", A, whole([1])),
    node("ReduceSum", COUNTS, whole([1])),
    node("Softmax", A, axis=1),
    node("TopK", A, whole([2]), axis=1),
    node("TopK", A, whole([2]), axis=2, largest=0),
    node("MatMul", A, normal(4, 5)),
    node("MatMul", A, normal(2, 4, 5)),
    node("MatMul", A, normal(4)),
    node("Gemm", normal(4, 3), normal(4, 5), normal(5), transA=1),
    node("Einsum", A, normal(2, 5, 4), equation="bij,bkj->bik"),
    node("Gather", A, whole([[2, 0], [1, 1]]), axis=1),
    node("GatherElements", A, whole([[[1, 0, 2, 1]], [[0, 0, 1, 2]]]), axis=1),
    node("GatherND", A, whole([[0, 1], [1, 2]])),
    node("GatherND", A, whole([[1], [2]]), batch_dims=1),
    node("ScatterElements", A, whole([[[1, 0, 2, 1]]]), normal(1, 1, 4), axis=1),
    node("ScatterND", A, whole([[0, 1], [1, 2]]), normal(2, 4)),
    node("Transpose", A, perm=[2, 0, 1]),
    node("Reshape", A, whole([0, -1, 2])),
    node("Reshape", A, whole([4, 6])),
    node("Expand", normal(2, 1, 4), whole([2, 3, 4])),
    node("Slice", A, whole([1]), whole([4]), whole([2]), whole([2])),
    node("Slice", A, whole([2, 3]), whole([-9, -9]), whole([1, 2]), whole([-1, -2])),
    node("Pad", A, whole([0, 1, 0, 1, 0, 2]), np.float32(0.5)),
    node("Concat", A, normal(2, 1, 4), axis=1),
    node("Where", TRUE, A, normal(1, 3, 1)),
    node("CumSum", A, np.int32(1)),
    node("CumSum", A, np.int32(2), exclusive=1, reverse=1),
    node("OneHot", whole([1, 0, 2]), whole(3), np.array([-1, 5], np.float32), axis=0),
    node("Squeeze", normal(1, 3, 1, 2), whole([0, -2])),
    node("Unsqueeze", A, whole([0, -1])),
    node("Cast", A * 3, to=TensorProto.INT32),
    node("Cast", COUNTS, to=TensorProto.FLOAT),
    node("LayerNormalization", A, normal(4), normal(4), epsilon=1e-3),
    node("RMSNormalization", A, normal(4), epsilon=1e-3),
    node("RotaryEmbedding", ROWS, normal(9, 4), normal(9, 4), whole([[0, 1, 2, 8], [4, 5, 6, 7]])),
    node(
        "RotaryEmbedding",
        ROWS,
        normal(2, 4, 2),
        normal(2, 4, 2),
        interleaved=1,
        rotary_embedding_dim=4,
    ),
    node("Attention", ROWS[:, :2], normal(2, 1, 5, 8), normal(2, 1, 5, 8), scale=0.3),
    node("Attention", ROWS, normal(2, 3, 4, 8), normal(2, 3, 4, 8), is_causal=1),
    node("Attention", ROWS, normal(2, 3, 4, 8), normal(2, 3, 4, 8), normal(2, 3, 4, 4) > -1),
    node("Attention", ROWS, normal(2, 3, 4, 8), normal(2, 3, 4, 8), normal(2, 1, 4, 4)),
    node("TensorScatter", normal(2, 3, 6, 4), normal(2, 3, 2, 4), whole([0, 4]), axis=2),
]

FIXED = {"RotaryEmbedding"}
"""Their constants must have the input's own first size, which is then not left open."""


def model_of(
    operator: str, inputs: tuple[Any, ...], attributes: Mapping[str, Any]
) -> onnx.ModelProto:
    names = [f"in_{index}" for index in range(len(inputs))]
    made = helper.make_node(operator, names, ["out"], **attributes)
    if operator == "TopK":
        made = helper.make_node(operator, names, ["out", "indices"], **attributes)
    outputs = [helper.make_empty_tensor_value_info(name) for name in made.output]
    graph = helper.make_graph(
        [made],
        "one operator",
        [
            helper.make_tensor_value_info(
                name,
                helper.np_dtype_to_tensor_dtype(value.dtype),
                value.shape if operator in FIXED else ["n", *value.shape[1:]],
            )
            for name, value in zip(names[:1], inputs[:1], strict=True)
        ],
        outputs,
        [
            onnx.numpy_helper.from_array(np.asarray(value), name)
            for name, value in zip(names[1:], inputs[1:], strict=True)
        ],
    )
    opset = [helper.make_opsetid("", 24)]
    return onnx.shape_inference.infer_shapes(helper.make_model(graph, opset_imports=opset))


@pytest.mark.parametrize(("operator", "inputs", "attributes"), CASES)
def test_a_layer_computes_what_onnx_says(
    operator: str, inputs: tuple[Any, ...], attributes: Mapping[str, Any]
) -> None:
    """Whatever layers NVIDIA's parser makes of it, and of a first dimension that is not known."""
    model = model_of(operator, inputs, attributes)
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, builder.logger)
    assert parser.parse(model.SerializeToString()), parser.get_error(0).desc()

    expected = ReferenceEvaluator(model).run(None, {"in_0": inputs[0]})
    computed = Interpreter(network, exact=True).run({"in_0": torch.tensor(inputs[0])})

    for ours, theirs in zip(computed.values(), expected, strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-5, atol=1e-5)
