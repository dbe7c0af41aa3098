"""A TensorRT network computed on the CPU, layer by layer: what can be run of it without a GPU.

The interpreter walks the very INetworkDefinition that is given to the builder. An exact run, with
every floating-point type float32, proves that the network is the model; a run in the network's own
types estimates what its precision costs. At a collective layer the network is cut: the other ranks
compute their own networks in processes of their own, and meet there.

TensorRT states the shape and type of every tensor; each result is held against them. A layer or
an attribute that is not computed here is refused by name when the interpreter is made.
"""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headrace.compile.tensorrt.interpreter_attention import (
    ATTENTION,
    Collective,
    attention_inputs,
    collective,
)
from headrace.compile.tensorrt.interpreter_layers import ARITHMETIC, Compute, Site
from headrace.compile.tensorrt.interpreter_shapes import SHAPES
from headrace.compile.tensorrt.interpreter_values import Constants, constant, torch_type
from headrace.serving.errors import UnsupportedModel

_LAYERS = {**ARITHMETIC, **SHAPES, **ATTENTION}

_CLASSES: Mapping[str, str] = {
    "ELEMENTWISE": "IElementWiseLayer",
    "KV_CACHE_UPDATE": "IKVCacheUpdateLayer",
    "SOFTMAX": "ISoftMaxLayer",
    "TOPK": "ITopKLayer",
}
"""Layer types whose class is not spelt I<Type>Layer, capital by capital."""


@dataclass(frozen=True, slots=True)
class Input:
    """What a network takes under one name."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    """-1 where the caller decides."""


@dataclass(slots=True, eq=False)
class _Step:
    """One layer, ready to run. Tensors are known by their place in a list."""

    name: str
    compute: Compute
    inputs: tuple[int | None, ...]
    outputs: tuple[int, ...]
    promised: tuple[tuple[torch.dtype, tuple[int, ...]] | None, ...]
    """Type and shape of each output, -1 where a run decides; None where they are not compared."""
    is_fixed: bool
    """Whether it gives the same whenever it is run: its inputs decide all."""
    frees: tuple[int, ...] = ()
    """Places that no later step reads."""


class Interpreter:
    """Computes one network. It keeps the network and its constants alive."""

    def __init__(
        self,
        network: Any,
        *,
        exact: bool,
        constants: Constants | None = None,
        collective: Collective | None = None,
    ) -> None:
        """Read the network once; what depends on constants alone is computed here.

        Args:
            network: an INetworkDefinition of either library.
            exact: every floating-point type is float32, and nothing is rounded to another. Else
                each tensor has the network's own type.
            constants: values of the constant layers that the bindings cannot show, as stored. In an
                exact run they stay as they were rounded when they were stored.
            collective: the other ranks; None for a network without collectives.

        Raises:
            UnsupportedModel: a layer, an attribute or a type that is not computed here.
        """
        reader = _Reader(network, exact, constants or {}, collective)
        self._network = network
        self._constants = constants
        self.inputs: Mapping[str, Input] = reader.inputs
        self.outputs: Mapping[str, int] = reader.outputs
        self._places = reader.input_places
        self._fixed, self._steps = _fold(reader.values, reader.steps, set(self.outputs.values()))

    def run(self, inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Compute every output.

        Args:
            inputs: every input, of the type and shape that `self.inputs` states. Caches are written
                in place, as a device writes them, and answered as outputs.

        Raises:
            IndexError: an index or a KV place outside its tensor.
            EngineFault: another rank did not come to a collective.
        """
        values = list(self._fixed)
        for name, stated in self.inputs.items():
            given = inputs[name]
            _compare(f"input {name}", given, (stated.dtype, stated.shape))
            values[self._places[name]] = given
        with torch.inference_mode():
            for step in self._steps:
                _advance(step, values)
        return {name: _there(values[place]) for name, place in self.outputs.items()}


class _Reader:
    """Turns a network into steps."""

    def __init__(
        self, network: Any, exact: bool, constants: Constants, collective: Collective | None
    ) -> None:
        self.trt = importlib.import_module(type(network).__module__)
        self.exact, self.constants, self.collective = exact, constants, collective
        # The bindings answer the same object for the same tensor as long as somebody holds it, so
        # that its identity is the tensor's. Names are not unique.
        self.tensors: list[Any] = []
        self.values: list[Tensor | None] = []
        self.place_of: dict[int, int] = {}
        self.steps: list[_Step] = []
        self.inputs: dict[str, Input] = {}
        self.input_places: dict[str, int] = {}
        for index in range(network.num_inputs):
            tensor = network.get_input(index)
            dtype = torch_type(tensor.dtype, exact=exact)
            self.inputs[tensor.name] = Input(dtype, tuple(tensor.shape))
            self.input_places[tensor.name] = self.place(tensor)
        read = [self.read(network.get_layer(index)) for index in range(network.num_layers)]
        made = {*self.input_places.values(), *self.known()}
        self.steps = _ordered([step for step in read if step is not None], made)
        self.outputs = {
            tensor.name: self.place(tensor)
            for tensor in (network.get_output(index) for index in range(network.num_outputs))
        }

    def known(self) -> set[int]:
        return {place for place, value in enumerate(self.values) if value is not None}

    def place(self, tensor: Any) -> int:
        if id(tensor) not in self.place_of:
            self.place_of[id(tensor)] = len(self.tensors)
            self.tensors.append(tensor)
            self.values.append(None)
        return self.place_of[id(tensor)]

    def read(self, layer: Any) -> _Step | None:
        """The layer's step; None for a constant, whose values are read at once."""
        # Some classes have a `type` of their own, in front of ILayer's.
        kind = self.trt.ILayer.type.fget(layer).name
        if kind == "CONSTANT":
            layer.__class__ = self.trt.IConstantLayer
            place = self.place(layer.get_output(0))
            self.values[place] = constant(layer, self.constants, exact=self.exact)
            return None
        if kind not in _LAYERS and kind != "DIST_COLLECTIVE":
            raise UnsupportedModel(
                f"The layer {layer.name!r} is of type {kind}.",
                why="The CPU interpreter does not compute it, and guesses nothing.",
                fix="Build without it, or verify the plan on a GPU.",
            )
        usual = "I" + kind.title().replace("_", "") + "Layer"
        layer.__class__ = getattr(self.trt, _CLASSES.get(kind, usual))
        outputs = [layer.get_output(index) for index in range(layer.num_outputs)]
        types = tuple(torch_type(tensor.dtype, exact=self.exact) for tensor in outputs)
        site = Site(layer=layer, kind=kind, exact=self.exact, types=types)
        is_collective = kind == "DIST_COLLECTIVE"
        is_quotient = self.exact and kind == "QUANTIZE"
        if kind == "ATTENTION_INPUT":
            given = attention_inputs(layer)
        else:
            given = [layer.get_input(index) for index in range(layer.num_inputs)]
        return _Step(
            name=layer.name,
            compute=collective(site, self.collective) if is_collective else _LAYERS[kind](site),
            inputs=tuple(None if tensor is None else self.place(tensor) for tensor in given),
            outputs=tuple(self.place(tensor) for tensor in outputs),
            promised=tuple(
                # What joins the halves of an attention is nobody's, and has a shape of its own.
                None if kind == "ATTENTION_INPUT" or is_quotient else (dtype, tuple(tensor.shape))
                for dtype, tensor in zip(types, outputs, strict=True)
            ),
            is_fixed=not is_collective,
        )


def _ordered(steps: Sequence[_Step], made: set[int]) -> list[_Step]:
    """Each step after those whose outputs it takes; a network may name its layers in any order."""
    waiting, order = list(steps), list[_Step]()
    while waiting:
        later: list[_Step] = []
        for step in waiting:
            if all(place is None or place in made for place in step.inputs):
                order.append(step)
                made.update(step.outputs)
            else:
                later.append(step)
        assert len(later) < len(waiting), f"{later[0].name} waits for a tensor that nothing makes"
        waiting = later
    return order


def _fold(
    values: list[Tensor | None], steps: Sequence[_Step], outputs: set[int]
) -> tuple[list[Tensor | None], list[_Step]]:
    """Compute what constants alone decide, and note when each of the other tensors ends.

    Returns:
        The values that every run starts with, and the steps that are left to it.
    """
    uses = [0] * len(values)
    for step in steps:
        for place in step.inputs:
            if place is not None:
                uses[place] += 1
    left: list[_Step] = []
    with torch.inference_mode():
        for step in steps:
            taken = [place for place in step.inputs if place is not None]
            if not step.is_fixed or any(values[place] is None for place in taken):
                left.append(step)
                continue
            _advance(step, values)
            for place in taken:
                uses[place] -= 1
                # A weight that was widened or dequantised is not needed as it was stored.
                if not uses[place] and place not in outputs:
                    values[place] = None
    ended = set(outputs) | {place for place, value in enumerate(values) if value is not None}
    for step in reversed(left):
        taken = {place for place in (*step.inputs, *step.outputs) if place is not None}
        step.frees = tuple(taken - ended)
        ended |= taken
    return values, left


def _advance(step: _Step, values: list[Tensor | None]) -> None:
    given = [None if place is None else values[place] for place in step.inputs]
    try:
        made = step.compute(*given)
    except (RuntimeError, AssertionError) as error:
        error.add_note(f"in the layer {step.name}")
        raise
    if len(step.outputs) == 1:
        made = (made,)
    for place, promised, tensor in zip(step.outputs, step.promised, made, strict=True):
        if promised is not None:
            _compare(step.name, tensor, promised)
        values[place] = tensor
    for place in step.frees:
        values[place] = None


def _compare(name: str, tensor: Tensor, promised: tuple[torch.dtype, tuple[int, ...]]) -> None:
    """Hold a tensor against what TensorRT says of it."""
    dtype, shape = promised
    assert tensor.dtype == dtype, f"{name} is {tensor.dtype}; the network says {dtype}"
    agrees = tensor.ndim == len(shape) and all(
        stated in (-1, size) for stated, size in zip(shape, tensor.shape, strict=True)
    )
    assert agrees, f"{name} has shape {tuple(tensor.shape)}; the network says {shape}"


def _there(value: Tensor | None) -> Tensor:
    assert value is not None
    return value
