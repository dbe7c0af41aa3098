"""All memory of a TensorRT engine, allocated once at load at addresses that never change.

So a recorded step stays right for ever, and a step allocates nothing. A step's inputs are small:
each of its runs writes them into a piece of page-locked memory of its own, which one copy brings to
the one place that every context reads. Pieces are as many as a step may have runs, since the copies
read them only when the stream comes to it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from headrace.serving import log
from headrace.serving.engine import plan_io
from headrace.serving.engine.base import Logits
from headrace.serving.engine.device import ALIGNMENT_BYTES, Device, HostBuffer
from headrace.serving.engine.tensorrt_plan import BF16_BYTES, PlanFacts
from headrace.serving.engine.tensorrt_sizes import Sizes
from headrace.serving.errors import DoesNotFit, ServingError

INT32_BYTES = FLOAT32_BYTES = 4

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, kw_only=True)
class InputLayout:
    """Where each small input begins in a piece."""

    offsets: dict[str, int]
    num_bytes: int

    @classmethod
    def of(cls, facts: PlanFacts, sizes: Sizes) -> "InputLayout":
        counts = {
            plan_io.POSITION_IDS: sizes.run_tokens_max,
            plan_io.WRITE_INDICES: sizes.places,
            plan_io.KV_LENGTHS: sizes.places,
        }
        if facts.is_first:
            counts[plan_io.INPUT_IDS] = sizes.run_tokens_max
        if facts.is_last:
            counts[plan_io.SAMPLE_INDEX] = sizes.places
        offsets, end = {}, 0
        for name, count in counts.items():
            offsets[name] = end
            end += _aligned(count * INT32_BYTES)
        return cls(offsets=offsets, num_bytes=end)

    def view(self, piece: HostBuffer, name: str, shape: tuple[int, ...]) -> Ints:
        """An input's values in a piece, as int32 of this shape."""
        first = self.offsets[name]
        end = first + math.prod(shape) * INT32_BYTES
        return piece[first:end].view(np.int32).reshape(shape)


@dataclass(slots=True, eq=False)
class Memory:
    """Addresses by tensor name; freed by `close`, in no order that matters."""

    device: Device
    stream: int
    layout: InputLayout
    caches: dict[str, int] = field(default_factory=dict)
    """By the input's name: place 0 of each cache."""
    inputs: int = 0
    states: dict[str, int] = field(default_factory=dict)
    """hidden_in and hidden_out, as far as the stage has them."""
    logits: int = 0
    activations: int = 0
    activation_bytes: int = 0
    pieces: Sequence[HostBuffer] = ()
    host_logits: Logits = field(default_factory=lambda: np.empty((0, 0), np.float32))
    """(rows_max, vocab), page-locked."""
    num_bytes: int = 0
    """Of the device."""
    _addresses: list[int] = field(default_factory=list)
    _buffers: list[HostBuffer] = field(default_factory=list)

    def allocate(
        self,
        facts: PlanFacts,
        sizes: Sizes,
        *,
        activation_bytes: int,
        spare_bytes: int,
        runs: int,
        vocab: int,
    ) -> None:
        """Take everything, or refuse before taking anything.

        Args:
            facts: of the plan.
            sizes: that the engine runs.
            activation_bytes: that any of its contexts asks for.
            spare_bytes: to leave free.
            runs: most of a step.
            vocab: columns of the logits that the host gets.

        Raises:
            DoesNotFit: the device has less free than the sum of it.
        """
        needs = device_needs(
            facts, sizes, activation_bytes=activation_bytes, spare_bytes=spare_bytes
        )
        require_free(self.device, needs)
        for past, _ in facts.caches:
            self.caches[past] = address = self._take(facts.place_bytes * sizes.places)
            # Attention multiplies what it masks by zero, and 0 x NaN is NaN.
            self.device.zero(address, facts.place_bytes * sizes.places, self.stream)
        self.inputs = self._take(self.layout.num_bytes)
        for name in _states(facts):
            self.states[name] = address = self._take(_state_bytes(facts, sizes))
            self.device.zero(address, _state_bytes(facts, sizes), self.stream)
        if facts.is_last:
            self.logits = self._take(sizes.places * facts.logits_width * FLOAT32_BYTES)
        self.activations, self.activation_bytes = self._take(activation_bytes), activation_bytes
        whole = self._take_host(runs * self.layout.num_bytes)
        self.pieces = list(whole.reshape(runs, self.layout.num_bytes))
        if facts.is_last:
            flat = self._take_host(sizes.rows_max * vocab * FLOAT32_BYTES)
            self.host_logits = flat.view(np.float32).reshape(sizes.rows_max, vocab)
        else:
            self.host_logits = np.empty((0, vocab), np.float32)
        self.num_bytes = sum(needs.values()) - spare_bytes

    def close(self) -> None:
        """Free everything, also what is left when something cannot be freed."""
        while self._addresses:
            attempt("device memory", self.device.free, self._addresses.pop())
        self.pieces, self.host_logits = (), np.empty((0, 0), np.float32)
        while self._buffers:
            attempt("host memory", self.device.free_host, self._buffers.pop())

    def _take(self, num_bytes: int) -> int:
        self._addresses.append(self.device.allocate(max(num_bytes, ALIGNMENT_BYTES)))
        return self._addresses[-1]

    def _take_host(self, num_bytes: int) -> HostBuffer:
        self._buffers.append(self.device.allocate_host(num_bytes))
        return self._buffers[-1]


def device_needs(
    facts: PlanFacts, sizes: Sizes, *, activation_bytes: int, spare_bytes: int
) -> dict[str, int]:
    """Bytes of the device beside the weights, by what they are for."""
    caches = 2 * len(facts.layers) * facts.place_bytes * sizes.places
    states = len(_states(facts)) * _state_bytes(facts, sizes)
    logits = sizes.places * facts.logits_width * FLOAT32_BYTES
    inputs = InputLayout.of(facts, sizes).num_bytes
    return {
        "KV caches": caches,
        "activations": activation_bytes,
        "inputs and outputs": states + logits + inputs,
        "contexts": spare_bytes,
    }


def require_free(device: Device, needs: dict[str, int]) -> None:
    """Compare needs with what the device has free.

    Raises:
        DoesNotFit: with every number.
    """
    free, total = device.memory_bytes()
    needed = sum(needs.values())
    if needed > free:
        parts = ", ".join(f"{what} {count:,}" for what, count in needs.items())
        raise DoesNotFit(
            f"The engine needs {needed:,} bytes more of {device.name}; {free:,} are free.",
            why=f"That is {parts}; the device has {total:,} in all.",
            fix="Lower kv_tokens or rows_max, end other processes on it, or split the model with "
            "`headrace compile --tp`.",
        )


def attempt(what: str, free: Callable[..., None], *arguments: object) -> None:
    """Free something, and log where a device that failed does not: the rest is freed too."""
    try:
        free(*arguments)
    except ServingError as error:
        log.not_freed(what=what, why=error.what)


def _states(facts: PlanFacts) -> list[str]:
    names = [] if facts.is_first else [plan_io.HIDDEN_IN]
    return names if facts.is_last else [*names, plan_io.HIDDEN_OUT]


def _state_bytes(facts: PlanFacts, sizes: Sizes) -> int:
    return sizes.run_tokens_max * facts.hidden * BF16_BYTES


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
