"""The layers that bring a matrix into a network: a constant, and for FP8 and INT4 a dequantise.

One recipe for every form: `y = x * add_weight(...)^T`, that is
`add_matrix_multiply(x, NONE, weight, TRANSPOSE)`. Where the input is calibrated, `x` passes through
`add_activation_quantise` first; matrices of one input share those layers and one `fp8_scale`.

What TensorRT-RTX 1.7.1 makes of it for SM89, read from the plans of products of (2048, 1024) and of
an MLP. No GPU was at hand: this is which kernels it chooses, not how fast they are.

    form                 plan bytes a weight   kernels
    bf16                 2.00                  the product
    FP8                  1.00                  one: cast, scale and product are fused
    INT4, blocks of 128  0.516                 one: unpack, scale and product are fused
    FP8 of an FP8 input  1.00                  quantise; FP8 product, which absorbs the scales

Nothing is unfolded into bf16 constants. The last merges matrices of one input into one product, and
quantises the next input in the kernel before it; with a scale for each output, or one for each
matrix, another kernel scales the result. Beside its weights a plan has some 11 KB, 2 to 5 KB a
product and the code of its kernels, 0.15 MB for the first of a kind. SM80 and SM86 refuse FP8.
INT4's scales must have the output's type, bf16; (outputs, inputs) and its transpose both build, and
the scale's shape says the block: no axis and no `block_shape`.
"""

from collections.abc import MutableMapping
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.compile.tensorrt.weight_forms import Bf16Form, Fp8Form, WeightForm

Array = npt.NDArray[np.generic]
Kept = MutableMapping[str, Array]
"""Constant layer's name to its bits. TensorRT keeps pointers, so that whoever builds the network
holds this until the plan is made; an INT4 constant has half as many bytes as its shape says."""


def add_weight(network: Any, trt: Any, name: str, form: WeightForm, kept: Kept) -> Any:
    """Add a matrix and answer it as a bf16 tensor (outputs, inputs).

    Args:
        network: an INetworkDefinition.
        trt: the module `tensorrt` or `tensorrt_rtx`.
        name: of the constant layer; its scale is `{name}.scale`, and `{name}.dequantise` follows.
        form: what the network is to hold.
        kept: gets the constants' arrays.
    """
    types = trt.DataType
    if isinstance(form, Bf16Form):
        return add_constant(network, trt, name, form.bits, types.BF16, form.bits.shape, kept)
    if isinstance(form, Fp8Form):
        codes = add_constant(network, trt, name, form.codes, types.FP8, form.codes.shape, kept)
        scale_type, scale = types.FLOAT, form.scale
    else:
        outputs, half = form.packed.shape
        shape = (outputs, 2 * half)
        codes = add_constant(network, trt, name, form.packed, types.INT4, shape, kept)
        scale_type, scale = types.BF16, form.scale
    scales = add_constant(network, trt, f"{name}.scale", scale, scale_type, scale.shape, kept)
    layer = network.add_dequantize(codes, scales, types.BF16)
    layer.name = f"{name}.dequantise"
    if scale.ndim == 1:
        layer.axis = 0
    return layer.get_output(0)


def add_activation_quantise(
    network: Any, trt: Any, x: Any, scale: float, name: str, kept: Kept
) -> Any:
    """Round a bf16 tensor to FP8 and back; a product of it with an FP8 weight becomes an FP8 one.

    Args:
        network: an INetworkDefinition.
        trt: the module `tensorrt` or `tensorrt_rtx`.
        x: the tensor, of any shape.
        scale: of the whole tensor, from calibration; what lies beyond 448 of it is cut off.
        name: prefix of the layers `.input_scale`, `.quantise` and `.dequantise_input`.
        kept: gets the scale.
    """
    types = trt.DataType
    value = np.array(scale, np.float32)
    held = add_constant(network, trt, f"{name}.input_scale", value, types.FLOAT, (), kept)
    rounded = network.add_quantize(x, held, types.FP8)
    rounded.name = f"{name}.quantise"
    back = network.add_dequantize(rounded.get_output(0), held, types.BF16)
    back.name = f"{name}.dequantise_input"
    return back.get_output(0)


def add_constant(
    network: Any,
    trt: Any,
    name: str,
    bits: Array,
    dtype: Any,
    shape: tuple[int, ...],
    kept: Kept,
) -> Any:
    """Add `bits` as a constant of a TensorRT type, which numpy may not have, and a shape."""
    assert name not in kept, name
    kept[name] = bits = np.ascontiguousarray(bits).reshape(bits.shape)
    count = int(np.prod(shape))
    layer = network.add_constant(shape, trt.Weights(dtype, bits.ctypes.data, count))
    layer.name = name
    return layer.get_output(0)
