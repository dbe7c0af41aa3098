"""A TensorRT without a GPU: the objects of a runtime over `FakeDevice`, strict about their rules.

What the real library answers with a False, undefined behaviour or the end of the process is an
AssertionError here, naming the rule: shapes within the profile, every address set and aligned,
caches updated in place, memory of activations given, a communicator before the first run of a
network that has collectives, one run before a recording, nothing changed after it, contexts gone
before what they use. Plans are JSON and hold a `FakeDecoder`.
"""

import json
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from enum import Enum, IntEnum, auto

import numpy as np

from headrace.serving.domain.artifact import Profile
from headrace.serving.engine import plan_io
from headrace.serving.engine.device import ALIGNMENT_BYTES
from headrace.serving.testing.fake_decoder import FakeDecoder
from headrace.serving.testing.fake_device import FakeDevice

VERSION = "11.4.0.106"

_MAGIC = "fake plan"

View = Callable[[str], np.ndarray]
"""From a tensor's name to its values on the device, in the shape of the run; bf16 as uint16."""


class Severity(IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3
    VERBOSE = 4


class DataType(Enum):
    FLOAT = auto()
    BF16 = auto()
    INT32 = auto()


class TensorIOMode(Enum):
    NONE = auto()
    INPUT = auto()
    OUTPUT = auto()


class ExecutionContextAllocationStrategy(Enum):
    STATIC = auto()
    USER_MANAGED = auto()


_BYTES = {DataType.FLOAT: 4, DataType.BF16: 2, DataType.INT32: 4}
_DTYPES = {DataType.FLOAT: np.float32, DataType.BF16: np.uint16, DataType.INT32: np.int32}


@dataclass(frozen=True, slots=True, kw_only=True)
class FakePlan:
    """What a plan file holds."""

    decoder: FakeDecoder
    first_layer: int
    last_layer: int
    """One past its last."""
    cache_tokens: int
    profiles: tuple[Profile, ...]
    is_first: bool = True
    is_last: bool = True
    has_collectives: bool = False
    cp: int = 1
    """The tokens of a run are a multiple of it."""
    is_in_place: bool = True
    """Whether each cache's output is its input."""
    logits_width: int
    activation_bytes: int = 4096
    weight_bytes: int = 1000
    compute_capability: str = "9.0"

    def to_bytes(self) -> bytes:
        return json.dumps({"magic": _MAGIC, **asdict(self)}).encode()

    @classmethod
    def from_bytes(cls, raw: bytes) -> "FakePlan | None":
        """Read a plan; None where it is not one."""
        try:
            found = json.loads(raw)
            if found.pop("magic") != _MAGIC:
                return None
        except (ValueError, KeyError, AttributeError, TypeError):
            return None
        found["decoder"] = FakeDecoder(**found["decoder"])
        found["profiles"] = tuple(
            Profile(name=each["name"], rows=tuple(each["rows"]), tokens=tuple(each["tokens"]))
            for each in found["profiles"]
        )
        return cls(**found)

    @property
    def tensors(self) -> dict[str, tuple[TensorIOMode, DataType, tuple[int, ...]]]:
        """Every input and output."""
        takes, makes = TensorIOMode.INPUT, TensorIOMode.OUTPUT
        states = (-1, -1, self.decoder.hidden)
        found: dict[str, tuple[TensorIOMode, DataType, tuple[int, ...]]] = {
            plan_io.WRITE_INDICES: (takes, DataType.INT32, (-1,)),
            plan_io.POSITION_IDS: (takes, DataType.INT32, (-1, -1)),
            plan_io.KV_LENGTHS: (takes, DataType.INT32, (-1,)),
        }
        if self.is_first:
            found[plan_io.INPUT_IDS] = (takes, DataType.INT32, (-1, -1))
        else:
            found[plan_io.HIDDEN_IN] = (takes, DataType.BF16, states)
        if self.is_last:
            found[plan_io.SAMPLE_INDEX] = (takes, DataType.INT32, (-1,))
            found[plan_io.LOGITS] = (makes, DataType.FLOAT, (-1, self.logits_width))
        else:
            found[plan_io.HIDDEN_OUT] = (makes, DataType.BF16, states)
        cache = (-1, self.decoder.kv_heads, self.cache_tokens, self.decoder.head_dim)
        for layer in range(self.first_layer, self.last_layer):
            for kind in "kv":
                found[plan_io.past(kind, layer)] = (takes, DataType.BF16, cache)
                found[plan_io.present(kind, layer)] = (makes, DataType.BF16, cache)
        return found


Compute = Callable[[FakePlan, View], None]
"""Reads a run's inputs and writes its outputs."""


class FakeTensorRt:
    """Implements `Library`: the module, for one device."""

    __name__ = "tensorrt"
    __version__ = VERSION
    ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy

    class ILogger:
        """As the library's: its `__init__` must be called."""

        def __init__(self) -> None:
            self.is_made = True

        def log(self, severity: Severity, msg: str) -> None:
            raise NotImplementedError

    def __init__(self, device: FakeDevice, compute: Compute | None = None) -> None:
        """Make the module.

        Args:
            device: that its plans run on.
            compute: what a run computes, in place of a plan's `FakeDecoder`.
        """
        self.device = device
        self.compute = compute or _compute
        self.runs = 0
        """Calls of execute_async_v3 so far, over all contexts; replays are not calls."""
        self.refuse_run: int | None = None
        """The call that is refused, with a line in the log."""
        self.can_record = True
        self.contexts = 0
        """That are alive."""
        self.profiles_run: list[tuple[int, int, int]] = []
        """(profile, rows, tokens) of every run, replays included."""

    def Runtime(self, logger: "FakeTensorRt.ILogger") -> "FakeRuntime":
        assert logger.is_made, "ILogger.__init__ was not called"
        return FakeRuntime(self, logger)


class FakeRuntime:
    def __init__(self, library: FakeTensorRt, logger: FakeTensorRt.ILogger) -> None:
        self.library, self.logger = library, logger
        weakref.finalize(self, library.device.journal.append, "runtime")

    def deserialize_cuda_engine(self, serialized_engine: object) -> "FakeEngine | None":
        plan = FakePlan.from_bytes(bytes(memoryview(serialized_engine)))  # pyright: ignore[reportArgumentType]
        if plan is None:
            self.logger.log(Severity.ERROR, "Error Code 1: Serialization (Magic tag does not match")
            return None
        if plan.compute_capability != self.library.device.compute_capability:
            self.logger.log(Severity.ERROR, "Error Code 6: the engine is of another device")
            return None
        return FakeEngine(self, plan)


class FakeEngine:
    def __init__(self, runtime: FakeRuntime, plan: FakePlan) -> None:
        self.runtime, self.plan = runtime, plan
        self._tensors = plan.tensors
        self._budget = plan.weight_bytes
        device = runtime.library.device
        device.plan_bytes = plan.weight_bytes
        weakref.finalize(self, _unload, device)

    @property
    def weight_streaming_budget_v2(self) -> int:
        return self._budget

    @weight_streaming_budget_v2.setter
    def weight_streaming_budget_v2(self, budget: int) -> None:
        assert not self.runtime.library.contexts, "the budget is set before the first context"
        assert budget >= 0
        self._budget = budget
        self.runtime.library.device.plan_bytes = min(budget, self.plan.weight_bytes)

    @property
    def streamable_weights_size(self) -> int:
        return self.plan.weight_bytes

    @property
    def weight_streaming_scratch_memory_size(self) -> int:
        return self.plan.weight_bytes // 4 if self._budget < self.plan.weight_bytes else 0

    @property
    def device_memory_size_v2(self) -> int:
        return self.plan.activation_bytes + self.weight_streaming_scratch_memory_size

    @property
    def num_io_tensors(self) -> int:
        return len(self._tensors)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self.plan.profiles)

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return self._tensors[name][0]

    def get_tensor_dtype(self, name: str) -> DataType:
        return self._tensors[name][1]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name][2]

    def get_aliased_input_tensor(self, name: str) -> str | None:
        if not self.plan.is_in_place or not name.startswith("present"):
            return None
        return name.replace("present", "past")

    def create_execution_context(
        self, strategy: ExecutionContextAllocationStrategy
    ) -> "FakeContext":
        assert strategy is ExecutionContextAllocationStrategy.USER_MANAGED
        return FakeContext(self)


class FakeContext:
    """An execution context; what it runs is bound when it is called, and computed later."""

    def __init__(self, engine: FakeEngine) -> None:
        self._engine, self._plan = engine, engine.plan
        self._library = engine.runtime.library
        self._device = self._library.device
        self._profile: int | None = None
        self._activations: tuple[int, int] | None = None
        self._communicator: object = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._version = 0
        """Raised by every change; a recording is of one version."""
        self._run_version = -1
        self._library.contexts += 1
        weakref.finalize(self, _context_gone, self._library)

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        assert 0 <= profile_index < len(self._plan.profiles)
        self._change()
        self._profile = profile_index
        self._shapes.clear()
        self._device.put(stream_handle, lambda: None)
        return True

    def set_device_memory(self, memory: int, size: int) -> None:
        assert memory % ALIGNMENT_BYTES == 0
        assert size >= self._engine.device_memory_size_v2, "too little for the activations"
        self._device.bytes_at(memory, size)
        self._change()
        self._activations = memory, size

    def set_communicator(self, communicator: object) -> bool:
        assert self._run_version < 0, "the communicator is set before the first run"
        self._communicator = communicator
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self._profile is not None, "a profile is chosen before shapes are set"
        mode, _, wanted = self._plan.tensors[name]
        assert mode is TensorIOMode.INPUT
        assert len(shape) == len(wanted)
        assert all(want in (-1, size) for size, want in zip(shape, wanted, strict=True)), name
        profile = self._plan.profiles[self._profile]
        free = [s for s, want in zip(shape, wanted, strict=True) if want == -1]
        for size, (least, _, most) in zip(free, (profile.rows, profile.tokens), strict=False):
            assert least <= size <= most, f"{name} {shape} lies outside profile {profile.name}"
        self._change()
        self._shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        assert name in self._plan.tensors, f"there is no tensor {name}"
        assert memory % ALIGNMENT_BYTES == 0, f"the address of {name} is not aligned"
        self._change()
        self._addresses[name] = memory
        return True

    def infer_shapes(self) -> Sequence[str]:
        return [name for name in self._inputs if name not in self._shapes]

    def execute_async_v3(self, stream_handle: int) -> bool:
        library = self._library
        library.runs += 1
        if library.refuse_run is not None and library.runs > library.refuse_run:
            library_log = self._engine.runtime.logger
            library_log.log(Severity.ERROR, "Error Code 1: Cuda Runtime (an illegal address)")
            return False
        if self._device.is_recording and not library.can_record:
            self._device.break_recording()
            self._engine.runtime.logger.log(Severity.ERROR, "the stream is not capturable")
            return False
        if self._device.is_recording:
            assert self._run_version == self._version, "one run comes before the recording"
        self._check()
        self._run_version = self._version
        self._device.put(stream_handle, self._work())
        return True

    @property
    def _inputs(self) -> list[str]:
        return [name for name, each in self._plan.tensors.items() if each[0] is TensorIOMode.INPUT]

    def _change(self) -> None:
        assert not self._device.is_recording, "a context is changed while it is recorded"
        self._version += 1

    def _check(self) -> None:
        plan, shapes = self._plan, self._shapes
        assert self._profile is not None
        assert self._activations is not None, "no memory was given for the activations"
        assert not self.infer_shapes(), f"no shape was given for {self.infer_shapes()}"
        assert not plan.has_collectives or self._communicator is not None
        rows = {shapes[name][0] for name in self._inputs}
        assert len(rows) == 1, "inputs differ in their rows"
        by_token = [name for name in self._inputs if len(shapes[name]) in (2, 3)]
        assert len({shapes[name][1] for name in by_token}) == 1, "inputs differ in their tokens"
        for name, (_, kind, _) in plan.tensors.items():
            assert name in self._addresses, f"no address was given for {name}"
            size = int(np.prod(self._shape(name))) * _BYTES[kind]
            self._device.bytes_at(self._addresses[name], size)
            aliased = self._engine.get_aliased_input_tensor(name)
            if aliased is not None:
                assert self._addresses[name] == self._addresses[aliased], f"{name} is not in place"

    def _shape(self, name: str) -> tuple[int, ...]:
        if name in self._shapes:
            return self._shapes[name]
        if name.startswith("present"):
            return self._shapes[name.replace("present", "past")]
        rows, tokens = self._shapes[plan_io.POSITION_IDS]
        return tuple((rows, tokens)[i] if n == -1 else n for i, n in enumerate(self._wanted(name)))

    def _wanted(self, name: str) -> tuple[int, ...]:
        return self._plan.tensors[name][2]

    def _work(self) -> Callable[[], None]:
        """What this run is, with the shapes and addresses of now."""
        version, alive = self._version, weakref.ref(self)
        bound = {
            name: (self._addresses[name], self._shape(name), each[1])
            for name, each in self._plan.tensors.items()
        }
        activations = self._activations
        device, plan, library, profile = self._device, self._plan, self._library, self._profile
        assert activations is not None
        assert profile is not None

        def view(name: str) -> np.ndarray:
            address, shape, kind = bound[name]
            size = int(np.prod(shape)) * _BYTES[kind]
            return device.bytes_at(address, size).view(_DTYPES[kind]).reshape(shape)

        def run() -> None:
            context = alive()
            assert context is not None, "the context is gone, and its run is not done"
            assert context._version >= version
            # Activations of any context: what another one kept there is overwritten.
            device.bytes_at(*activations).fill(0xAB)
            _check_inputs(plan, view)
            library.compute(plan, view)
            rows, tokens = bound[plan_io.POSITION_IDS][1]
            library.profiles_run.append((profile, rows, tokens))

        def replay() -> None:
            context = alive()
            assert context is not None, "the context is gone, and its recording is launched"
            assert context._version == version, "the context changed after its recording"
            run()

        return replay if device.is_recording else run


def _check_inputs(plan: FakePlan, view: View) -> None:
    starts, lengths = view(plan_io.WRITE_INDICES), view(plan_io.KV_LENGTHS)
    positions = view(plan_io.POSITION_IDS)
    rows, tokens = positions.shape
    assert rows * tokens % plan.cp == 0, "a run's tokens are not dealt out evenly"
    assert (positions == starts[:, None] + np.arange(tokens)).all()
    assert (lengths == starts + tokens).all()
    assert starts.min() >= 0
    assert lengths.max() <= plan.cache_tokens, "a row writes past its cache"


def _compute(plan: FakePlan, view: View) -> None:
    decoder = plan.decoder
    starts = view(plan_io.WRITE_INDICES).astype(np.int64)
    lengths = view(plan_io.KV_LENGTHS).astype(np.int64)
    rows, tokens = view(plan_io.POSITION_IDS).shape
    if plan.is_first:
        ids = view(plan_io.INPUT_IDS).astype(np.int64)
        assert ids.min() >= 0
        assert ids.max() < decoder.vocab
        states = decoder.embed(ids)
    else:
        states = view(plan_io.HIDDEN_IN).copy()
    for index in range(plan.first_layer, plan.last_layer):
        caches = {kind: view(plan_io.past(kind, index)) for kind in "kv"}
        states = decoder.layer(index, states, starts, lengths, caches)
    if plan.is_last:
        chosen = view(plan_io.SAMPLE_INDEX)
        flat = states.reshape(rows * tokens, -1)
        logits = view(plan_io.LOGITS)
        logits[:] = -1.0
        logits[:, : decoder.vocab] = decoder.logits(flat[chosen])
    else:
        view(plan_io.HIDDEN_OUT)[:] = states


def _unload(device: FakeDevice) -> None:
    device.plan_bytes = 0
    device.journal.append("plan")


def _context_gone(library: FakeTensorRt) -> None:
    library.contexts -= 1
    library.device.journal.append("context")
