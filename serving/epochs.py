"""Which frontends of a home are alive: one locked file for each epoch.

An epoch is one life of one frontend process. The calls with a key and the batches that it runs are
its own for as long as it holds its lock; the operating system lets go of the lock when the process
dies, however it dies. So a new process can tell a crashed frontend's work from a busy neighbour's.
"""

import fcntl
import hashlib
import os
from pathlib import Path

from headrace.serving.errors import ConfigRefused


class EpochLock:
    """The lock of one live epoch. Released by `close`, or with the process."""

    def __init__(self, folder: Path, epoch: str) -> None:
        """Take the lock.

        Raises:
            ConfigRefused: a live process holds this epoch.
        """
        self._path = _path(folder, epoch)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = _try_lock(self._path, create=True)
        if descriptor is None:
            raise ConfigRefused(
                f"The epoch {epoch!r} is in use by a running frontend.",
                why="Two processes of one epoch would settle each other's requests.",
                fix="Give each frontend its own name, or stop the other one.",
            )
        self._descriptor: int | None = descriptor

    def close(self) -> None:
        """Let go; the file goes too, as nobody is left who could hold it. Idempotent."""
        if self._descriptor is not None:
            self._path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None


def is_alive(folder: Path, epoch: str) -> bool:
    """Whether a process holds the epoch. A file without a holder is removed."""
    path = _path(folder, epoch)
    descriptor = _try_lock(path, create=False)
    if descriptor is None:
        return path.exists()
    path.unlink(missing_ok=True)
    os.close(descriptor)
    return False


def _try_lock(path: Path, *, create: bool) -> int | None:
    """A descriptor that holds the lock of the file that `path` names, or None.

    Between opening and locking, the former holder may have removed the file; a lock on a file
    without a name keeps nobody out, so that is tried again.
    """
    flags = os.O_RDWR | (os.O_CREAT if create else 0)
    while True:
        try:
            descriptor = os.open(path, flags, 0o600)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except FileNotFoundError:
            pass
        os.close(descriptor)


def _path(folder: Path, epoch: str) -> Path:
    """Epochs are free text; a digest of one is a file name."""
    return folder / f"{hashlib.sha256(epoch.encode()).hexdigest()[:32]}.lock"
