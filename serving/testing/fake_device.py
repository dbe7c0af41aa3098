"""A device made of host memory that runs nothing before it is told to wait.

It is as late as a device may be: work on a stream runs inside `synchronize`, so a host buffer that
was written again too early, or read before it was waited for, shows as wrong numbers. Every access
is checked against what is allocated; nothing may be left over.
"""

import threading
from bisect import bisect_right
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from headrace.serving.engine.device import ALIGNMENT_BYTES, HostBuffer
from headrace.serving.errors import DoesNotFit, EngineFault

_GARBAGE = 0xFF
"""What fresh memory holds: in every floating format of whole bytes it is a NaN."""

_BASE = 0x7F00_0000_0000

Work = Callable[[], None]


class FakeDevice:
    """Implements `Device`. Breaking a rule is an AssertionError; `fault_at` makes it fail."""

    def __init__(
        self,
        *,
        compute_capability: str = "9.0",
        total_bytes: int = 1 << 40,
        fault_at: int | None = None,
    ) -> None:
        """Make a device.

        Args:
            compute_capability: that it states.
            total_bytes: that it states; memory of the host is used as it is allocated.
            fault_at: which call that can fail does, counted from 0, with all that follow.
        """
        self._capability = compute_capability
        self._total_bytes = total_bytes
        self.fault_at = fault_at
        self._thread: int | None = None
        self._next_address = _BASE
        self._starts: list[int] = []
        self._memory: dict[int, HostBuffer] = {}
        self._pinned: dict[int, HostBuffer] = {}
        self._streams: dict[int, list[Work]] = {}
        self._graphs: dict[int, list[Work]] = {}
        self._recording: list[Work] | None = None
        self._broken_recording = False
        self._handles = 0
        self.calls = 0
        """That can fail, so far."""
        self.launches = 0
        """Of recorded graphs."""
        self.journal: list[str] = []
        """What was given back, in order; the fake library writes into it too."""
        self.plan_bytes = 0
        """That a loaded plan occupies."""
        self.is_closed = False

    @property
    def name(self) -> str:
        return "Fake GPU"

    @property
    def compute_capability(self) -> str:
        return self._capability

    @property
    def used_bytes(self) -> int:
        return self.plan_bytes + sum(len(each) for each in self._memory.values())

    @property
    def is_recording(self) -> bool:
        return self._recording is not None

    @property
    def left_over(self) -> list[str]:
        """What nobody has given back."""
        kinds = {
            "memory": self._memory,
            "host memory": self._pinned,
            "stream": self._streams,
            "graph": self._graphs,
        }
        return [kind for kind, held in kinds.items() for _ in held]

    def make_current(self) -> None:
        self._may_fail(anywhere=True)
        self._thread = threading.get_ident()

    def memory_bytes(self) -> tuple[int, int]:
        self._may_fail()
        return self._total_bytes - self.used_bytes, self._total_bytes

    def allocate(self, num_bytes: int) -> int:
        self._may_fail()
        assert num_bytes > 0
        assert not self.is_recording, "memory cannot be allocated while a graph is recorded"
        if self.used_bytes + num_bytes > self._total_bytes:
            raise DoesNotFit("The fake device is full.", why="It is.", fix="Allocate less.")
        address = self._next_address
        # A gap behind each allocation: reaching over its end hits nothing.
        self._next_address += (num_bytes // ALIGNMENT_BYTES + 2) * ALIGNMENT_BYTES
        self._starts.append(address)
        self._memory[address] = np.full(num_bytes, _GARBAGE, np.uint8)
        return address

    def free(self, address: int) -> None:
        assert address in self._memory, "freed twice, or never allocated"
        self._require_idle("memory was freed under work that may use it")
        del self._memory[address]
        self._given_back("memory")

    def allocate_host(self, num_bytes: int) -> HostBuffer:
        self._may_fail()
        buffer = np.full(num_bytes, _GARBAGE, np.uint8)
        self._pinned[buffer.ctypes.data] = buffer
        return buffer

    def free_host(self, buffer: HostBuffer) -> None:
        self._require_idle("host memory was freed under a copy")
        del self._pinned[buffer.ctypes.data]
        self._given_back("host memory")

    def open_stream(self) -> int:
        self._may_fail()
        return self._new(self._streams)

    def close_stream(self, stream: int) -> None:
        self._require_idle("a stream was closed under its work")
        del self._streams[stream]
        self._given_back("stream")

    def zero(self, address: int, num_bytes: int, stream: int) -> None:
        self._may_fail()
        self.bytes_at(address, num_bytes)
        self.put(stream, lambda: self.bytes_at(address, num_bytes).fill(0))

    def copy_to_device(self, address: int, source: npt.NDArray[np.generic], stream: int) -> None:
        self._may_fail()
        raw = self._host_bytes(source)
        self.bytes_at(address, raw.size)

        def copy() -> None:
            self.bytes_at(address, raw.size)[:] = raw

        self.put(stream, copy)

    def copy_to_host(self, target: npt.NDArray[np.generic], address: int, stream: int) -> None:
        self._may_fail()
        raw = self._host_bytes(target)
        self.bytes_at(address, raw.size)
        raw.fill(_GARBAGE)

        def copy() -> None:
            raw[:] = self.bytes_at(address, raw.size)

        self.put(stream, copy)

    def synchronize(self, stream: int) -> None:
        self._may_fail()
        assert not self.is_recording, "nothing can be waited for while a graph is recorded"
        work, self._streams[stream] = self._streams[stream], []
        for each in work:
            each()

    def begin_capture(self, stream: int) -> None:
        self._may_fail()
        assert not self.is_recording
        assert not self._streams[stream], "recording begins on a stream that has work"
        self._recording, self._broken_recording = [], False

    def end_capture(self, stream: int) -> int:
        assert stream in self._streams
        assert self._recording is not None, "nothing is recorded"
        work, self._recording = self._recording, None
        self._may_fail()
        if self._broken_recording:
            raise EngineFault("The recording broke.", why="The test said so.", fix="None.")
        graph = self._new(self._graphs)
        self._graphs[graph] = work
        return graph

    def break_recording(self) -> None:
        """Do what a call that cannot be recorded does."""
        assert self.is_recording
        self._broken_recording = True

    def launch(self, graph: int, stream: int) -> None:
        self._may_fail()
        self.launches += 1
        self._streams[stream] += self._graphs[graph]

    def free_graph(self, graph: int) -> None:
        self._require_idle("a graph was freed while it may run")
        del self._graphs[graph]
        self._given_back("graph")

    def close(self) -> None:
        if not self.is_closed:
            assert not self.left_over, f"left over: {self.left_over}"
            self.is_closed = True
            self._given_back("device")

    # For those that work on the device: the fake library and the fake channel.

    def put(self, stream: int, work: Work) -> None:
        """Give the stream work, which runs later, or is recorded."""
        queue = self._streams[stream]
        (queue if self._recording is None else self._recording).append(work)

    def bytes_at(self, address: int, num_bytes: int) -> HostBuffer:
        """Memory of the device as bytes, all of it in one allocation that is alive."""
        index = bisect_right(self._starts, address) - 1
        start = self._starts[index] if index >= 0 else 0
        held = self._memory.get(start)
        assert held is not None, f"{address:#x} is not allocated, or was freed"
        first = address - start
        assert first + num_bytes <= len(held), f"{address:#x} + {num_bytes:,} is out of bounds"
        return held[first : first + num_bytes]

    def _host_bytes(self, array: npt.NDArray[np.generic]) -> HostBuffer:
        assert array.flags.c_contiguous
        first = array.ctypes.data
        for start, buffer in self._pinned.items():
            if start <= first and first + array.nbytes <= start + len(buffer):
                return buffer[first - start : first - start + array.nbytes]
        raise AssertionError("a copy names memory of the host that is not page-locked")

    def _given_back(self, what: str) -> None:
        self.journal.append(what)
        if self.has_failed:
            raise EngineFault("It is not freed.", why="The device has failed.", fix="Restart.")

    def _require_idle(self, otherwise: str) -> None:
        # Of a device that failed, nothing runs any more.
        assert self.has_failed or not any(self._streams.values()), otherwise

    @property
    def has_failed(self) -> bool:
        return self.fault_at is not None and self.calls > self.fault_at

    def _may_fail(self, *, anywhere: bool = False) -> None:
        assert not self.is_closed, "the device was given back"
        assert anywhere or self._thread == threading.get_ident(), "not made current on this thread"
        self.calls += 1
        if self.has_failed:
            raise EngineFault(
                "The device fell off the bus.", why="The test said so.", fix="Restart the replica."
            )

    def _new(self, held: dict[int, list[Work]]) -> int:
        self._handles += 1
        held[self._handles] = []
        return self._handles
