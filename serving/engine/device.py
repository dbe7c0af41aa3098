"""What an engine asks of an accelerator: memory, copies, one stream, graphs.

Addresses, streams and graphs are the driver's own numbers, so that TensorRT and NCCL take them as
they are. Everything on a stream runs in the order it was given; nothing has run before
`synchronize` returns, so a host buffer that a copy names is left alone until then.
"""

from typing import Protocol

import numpy as np
import numpy.typing as npt

HostBuffer = npt.NDArray[np.uint8]
"""Memory of the host that the device copies from and to by itself (page-locked), as bytes."""

ALIGNMENT_BYTES = 256
"""Of every address that TensorRT is given."""


class Device(Protocol):
    """One accelerator. Calls never overlap; one thread at a time, after `make_current`.

    Every call may raise EngineFault: the device failed and is of no more use.
    """

    @property
    def name(self) -> str: ...

    @property
    def compute_capability(self) -> str:
        """For example "9.0"."""
        ...

    def make_current(self) -> None:
        """Make the calling thread's next calls, TensorRT's among them, go to this device."""
        ...

    def memory_bytes(self) -> tuple[int, int]:
        """(free, total)."""
        ...

    def allocate(self, num_bytes: int) -> int:
        """The address of memory with any content, aligned to `ALIGNMENT_BYTES`.

        Raises:
            DoesNotFit: there is too little left.
        """
        ...

    def free(self, address: int) -> None: ...

    def allocate_host(self, num_bytes: int) -> HostBuffer:
        """Page-locked memory of the host.

        Raises:
            DoesNotFit: the host has too little left.
        """
        ...

    def free_host(self, buffer: HostBuffer) -> None: ...

    def open_stream(self) -> int: ...

    def close_stream(self, stream: int) -> None: ...

    def zero(self, address: int, num_bytes: int, stream: int) -> None: ...

    def copy_to_device(self, address: int, source: npt.NDArray[np.generic], stream: int) -> None:
        """Copy all of `source`, a contiguous view of a host buffer."""
        ...

    def copy_to_host(self, target: npt.NDArray[np.generic], address: int, stream: int) -> None:
        """Fill all of `target`, a contiguous view of a host buffer."""
        ...

    def synchronize(self, stream: int) -> None:
        """Wait until all that was given to the stream has run."""
        ...

    def begin_capture(self, stream: int) -> None:
        """Record what the stream is given from here on, instead of running it."""
        ...

    def end_capture(self, stream: int) -> int:
        """The recording, as a graph that can be launched; ends recording in any case."""
        ...

    def launch(self, graph: int, stream: int) -> None: ...

    def free_graph(self, graph: int) -> None: ...

    def close(self) -> None:
        """Give the device back, after everything that was allocated on it. Idempotent."""
        ...
