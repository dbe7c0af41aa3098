"""Every weight form in real TensorRT-RTX builds: accepted, and kept in the bytes promised."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tensorrt_rtx as trt

from headrace.compile.tensorrt.weight_forms import (
    Fp8Form,
    Int4Form,
    fp8_scale,
    weight_form,
)
from headrace.compile.tensorrt.weight_layers import (
    Kept,
    add_activation_quantise,
    add_weight,
)
from headrace.serving.domain.artifact import Precision

INPUTS, OUTPUTS = 576, 1536
ROWS_MAX = 16


def held_bytes(kept: Mapping[str, np.ndarray]) -> int:
    return sum(array.nbytes for array in kept.values())


class Build:
    """A network of products with one bf16 input, built for Ada, which has FP8."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder
        self.network = builder.create_network(0)
        self.x = self.network.add_input("x", trt.DataType.BF16, (-1, INPUTS))
        self.kept: Kept = {}

    def multiplies(self, x: Any, name: str, form: Any) -> Any:
        weight = add_weight(self.network, trt, name, form, self.kept)
        none, transpose = trt.MatrixOperation.NONE, trt.MatrixOperation.TRANSPOSE
        return self.network.add_matrix_multiply(x, none, weight, transpose).get_output(0)

    def plan(self, y: Any) -> bytes:
        self.network.mark_output(y)
        config = self.builder.create_builder_config()
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.SM89, 0)
        profile = self.builder.create_optimization_profile()
        profile.set_shape("x", (1, INPUTS), (1, INPUTS), (ROWS_MAX, INPUTS))
        config.add_optimization_profile(profile)
        made = self.builder.build_serialized_network(self.network, config)
        assert made is not None
        return bytes(made)


@pytest.fixture(scope="module")
def builder() -> Any:
    return trt.Builder(trt.Logger(trt.Logger.ERROR))


def matrix(outputs: int = OUTPUTS, inputs: int = INPUTS) -> npt.NDArray[np.float32]:
    return np.random.default_rng(2).normal(0, 0.05, (outputs, inputs)).astype(np.float32)


@pytest.mark.parametrize("precision", [Precision.BF16, Precision.FP8, Precision.INT4])
def test_a_plan_keeps_weights_in_the_form_they_were_given_in(
    builder: Any, precision: Precision
) -> None:
    """TensorRT could unfold them into bf16, and the memory plan would be wrong by a factor."""
    build = Build(builder)
    y = build.multiplies(build.x, "layers.0.up", weight_form("layers.0.up", matrix(), precision))

    plan = build.plan(y)

    assert y.dtype == trt.DataType.BF16
    # A single product's code and names; a plan of a model has them once for hundreds of products.
    assert held_bytes(build.kept) < len(plan) < held_bytes(build.kept) + 70_000


def test_fp8_inputs_make_fp8_products(builder: Any) -> None:
    """Two matrices of one input become one product of FP8 by FP8, with one scale to absorb.

    TensorRT-RTX 1.7.1 writes its kernels into the plan as text: this reads it.
    """
    build = Build(builder)
    names = ("layers.0.gate", "layers.0.up")
    scale = fp8_scale(matrix())
    x = add_activation_quantise(build.network, trt, build.x, 0.02, "layers.0.mlp", build.kept)
    gate, up = (
        build.multiplies(x, name, weight_form(name, matrix() * factor, Precision.FP8, scale=scale))
        for name, factor in zip(names, (1, 0.5), strict=True)
    )
    both = build.network.add_elementwise(gate, up, trt.ElementWiseOperation.PROD)

    plan = build.plan(both.get_output(0))

    products = [line for line in plan.split(b"\n") if b"fully_connected={" in line]
    assert len(products) == 1, products
    assert b"runtime_fusion={" not in plan, "a fused cast would make it a bf16 product"
    assert held_bytes(build.kept) == 2 * INPUTS * OUTPUTS + 3 * 4


@pytest.mark.parametrize(
    ("outputs", "inputs"),
    [
        pytest.param(192, 576, id="k of SmolLM2, blocks of 64"),
        pytest.param(576, 1536, id="down of SmolLM2"),
        pytest.param(128, 896, id="k of Qwen2.5-0.5B"),
        pytest.param(96, 64, id="a small model"),
    ],
)
def test_odd_shapes_build(builder: Any, outputs: int, inputs: int) -> None:
    for precision in (Precision.FP8, Precision.INT4):
        build = Build(builder)
        build.x = build.multiplies(build.x, "in", weight_form("in", matrix(inputs), Precision.BF16))
        form = weight_form("q", matrix(outputs, inputs), precision)

        assert isinstance(form, Fp8Form | Int4Form)
        assert build.plan(build.multiplies(build.x, "q", form))


def test_constants_are_found_again_by_their_layers_names(builder: Any) -> None:
    """The CPU interpreter reads a network's numbers from what the builder kept."""
    build = Build(builder)
    form = weight_form("layers.0.q", matrix(), Precision.INT4)
    assert isinstance(form, Int4Form)
    build.multiplies(build.x, "layers.0.q", form)

    layers = [build.network.get_layer(index) for index in range(build.network.num_layers)]
    constants = {each.name: each for each in layers if each.type == trt.LayerType.CONSTANT}

    assert build.kept.keys() == constants.keys() == {"layers.0.q", "layers.0.q.scale"}
    codes = constants["layers.0.q"].get_output(0)
    assert (tuple(codes.shape), codes.dtype) == ((OUTPUTS, INPUTS), trt.DataType.INT4)
    np.testing.assert_array_equal(build.kept["layers.0.q"], form.packed)
