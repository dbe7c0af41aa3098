"""What we call of TensorRT at run time; the same in `tensorrt` 11 and `tensorrt_rtx` 1.7.

Type checkers hold our code to these protocols, tests/serving/engine/test_tensorrt_contract.py holds
the protocols to the libraries' own signatures, and `serving/testing/fake_tensorrt.py` obeys the
rules that the libraries' documentation states for them.
"""

from collections.abc import Sequence
from typing import Any, Protocol


class Severity(Protocol):
    @property
    def name(self) -> str:
        """INTERNAL_ERROR, ERROR, WARNING, INFO or VERBOSE."""
        ...


class DataType(Protocol):
    @property
    def name(self) -> str:
        """For example INT32, FLOAT or BF16."""
        ...


class TensorIOMode(Protocol):
    @property
    def name(self) -> str:
        """INPUT, OUTPUT or NONE."""
        ...


class IExecutionContext(Protocol):
    """One way through an engine, with its own profile, shapes and addresses."""

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool: ...

    def set_device_memory(self, memory: int, size: int) -> None: ...

    def set_communicator(self, communicator: object) -> bool: ...

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool: ...

    def set_tensor_address(self, name: str, memory: int) -> bool: ...

    def execute_async_v3(self, stream_handle: int) -> bool: ...


class ICudaEngine(Protocol):
    """A plan whose weights lie on the device. Lives until its last context is gone."""

    weight_streaming_budget_v2: int

    @property
    def device_memory_size_v2(self) -> int: ...

    @property
    def num_io_tensors(self) -> int: ...

    @property
    def num_optimization_profiles(self) -> int: ...

    @property
    def streamable_weights_size(self) -> int: ...

    def create_execution_context(self, strategy: Any) -> IExecutionContext | None: ...

    def get_aliased_input_tensor(self, name: str) -> str | None: ...

    def get_tensor_dtype(self, name: str) -> DataType: ...

    def get_tensor_mode(self, name: str) -> TensorIOMode: ...

    def get_tensor_name(self, index: int) -> str: ...

    def get_tensor_shape(self, name: str) -> Sequence[int]: ...


class Runtime(Protocol):
    """Reads plans. Never made without a driver: the library would end the process."""

    def deserialize_cuda_engine(self, serialized_engine: Any) -> ICudaEngine | None: ...


class ExecutionContextAllocationStrategy(Protocol):
    @property
    def USER_MANAGED(self) -> Any: ...


class Library(Protocol):
    """The module `tensorrt` or `tensorrt_rtx`."""

    @property
    def __name__(self) -> str: ...

    @property
    def __version__(self) -> str: ...

    @property
    def ExecutionContextAllocationStrategy(self) -> ExecutionContextAllocationStrategy: ...

    @property
    def ILogger(self) -> type[Any]: ...

    def Runtime(self, logger: Any) -> Runtime: ...
