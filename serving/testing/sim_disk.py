"""A disk in memory that fails as disks do: power cuts, EIO, lying after a failed sync, no room."""

import errno
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from headrace.serving.metering.meterlog.files import File
from headrace.serving.metering.meterlog.format import SECTOR_BYTES


class PowerCut(OSError):
    """The machine is off; every later operation meets it as well."""


class Fault(Enum):
    """What one operation meets."""

    EIO = "an error, with nothing done; a failed sync also forgets what it should have written"
    SHORT = "a write that takes half of its bytes"
    HALF = "an error in the middle of a write"


class Survival(Enum):
    """What a power cut leaves of writes that were not synced."""

    NOTHING = "none of them"
    ALL = "all of them"
    PREFIX = "those before a random byte"
    SECTORS = "random sectors of them"


@dataclass(slots=True, eq=False)
class _Inode:
    """A file: what programs see, what is on the platters, and the difference as writes."""

    data: bytearray = field(default_factory=bytearray)
    durable: bytearray = field(default_factory=bytearray)
    writes: list[tuple[int, bytes]] = field(default_factory=list[tuple[int, bytes]])
    has_new_size: bool = False

    def sync(self) -> None:
        self.durable[:] = self.data
        self.forget()

    def forget(self) -> None:
        self.writes.clear()
        self.has_new_size = False

    def after_cut(self, rng: random.Random, survival: Survival) -> "_Inode":
        left = bytearray(self.durable)
        if self.has_new_size:
            if survival is Survival.NOTHING:
                return _Inode(bytearray(left), left)
            size = len(self.data)
            left[size:] = b""
            left += bytes(size - len(left))
        room = rng.randrange(sum(len(data) for _, data in self.writes) + 1)
        for offset, data in self.writes:
            if survival is Survival.ALL:
                kept = [(0, len(data))]
            elif survival is Survival.PREFIX:
                kept = [(0, min(len(data), room))]
                room -= kept[0][1]
            elif survival is Survival.SECTORS:
                kept = [part for part in _sectors(offset, len(data)) if rng.random() < 0.5]
            else:
                kept = []
            for begin, end in kept:
                left[offset + begin : offset + end] = data[begin:end]
        return _Inode(bytearray(left), left)


class SimDisk:
    """Implements Files. What a crash leaves is another disk: `after_power_cut`.

    Names become durable with their folder, in the order of the changes; contents with their file.
    """

    def __init__(self, *, free_bytes: int = 1 << 40) -> None:
        self.free_bytes = free_bytes
        self.operations = 0
        """Changes so far: a power cut or a fault is timed by it."""
        self.cut_at: int | None = None
        """After so many operations the power is gone."""
        self.faults: Mapping[int, Fault] = {}
        """By the number of the operation, from 0 on."""
        self.before: Callable[[str, Path], None] = lambda _operation, _path: None
        """Called ahead of every operation; it may look, wait, or raise."""
        self._names: dict[Path, _Inode] = {}
        self._durable_names: dict[Path, _Inode] = {}
        self._renames: list[tuple[Path, Path | None, _Inode]] = []
        """Changes of names that are not durable: new name, old name, file."""
        self._locked: set[Path] = set()

    def after_power_cut(self, rng: random.Random, survival: Survival | None = None) -> "SimDisk":
        """What the next start finds."""
        survival = survival or rng.choice(list(Survival))
        left = SimDisk(free_bytes=self.free_bytes)
        names = dict(self._durable_names)
        kept = rng.randrange(len(self._renames) + 1)
        for new, old, inode in self._renames[:kept]:
            if old is not None:
                names.pop(old, None)
            names[new] = inode
        for path, inode in names.items():
            left._names[path] = left._durable_names[path] = inode.after_cut(rng, survival)
        return left

    def after_kill(self) -> "SimDisk":
        """What the next process finds: the kernel keeps what was written."""
        self._locked.clear()
        self.cut_at = None
        self.faults = {}
        return self

    def flip(self, path: Path, offset: int, *, bit: int = 0) -> None:
        """A bit that rots."""
        for data in (self._names[path].data, self._names[path].durable):
            data[offset] ^= 1 << bit

    def delete(self, path: Path) -> None:
        """A file that somebody removes."""
        del self._names[path]
        del self._durable_names[path]

    def make_folder(self, folder: Path) -> None:
        del folder

    def lock(self, folder: Path) -> Callable[[], None]:
        if folder in self._locked:
            raise BlockingIOError(errno.EWOULDBLOCK, os.strerror(errno.EWOULDBLOCK))
        self._locked.add(folder)
        return lambda: self._locked.discard(folder)

    def names(self, folder: Path) -> Sequence[str]:
        return [path.name for path in self._names if path.parent == folder]

    def read(self, path: Path, *, offset: int = 0, size: int | None = None) -> bytes:
        data = self._inode(path).data
        return bytes(data[offset : len(data) if size is None else offset + size])

    def create(self, path: Path, size: int) -> File:
        self.operate("create", path)
        if path in self._names:
            self.free_bytes += len(self._names[path].data)
        if size > self.free_bytes:
            self._names.pop(path, None)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        self.free_bytes -= size
        inode = self._names[path] = _Inode(bytearray(size), has_new_size=True)
        self._renames.append((path, None, inode))
        return _SimFile(self, path, inode)

    def open(self, path: Path) -> File:
        return _SimFile(self, path, self._inode(path))

    def rename(self, old: Path, new: Path) -> None:
        self.operate("rename", old)
        inode = self._names[new] = self._names.pop(old)
        self._renames.append((new, old, inode))

    def sync(self, path: Path) -> None:
        self.operate("sync", path)
        self._inode(path).sync()

    def sync_folder(self, folder: Path) -> None:
        self.operate("sync_folder", folder)
        self._durable_names = dict(self._names)
        self._renames.clear()

    def operate(self, operation: str, path: Path) -> Fault | None:
        """Count an operation; the fault that it meets and has to deal with itself, if any."""
        if self.cut_at is not None and self.operations >= self.cut_at:
            raise PowerCut(errno.EIO, "the power is gone")
        self.before(operation, path)
        fault = self.faults.get(self.operations)
        self.operations += 1
        if fault is None or operation in ("write", "fdatasync"):
            return fault
        raise _eio(path)

    def _inode(self, path: Path) -> _Inode:
        try:
            return self._names[path]
        except KeyError:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from None


class _SimFile:
    """An open file."""

    def __init__(self, disk: SimDisk, path: Path, inode: _Inode) -> None:
        self._disk = disk
        self._path = path
        self._inode = inode

    def write(self, data: bytes, offset: int) -> int:
        fault = self._disk.operate("write", self._path)
        if fault is Fault.EIO:
            raise _eio(self._path)
        taken = data if fault is None else data[: len(data) // 2]
        self._inode.data[offset : offset + len(taken)] = taken
        self._inode.writes.append((offset, taken))
        if fault is Fault.HALF:
            raise _eio(self._path)
        return len(taken)

    def fdatasync(self) -> None:
        if self._disk.operate("fdatasync", self._path) is None:
            self._inode.sync()
            return
        # The pages are marked clean although the disk never got them.
        self._inode.forget()
        raise _eio(self._path)

    def truncate(self, size: int) -> None:
        self._disk.operate("truncate", self._path)
        self._disk.free_bytes += len(self._inode.data) - size
        self._inode.data[size:] = b""
        self._inode.has_new_size = True

    def close(self) -> None:
        pass


def _eio(path: Path) -> OSError:
    return OSError(errno.EIO, os.strerror(errno.EIO), str(path))


def _sectors(offset: int, length: int) -> Sequence[tuple[int, int]]:
    """The parts of a write that fall into one sector each, as bytes of the write."""
    first = -(offset % SECTOR_BYTES)
    return [
        (max(0, begin), min(length, begin + SECTOR_BYTES))
        for begin in range(first, length, SECTOR_BYTES)
    ]
