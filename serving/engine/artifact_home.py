"""What a home keeps beside an artifact: who may have signed it, when and by whom it is used.

An artifact lies in `<home>/artifacts/<id>`; this is the one place that goes from there to `<home>`.
Whoever uses an artifact holds a shared lock on its manifest, and the collector of garbage takes it
exclusively before it removes one.
"""

import errno
import fcntl
import os
from pathlib import Path

from headrace.serving.domain.artifact import MANIFEST_FILE
from headrace.serving.errors import ArtifactTampered

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
        ArtifactTampered: there is no manifest, or the folder was replaced meanwhile.
    """
    path = artifact / MANIFEST_FILE
    try:
        held = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise _gone(artifact, f"{MANIFEST_FILE} is not readable: {error.strerror}.") from error
    try:
        # Waits only while the collector looks at it; where it went on to remove it, it is gone.
        fcntl.flock(held, fcntl.LOCK_SH)
        if not _is_at(held, path):
            raise _gone(artifact, "It was removed or replaced while it was opened.")
        _stamp(stamp_file(artifact))
    except BaseException:
        os.close(held)
        raise
    return held


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
