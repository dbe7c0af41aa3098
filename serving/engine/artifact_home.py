"""What a home keeps beside an artifact: who may have signed it, when and by whom it is used.

An artifact lies in `<home>/artifacts/<id>`; this is the one place that goes from there to `<home>`.
Whoever uses an artifact holds a shared lock on its manifest. Whoever removes the artifact or
replaces the manifest takes it exclusively.
"""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from headrace.serving.domain.artifact import MANIFEST_FILE
from headrace.serving.errors import ArtifactTampered

HOLD_TRIES = 3
"""Each other one means that a manifest was replaced in the moment it was opened."""

_READ_ONLY = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})


def trust_folder(artifact: Path) -> Path:
    """The public keys whose signatures count in the artifact's home: one PEM file each."""
    return artifact.parent.parent / "trust"


def stamp_file(artifact: Path) -> Path:
    """The file whose modification time is when the artifact was last used."""
    return artifact.parent.parent / "uses" / artifact.name


def hold(artifact: Path) -> int:
    """Lock the artifact against removal and stamp it as used.

    Returns:
        The descriptor that holds the lock; whoever closes it, or ends, lets go.

    Raises:
        ArtifactTampered: there is no manifest, or it kept being replaced.
    """
    path = artifact / MANIFEST_FILE
    for _ in range(HOLD_TRIES):
        try:
            held = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise _gone(artifact, f"{MANIFEST_FILE} is not readable: {error.strerror}.") from error
        try:
            # Waits only while another looks whether it is used, and acts on it in an instant.
            fcntl.flock(held, fcntl.LOCK_SH)
            if _is_at(held, path):
                _stamp(stamp_file(artifact))
                return held
        except BaseException:
            os.close(held)
            raise
        os.close(held)
    raise _gone(artifact, f"It was replaced {HOLD_TRIES} times while it was opened.")


@contextmanager
def nobody_uses(artifact: Path) -> Iterator[bool]:
    """Hold the lock that users of an artifact share; False where one of them has it."""
    try:
        # Nothing is written; NFS gives an exclusive lock on no other descriptor.
        held = os.open(artifact / MANIFEST_FILE, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        yield True  # Without its manifest nobody can have loaded it.
        return
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(held)


def _is_at(held: int, path: Path) -> bool:
    """Whether the open file is still the one at the path."""
    try:
        return os.path.samestat(os.fstat(held), os.stat(path))
    except FileNotFoundError:
        return False


def _stamp(path: Path) -> None:
    """A folder that is no home has no stamps."""
    if not path.parent.is_dir():
        return
    try:
        path.touch()
    except OSError as error:
        # A home that is mounted for reading: it is collected elsewhere, by what is stamped there.
        if error.errno not in _READ_ONLY:
            raise


def _gone(artifact: Path, why: str) -> ArtifactTampered:
    return ArtifactTampered(
        f"The artifact {artifact} is not there.",
        why=why,
        fix="Build it again with `headrace compile`, or fetch it with `headrace models fetch`.",
    )
