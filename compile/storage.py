"""Folders that appear whole or not at all: written beside their place, synced, then renamed."""

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from headrace.serving.errors import StorageFull

# No room on the device, no room in the quota, longer than a file may become.
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock between processes; waits for it. The file stays behind, empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def locked_if_free(path: Path) -> Iterator[bool]:
    """Like `locked`, but answer False instead of waiting where another holds the lock."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


@contextmanager
def staged(place: Path) -> Iterator[Path]:
    """Yield a folder to fill; when the block ends well it becomes `place`, replacing what is there.

    When the block raises, nothing of it remains. The caller holds the lock of `place`, so leavings
    of a process that was killed are nobody's, and are removed first.

    Raises:
        StorageFull: the disk has no room.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    for leaving in place.parent.glob(f".{place.name}.*"):
        shutil.rmtree(leaving, ignore_errors=True)
    with refusing_when_full(place):
        folder = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
        try:
            yield folder
            publish(folder, place)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def publish(folder: Path, place: Path) -> None:
    """Make a folder durable and rename it to `place` beside it, replacing what is there."""
    folder.chmod(0o755)
    _sync(folder)
    if place.exists():
        remove(place)
    folder.rename(place)
    _sync_folder(place.parent)


def remove(place: Path) -> None:
    """Take a folder away at once: a crash leaves it whole, or hidden for the next to remove."""
    hidden = place.with_name(f".{place.name}.removed")
    shutil.rmtree(hidden, ignore_errors=True)
    place.rename(hidden)
    _sync_folder(place.parent)
    shutil.rmtree(hidden)


@contextmanager
def refusing_when_full(place: Path) -> Iterator[None]:
    """Turn the system's "no space" into a refusal.

    Raises:
        StorageFull: the block ran out of room.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise _full(place, f"{os.strerror(error.errno)} while it was written.") from error


def require_room(place: Path, *, needed_bytes: int) -> None:
    """Refuse early what will not fit on the disk that holds `place`.

    Raises:
        StorageFull: fewer than `needed_bytes` are free there.
    """
    place.mkdir(parents=True, exist_ok=True)
    free_bytes = shutil.disk_usage(place).free
    if free_bytes < needed_bytes:
        raise _full(place, f"{needed_bytes:,} bytes are needed and {free_bytes:,} are free.")


def write_atomically(path: Path, text: str, *, mode: int = 0o644) -> None:
    """Replace a small file; a reader sees the old text or the new, whole.

    Raises:
        StorageFull: the disk has no room.
    """
    with refusing_when_full(path):
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as file:
            beside = Path(file.name)
            try:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
                beside.chmod(mode)
                beside.rename(path)
            finally:
                beside.unlink(missing_ok=True)
        _sync_folder(path.parent)


def _sync(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _full(place: Path, why: str) -> StorageFull:
    return StorageFull(
        f"The disk has no room for {place}.",
        why=why,
        fix="Free space on that disk, or point HEADRACE_HOME at another one.",
    )
