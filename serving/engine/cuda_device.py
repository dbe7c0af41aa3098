"""The real `Device`: an NVIDIA GPU through the CUDA driver's own interface.

TensorRT and NCCL use the device's primary context, and so does this. The driver's library is loaded
by the first call, and a machine without one is refused there: TensorRT itself ends the process when
it is used without a driver.
"""

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.serving.engine.device import HostBuffer
from headrace.serving.errors import DeviceUnsuitable, DoesNotFit, EngineFault

driver: Any
try:
    from cuda.bindings import driver  # pyright: ignore[reportAttributeAccessIssue]
except ImportError:  # The extra `gpu` is not installed.
    driver = None

_FIX = (
    "Serve it on a machine with an NVIDIA GPU and driver, where `pip install 'headrace[gpu]'` "
    "was run, or compile the model with `--target cpu`."
)


class CudaDevice:
    """Implements `Device`.

    Args:
        ordinal: which of the devices that CUDA_VISIBLE_DEVICES leaves.

    Raises:
        DeviceUnsuitable: no driver answers, or it has no such device.
    """

    def __init__(self, ordinal: int = 0) -> None:
        count = _num_devices()
        if not 0 <= ordinal < count:
            raise DeviceUnsuitable(
                f"There is no GPU number {ordinal}.",
                why=f"The CUDA driver shows {count} here.",
                fix=_FIX,
            )
        self._cuda = driver
        self._device = self._call("cuDeviceGet", ordinal)
        self._context: object | None = self._call("cuDevicePrimaryCtxRetain", self._device)
        self.make_current()

    @property
    def name(self) -> str:
        raw: bytes = self._call("cuDeviceGetName", 256, self._device)
        return raw.split(b"\0", 1)[0].decode("utf-8", "replace")

    @property
    def compute_capability(self) -> str:
        kinds = self._cuda.CUdevice_attribute
        major, minor = (
            self._call("cuDeviceGetAttribute", kind, self._device)
            for kind in (
                kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            )
        )
        return f"{major}.{minor}"

    def make_current(self) -> None:
        self._call("cuCtxSetCurrent", self._context)

    def memory_bytes(self) -> tuple[int, int]:
        free, total = self._call("cuMemGetInfo")
        return int(free), int(total)

    def allocate(self, num_bytes: int) -> int:
        free, _ = self.memory_bytes()
        return int(self._allocating("cuMemAlloc", num_bytes, f"the GPU had {free:,} bytes free"))

    def free(self, address: int) -> None:
        self._call("cuMemFree", address)

    def allocate_host(self, num_bytes: int) -> HostBuffer:
        state = "it is page-locked memory of the host"
        address = int(self._allocating("cuMemHostAlloc", num_bytes, state, 0))
        return np.ctypeslib.as_array((ctypes.c_uint8 * num_bytes).from_address(address))

    def free_host(self, buffer: HostBuffer) -> None:
        self._call("cuMemFreeHost", buffer.ctypes.data)

    def open_stream(self) -> int:
        # The default stream would make the device wait for every other stream.
        kind = self._cuda.CUstream_flags.CU_STREAM_NON_BLOCKING
        return int(self._call("cuStreamCreate", kind))

    def close_stream(self, stream: int) -> None:
        self._call("cuStreamDestroy", stream)

    def zero(self, address: int, num_bytes: int, stream: int) -> None:
        self._call("cuMemsetD8Async", address, 0, num_bytes, stream)

    def copy_to_device(self, address: int, source: npt.NDArray[np.generic], stream: int) -> None:
        assert source.flags.c_contiguous
        self._call("cuMemcpyHtoDAsync", address, source.ctypes.data, source.nbytes, stream)

    def copy_to_host(self, target: npt.NDArray[np.generic], address: int, stream: int) -> None:
        assert target.flags.c_contiguous
        self._call("cuMemcpyDtoHAsync", target.ctypes.data, address, target.nbytes, stream)

    def synchronize(self, stream: int) -> None:
        self._call("cuStreamSynchronize", stream)

    def begin_capture(self, stream: int) -> None:
        # Thread local: an allocation by another thread is none of this capture's business.
        mode = self._cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call("cuStreamBeginCapture", stream, mode)

    def end_capture(self, stream: int) -> int:
        graph = self._call("cuStreamEndCapture", stream)
        try:
            return int(self._call("cuGraphInstantiate", graph, 0))
        finally:
            self._call("cuGraphDestroy", graph)

    def launch(self, graph: int, stream: int) -> None:
        self._call("cuGraphLaunch", graph, stream)

    def free_graph(self, graph: int) -> None:
        self._call("cuGraphExecDestroy", graph)

    def close(self) -> None:
        if self._context is not None:
            self._context = None
            self._call("cuDevicePrimaryCtxRelease", self._device)

    def _call(self, name: str, *arguments: object) -> Any:
        """Call the driver; its one result, or all of several."""
        status, *results = getattr(self._cuda, name)(*arguments)
        if status != self._cuda.CUresult.CUDA_SUCCESS:
            raise EngineFault(
                f"The GPU does not go on: {name} returned {status.name}.",
                why="The device or its driver failed; what the device holds cannot be trusted.",
                fix="Restart the replica; if it comes again, look for an Xid in the kernel's log.",
            )
        return results[0] if len(results) == 1 else results

    def _allocating(self, name: str, num_bytes: int, state: str, *more: object) -> Any:
        status, address = getattr(self._cuda, name)(num_bytes, *more)
        if status == self._cuda.CUresult.CUDA_SUCCESS:
            return address
        raise DoesNotFit(
            f"{num_bytes:,} bytes could not be allocated: {name} returned {status.name}.",
            why=f"Too little was left while the engine was loaded: {state}.",
            fix="Lower kv_tokens or rows_max, or end other processes that use the memory.",
        )


def capability_here() -> str | None:
    """The compute capability of the first GPU, for example "9.0"; None where no driver answers."""
    try:
        device = CudaDevice()
    except DeviceUnsuitable:
        return None
    try:
        return device.compute_capability
    finally:
        device.close()


def device_here() -> str:
    """The name of the first GPU.

    Raises:
        DeviceUnsuitable: no driver answers.
    """
    device = CudaDevice()
    try:
        return device.name
    finally:
        device.close()


def _num_devices() -> int:
    """How many devices a driver shows.

    Raises:
        DeviceUnsuitable: no driver answers.
    """
    if driver is None:
        raise _no_driver("The package cuda-bindings is not installed")
    try:
        (status,) = driver.cuInit(0)
    except RuntimeError as error:  # What the bindings raise where there is no libcuda.so.1.
        raise _no_driver(f"The library of the CUDA driver cannot be loaded ({error})") from error
    if status != driver.CUresult.CUDA_SUCCESS:
        raise _no_driver(f"cuInit returned {status.name}")
    status, count = driver.cuDeviceGetCount()
    if status != driver.CUresult.CUDA_SUCCESS:
        raise _no_driver(f"cuDeviceGetCount returned {status.name}")
    return int(count)


def _no_driver(why: str) -> DeviceUnsuitable:
    return DeviceUnsuitable("No NVIDIA GPU answers on this machine.", why=f"{why}.", fix=_FIX)
