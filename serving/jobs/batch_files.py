"""The private files of a batch: what is to be run, and what came of it.

    batches/<batch id>/requests     frames: u32 length, u32 CRC-32, payload; fsynced before QUEUED
    batches/<batch id>/results.jsonl  appended in groups; its committed length is in the store

Readable by their owner only. Nothing of them is ever logged.
"""

import os
import shutil
import struct
import zlib
from collections.abc import Container, Iterator
from contextlib import suppress
from pathlib import Path

from headrace.serving.errors import StorageFull

_HEAD = struct.Struct(">II")
_REQUESTS = "requests"
_RESULTS = "results.jsonl"


class Damaged(Exception):
    """The requests are not what was written."""


class RequestsWriter:
    """Writes the requests of a new batch, one frame each. `finish` makes them durable."""

    def __init__(self, folder: Path) -> None:
        """Make the folder and the file.

        Raises:
            StorageFull: there is no room.
        """
        try:
            folder.mkdir(mode=0o700, parents=True)
            self._file = os.fdopen(_opened(folder / _REQUESTS, os.O_EXCL), "wb")
        except OSError as error:
            raise full(error) from error
        self._folder = folder
        self.size = 0

    def add(self, payload: bytes) -> None:
        """Append one frame.

        Raises:
            StorageFull: there is no room.
        """
        try:
            self._file.write(_HEAD.pack(len(payload), zlib.crc32(payload)))
            self._file.write(payload)
        except OSError as error:
            raise full(error) from error
        self.size += _HEAD.size + len(payload)

    def finish(self) -> None:
        """Make all of it durable, and close.

        Raises:
            StorageFull: there is no room.
        """
        try:
            with self._file:
                self._file.flush()
                os.fsync(self._file.fileno())
            _sync_folder(self._folder)
            _sync_folder(self._folder.parent)
        except OSError as error:
            raise full(error) from error

    def close(self) -> None:
        """Let go of the file; without `finish` it is worth nothing. Idempotent."""
        with suppress(OSError):  # Of the last bytes, which nobody wants.
            self._file.close()


def requests(folder: Path, *, lines: int, without: Container[int]) -> Iterator[tuple[int, bytes]]:
    """Number, from 1, and payload of every line that is not in `without`, one at a time.

    Raises:
        Damaged: there are not `lines` frames, or one is not what was written.
    """
    try:
        file = open(folder / _REQUESTS, "rb")  # noqa: SIM115  Closed below; it may be missing.
    except OSError as error:
        raise Damaged(f"its requests cannot be read: {error.strerror}") from error
    with file:
        for number in range(1, lines + 1):
            head = file.read(_HEAD.size)
            if len(head) < _HEAD.size:
                raise Damaged("its requests are cut short")
            length, checksum = _HEAD.unpack(head)
            if number in without:
                file.seek(length, os.SEEK_CUR)
                continue
            payload = file.read(length)
            if len(payload) < length or zlib.crc32(payload) != checksum:
                raise Damaged("its requests are not what was written")
            yield number, payload


def append_results(folder: Path, *, at: int, text: bytes) -> int:
    """Write `text` at the committed end and make it durable; the new end.

    What stands after `at` was never committed: a process died there. It is cut off first.
    """
    descriptor = _opened(folder / _RESULTS, 0)
    try:
        os.ftruncate(descriptor, at)
        written = 0
        while written < len(text):
            written += os.pwrite(descriptor, text[written:], at + written)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if at == 0:
        _sync_folder(folder)
    return at + len(text)


def read_results(folder: Path, *, offset: int, size: int) -> bytes:
    """At most `size` bytes from `offset` on. The caller keeps within the committed length."""
    with open(folder / _RESULTS, "rb") as file:
        file.seek(offset)
        return file.read(size)


def remove(folder: Path) -> None:
    """Remove everything of a batch. Idempotent, also beside another process that does it."""

    def failed(_: object, path: str, error: BaseException) -> None:
        if not isinstance(error, FileNotFoundError):
            raise OSError(f"{path} cannot be removed") from error

    shutil.rmtree(folder, onerror=lambda f, path, info: failed(f, path, info[1]))


def full(error: OSError) -> StorageFull:
    return StorageFull(
        f"The batch cannot be written: {error.strerror}.",
        why="Requests and results are kept on disk until the batch is deleted.",
        fix="Free space under HEADRACE_HOME, or delete batches that have ended.",
    )


def _opened(path: Path, flags: int) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o600)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
