"""What the meter log asks of a disk, so that tests can be a worse one; and the real one."""

import fcntl
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol


class File(Protocol):
    """A file that is open for writing."""

    def write(self, data: bytes, offset: int) -> int:
        """Write at `offset`; answers how many bytes were taken, which may be fewer."""
        ...

    def fdatasync(self) -> None: ...

    def truncate(self, size: int) -> None: ...

    def close(self) -> None: ...


class Files(Protocol):
    """A file system. Every method may raise OSError."""

    def make_folder(self, folder: Path) -> None:
        """With its parents, readable by its owner only. Idempotent."""
        ...

    def lock(self, folder: Path) -> Callable[[], None]:
        """Take the folder for this process; the answer lets go of it.

        Raises:
            BlockingIOError: another process has it.
        """
        ...

    def names(self, folder: Path) -> Sequence[str]: ...

    def read(self, path: Path, *, offset: int = 0, size: int | None = None) -> bytes:
        """Up to `size` bytes from `offset` on; all of them when it is None."""
        ...

    def create(self, path: Path, size: int) -> File:
        """A file of `size` zero bytes for which the disk has set room aside."""
        ...

    def open(self, path: Path) -> File: ...

    def rename(self, old: Path, new: Path) -> None: ...

    def sync(self, path: Path) -> None:
        """Make durable what was written to a file, by whomever."""
        ...

    def sync_folder(self, folder: Path) -> None:
        """Make the folder's names durable."""
        ...


class LocalFile:
    """An open file descriptor."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def write(self, data: bytes, offset: int) -> int:
        return os.pwrite(self._descriptor, data, offset)

    def fdatasync(self) -> None:
        os.fdatasync(self._descriptor)

    def truncate(self, size: int) -> None:
        os.ftruncate(self._descriptor, size)

    def close(self) -> None:
        os.close(self._descriptor)


class LocalFiles:
    """The local file system."""

    def make_folder(self, folder: Path) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def lock(self, folder: Path) -> Callable[[], None]:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            raise
        return lambda: os.close(descriptor)

    def names(self, folder: Path) -> Sequence[str]:
        return os.listdir(folder)

    def read(self, path: Path, *, offset: int = 0, size: int | None = None) -> bytes:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(-1 if size is None else size)

    def create(self, path: Path, size: int) -> File:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError:
            # What was set aside in vain is somebody else's room.
            os.close(descriptor)
            path.unlink()
            raise
        return LocalFile(descriptor)

    def open(self, path: Path) -> File:
        return LocalFile(os.open(path, os.O_RDWR))

    def rename(self, old: Path, new: Path) -> None:
        old.rename(new)

    def sync(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fdatasync(descriptor)
        finally:
            os.close(descriptor)

    def sync_folder(self, folder: Path) -> None:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
