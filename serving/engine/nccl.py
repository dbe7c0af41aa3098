"""NCCL between the GPUs of a replica: TensorRT's collectives inside a stage, copies between stages.

Whoever starts the ranks makes one id for each group with `new_group_id` and gives it to all of the
group; joining waits for all of them. The library is loaded when it is first used, by ctypes: six
functions of its stable C interface (nccl.h, NCCL 2) are all it takes.
"""

import ctypes
from ctypes import POINTER, byref, c_char, c_char_p, c_int, c_size_t, c_void_p
from functools import cache
from typing import Final

from headrace.serving.errors import DeviceUnsuitable, EngineFault

LIBRARY = "libnccl.so.2"
GROUP_ID_BYTES: Final = 128
"""NCCL_UNIQUE_ID_BYTES."""

_UINT8: Final = 1
"""ncclUint8: what passes between stages is bytes to NCCL."""


class _GroupId(ctypes.Structure):
    _fields_ = (("internal", c_char * GROUP_ID_BYTES),)


@cache
def _nccl() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise DeviceUnsuitable(
            f"{LIBRARY} cannot be loaded.",
            why=f"A replica of several GPUs exchanges tensors through it: {error}.",
            fix="Install it with `pip install nvidia-nccl-cu13` and put its folder into "
            "LD_LIBRARY_PATH.",
        ) from error
    library.ncclGetErrorString.restype = c_char_p
    library.ncclGetErrorString.argtypes = (c_int,)
    library.ncclGetUniqueId.argtypes = (POINTER(_GroupId),)
    library.ncclCommInitRank.argtypes = (POINTER(c_void_p), c_int, _GroupId, c_int)
    library.ncclCommDestroy.argtypes = (c_void_p,)
    transfer = (c_void_p, c_size_t, c_int, c_int, c_void_p, c_void_p)
    library.ncclSend.argtypes = library.ncclRecv.argtypes = transfer
    return library


def new_group_id() -> bytes:
    """An id for one group of ranks.

    Raises:
        DeviceUnsuitable: NCCL is not installed.
    """
    made = _GroupId()
    _require(_nccl().ncclGetUniqueId(byref(made)), "ncclGetUniqueId")
    return bytes(made)


class NcclCommunicator:
    """Implements `Communicator`.

    Args:
        group_id: of `new_group_id`, the same for all of the group.
        ranks: in the group.
        rank: this one among them. Its device is current on the calling thread.

    Raises:
        DeviceUnsuitable: NCCL is not installed.
        EngineFault: the ranks did not find each other.
    """

    def __init__(self, group_id: bytes, *, ranks: int, rank: int) -> None:
        assert len(group_id) == GROUP_ID_BYTES
        made = c_void_p()
        named = _GroupId.from_buffer_copy(group_id)
        _require(_nccl().ncclCommInitRank(byref(made), ranks, named, rank), "ncclCommInitRank")
        self._pointer: int | None = made.value

    @property
    def pointer(self) -> int:
        """The `ncclComm_t`."""
        assert self._pointer is not None, "the communicator was closed"
        return self._pointer

    @property
    def capsule(self) -> object:
        wrap = ctypes.pythonapi.PyCapsule_New
        wrap.restype, wrap.argtypes = ctypes.py_object, (c_void_p, c_char_p, c_void_p)
        return wrap(self.pointer, None, None)

    def close(self) -> None:
        """Leave the group."""
        if self._pointer is not None:
            pointer, self._pointer = self._pointer, None
            _require(_nccl().ncclCommDestroy(pointer), "ncclCommDestroy")


class NcclChannel:
    """Implements `HiddenChannel` in a group of one rank from each stage, in their order.

    Args:
        group: which the channel owns.
        stage: this rank's; neighbours are one before and one after.
    """

    def __init__(self, group: NcclCommunicator, *, stage: int) -> None:
        self._group = group
        self._stage = stage

    def receive(self, address: int, num_bytes: int, stream: int) -> None:
        self._move("ncclRecv", address, num_bytes, self._stage - 1, stream)

    def send(self, address: int, num_bytes: int, stream: int) -> None:
        self._move("ncclSend", address, num_bytes, self._stage + 1, stream)

    def close(self) -> None:
        self._group.close()

    def _move(self, name: str, address: int, num_bytes: int, peer: int, stream: int) -> None:
        move = getattr(_nccl(), name)
        _require(move(address, num_bytes, _UINT8, peer, self._group.pointer, stream), name)


def _require(status: int, name: str) -> None:
    if status:
        said = _nccl().ncclGetErrorString(status).decode("utf-8", "replace")
        raise EngineFault(
            f"The GPUs of the replica do not reach each other: {name} returned {status}.",
            why=f"NCCL says: {said}.",
            fix="Restart all ranks of the replica together; NCCL_DEBUG=WARN says more.",
        )
