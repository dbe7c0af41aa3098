"""What a network computes on the CPU where ONNX has no word for it, and what is refused."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import tensorrt_rtx as trt
import torch
from torch import Tensor

from headrace.compile.tensorrt.interpreter import Interpreter
from headrace.compile.tensorrt.network import Network
from headrace.serving.errors import UnsupportedModel

INT = torch.int32


class Small(Network):
    """A network of a few layers, and what it computes."""

    def __init__(self) -> None:
        # The builder must outlive its network.
        self.builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
        super().__init__(trt, self.builder.create_network(0))

    def marked(self, *tensors: Any) -> "Small":
        for index, tensor in enumerate(tensors):
            tensor.name = f"out{index}"
            self.definition.mark_output(tensor)
        return self

    def made(self, layer: Any) -> "Small":
        return self.marked(layer.get_output(0))

    def computes(self, *, exact: bool = False, **inputs: Tensor) -> Tensor:
        found = Interpreter(self.definition, exact=exact, constants=self.constants).run(inputs)
        return found["out0"]


def bits(values: Sequence[float]) -> np.ndarray:
    return torch.tensor(values).bfloat16().view(torch.uint16).numpy()


def test_each_layer_rounds_to_the_networks_type() -> None:
    """256 + 1 is 256 in bf16, which has eight bits, so that the difference is lost; in an exact
    run it is not.
    """
    net = Small()
    x = net.input("x", "bf16", (1,))
    one = net.constant("one", bits([1.0]), "bf16")
    net.marked(net.elementwise(net.add(x, one, name="sum"), x, "SUB", name="difference"))

    assert net.computes(x=torch.tensor([256.0]).bfloat16()).tolist() == [0.0]
    assert net.computes(x=torch.tensor([256.0]), exact=True).tolist() == [1.0]


def test_a_constant_that_the_bindings_hide_must_be_given() -> None:
    net = Small()
    net.marked(net.constant("weights", bits([1.0, -2.5]), "bf16"))

    assert net.computes().tolist() == [1.0, -2.5]
    with pytest.raises(UnsupportedModel, match="'weights' of type BF16 cannot be read"):
        Interpreter(net.definition, exact=True)


def test_four_bit_weights_are_unpacked_low_half_first() -> None:
    """Two blocks of two rows; bytes 0x81 and so on hold (1, -8), (2, 7), (-1, 0), (3, -3)."""
    net = Small()
    packed = np.array([0x81, 0x72, 0x0F, 0xD3], np.uint8)
    weights = trt.Weights(trt.DataType.INT4, packed.ctypes.data, 8)
    layer = net.definition.add_constant((4, 2), weights)
    layer.name, net.constants["packed"] = "packed", packed
    scale = net.constant("scale", np.array([[1, 10], [100, 1000]], np.float32))
    dequantised = net.definition.add_dequantize(layer.get_output(0), scale, trt.float32)
    dequantised.block_shape = (2, 1)
    net.made(dequantised)

    assert net.computes().tolist() == [[1, -80], [2, 70], [-100, 0], [300, -3000]]


def test_eight_bit_floats_saturate_and_round_to_three_bits() -> None:
    """E4M3 ends at 448, and has 16, 18, 20 between 16 and 20; 17 and 19 lie halfway: to even."""
    net = Small()
    x = net.input("x", "float32", (5,))
    scale = net.constant("scale", np.array(2, np.float32))
    quantised = net.definition.add_quantize(x, scale, trt.DataType.FP8).get_output(0)
    net.made(net.definition.add_dequantize(quantised, scale, trt.float32))
    given = torch.tensor([2000.0, -2000.0, 34.0, 38.0, 36.0])

    assert net.computes(x=given).tolist() == [896, -896, 32, 40, 36]
    assert net.computes(x=given, exact=True).tolist() == given.tolist()


def test_a_scale_may_be_an_axis_own() -> None:
    net = Small()
    x = net.input("x", "float32", (2, 2))
    scale = net.constant("scale", np.array([1, 10], np.float32))
    quantised = net.definition.add_quantize(x, scale, trt.DataType.INT8)
    quantised.axis = 0
    dequantised = net.definition.add_dequantize(quantised.get_output(0), scale, trt.float32)
    dequantised.axis = 0
    net.made(dequantised)

    assert net.computes(x=torch.tensor([[1.4, 300], [14, -9999]])).tolist() == [
        [1, 127],
        [10, -1280],
    ]


def attending(*, causal: str, keys: int, lengths: bool = True) -> Small:
    """Two heads over one KV head, and keys that are all alike: the mean of the values seen."""
    net = Small()
    q = net.input("q", "float32", (-1, 2, -1, 4))
    k = net.input("k", "float32", (-1, 1, keys, 4))
    v = net.input("v", "float32", (-1, 1, keys, 4))
    attention = net.definition.add_attention_v2(
        q, k, v, trt.AttentionNormalizationOp.SOFTMAX, getattr(trt.CausalMaskKind, causal)
    )
    if lengths:
        attention.key_value_lengths = net.input("lengths", "int32", (-1,))
    return net.marked(attention.get_output(0))


@pytest.mark.parametrize(
    ("causal", "seen"),
    [
        # Row 0 has 5 places, row 1 has 3; the values of places are 0, 1, 2, ...
        ("LOWER_RIGHT", [[1.5, 2], [0.5, 1]]),
        ("UPPER_LEFT", [[0, 0.5], [0, 0.5]]),
        ("NONE", [[2, 2], [1, 1]]),
    ],
)
def test_a_query_sees_the_places_before_its_own(causal: str, seen: list[list[float]]) -> None:
    """The last query is at the last place that counts, not at the end of the cache."""
    places = torch.arange(8.0).reshape(1, 1, 8, 1).expand(2, 1, 8, 4)
    found = attending(causal=causal, keys=8).computes(
        q=torch.zeros(2, 2, 2, 4),
        k=torch.zeros(2, 1, 8, 4),
        v=places,
        lengths=torch.tensor([5, 3], dtype=INT),
    )

    assert found[:, 0, :, 0].tolist() == found[:, 1, :, 3].tolist()
    assert torch.allclose(found[:, 0, :, 0], torch.tensor(seen, dtype=torch.float32))


def test_scores_are_not_scaled() -> None:
    """Scaling is the caller's: scores of ln 3 and 0 weigh 3 to 1."""
    k = torch.zeros(1, 1, 2, 4)
    k[0, 0, 0] = np.log(3) / 4
    v = torch.tensor([1.0, 0.0]).reshape(1, 1, 2, 1).expand(1, 1, 2, 4)
    net = attending(causal="NONE", keys=2, lengths=False)

    found = net.computes(q=torch.ones(1, 2, 1, 4), k=k, v=v)

    assert torch.allclose(found, torch.tensor(0.75))


def caching() -> Small:
    net = Small()
    cache = net.input("cache", "bf16", (-1, 1, 4, 2))
    fresh = net.input("fresh", "bf16", (-1, 1, -1, 2))
    at = net.input("at", "int32", (-1,))
    return net.marked(net.kv_update(cache, fresh, at, name="update"))


def test_a_cache_is_written_in_place() -> None:
    """As on a device, where input and output are one memory."""
    cache = torch.zeros(2, 1, 4, 2, dtype=torch.bfloat16)
    fresh = torch.ones(2, 1, 2, 2, dtype=torch.bfloat16)

    held = caching().computes(cache=cache, fresh=fresh, at=torch.tensor([0, 2], dtype=INT))

    assert held is cache
    assert cache[:, 0, :, 0].tolist() == [[1, 1, 0, 0], [0, 0, 1, 1]]


def test_a_write_behind_the_cache_is_an_error() -> None:
    fresh = torch.ones(1, 1, 2, 2, dtype=torch.bfloat16)
    cache = torch.zeros(1, 1, 4, 2, dtype=torch.bfloat16)

    with pytest.raises(IndexError, match=r"2 tokens at \[3\] into 4 places"):
        caching().computes(cache=cache, fresh=fresh, at=torch.tensor([3], dtype=INT))


def test_an_index_outside_a_table_is_an_error() -> None:
    net = Small()
    ids = net.input("ids", "int32", (-1,))
    net.marked(net.gather(net.constant("table", np.ones((3, 2), np.float32)), ids, axis=0, name=""))

    with pytest.raises(IndexError, match="1 to 3 into 3 places"):
        net.computes(ids=torch.tensor([1, 3], dtype=INT))


def test_vectors_multiply_as_vectors() -> None:
    net = Small()
    x = net.input("x", "float32", (-1, 3))
    y = net.input("y", "float32", (-1, 3))
    vector = trt.MatrixOperation.VECTOR
    net.made(net.definition.add_matrix_multiply(x, vector, y, vector))

    x, y = torch.arange(6.0).reshape(2, 3), torch.ones(2, 3)

    assert net.computes(x=x, y=y).tolist() == [3, 12]


def test_a_shuffle_transposes_reshapes_and_transposes() -> None:
    """[2, 3, 4] to [4, 3, 2] to [4, 6] (0 copies the 4) to [6, 4]."""
    net = Small()
    x = net.input("x", "float32", (-1, 3, 4))
    layer = net.definition.add_shuffle(x)
    layer.first_transpose, layer.reshape_dims, layer.second_transpose = (2, 1, 0), (0, -1), (1, 0)
    net.made(layer)
    given = torch.arange(24.0).reshape(2, 3, 4)

    found = net.computes(x=given)

    assert torch.equal(found, given.permute(2, 1, 0).reshape(4, 6).T)


def test_a_line_of_numbers_and_the_places_that_are_not_zero() -> None:
    net = Small()
    fill = net.definition.add_fill((4,), trt.FillOperation.LINSPACE, trt.int32)
    first = np.array(-1, np.int32)
    fill.set_input(1, net.definition.add_constant((), trt.Weights(first)).get_output(0))
    fill.set_input(2, net.constant("step", np.array([1], np.int32)))
    net.made(net.definition.add_non_zero(fill.get_output(0), trt.int32))

    assert net.computes().tolist() == [[0, 2, 3]]


def refused_layer(net: Small, x: Any) -> Any:
    return net.definition.add_lrn(x, 3, 1.0, 1.0, 1.0)


def refused_attribute(net: Small, x: Any) -> Any:
    return net.definition.add_activation(x, trt.ActivationType.SELU)


def refused_mode(net: Small, x: Any) -> Any:
    layer = net.definition.add_slice(x, (0,) * 4, (1,) * 4, (1,) * 4)
    layer.mode = trt.SampleMode.WRAP
    return layer


def refused_ranks(net: Small, x: Any) -> Any:
    sums = trt.ReduceOperation.SUM
    return net.definition.add_dist_collective(
        x, trt.CollectiveOperation.ALL_REDUCE, sums, -1, np.array([0, 1])
    )


@pytest.mark.parametrize(
    ("add", "says"),
    [
        (refused_layer, "is of type LRN"),
        (refused_attribute, r"\(ACTIVATION\) has the operation SELU"),
        (refused_mode, r"\(SLICE\) has the mode WRAP"),
        (refused_ranks, "no metadata that says what it exchanges"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(add: Any, says: str) -> None:
    """Before anything runs: a layer that is left out, or guessed, would verify nothing."""
    net = Small()
    net.made(add(net, net.input("x", "float32", (1, 4, 4, 4))))

    with pytest.raises(UnsupportedModel, match=says):
        Interpreter(net.definition, exact=True)


def test_tensors_are_dropped_after_their_last_use() -> None:
    """A chain of eight sums of a megabyte each holds two at once, not nine."""
    net = Small()
    x = first = net.input("x", "float32", (2**18,))
    for index in range(8):
        x = net.add(x, first, name=f"sum {index}")
    net.marked(x)
    given = torch.ones(2**18)

    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        net.computes(x=given)

    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert peak <= 2 * 2**20 + 4096
