"""`headrace models push`: an artifact of this home to a store, in parts."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path

from headrace.compile.progress import Progressing
from headrace.compile.remote.descriptor import (
    Descriptor,
    Part,
    RemoteFile,
    descriptor_key,
    read_descriptor,
    versions_of,
)
from headrace.compile.remote.parallel import Transfer, transfer_all
from headrace.compile.remote.patience import Remote
from headrace.compile.signing import Keys, SigningKey, keys_of, signing_key
from headrace.compile.store import Store
from headrace.serving.domain.artifact import MANIFEST_FILE, Manifest
from headrace.serving.domain.file_digest import PART_BYTES
from headrace.serving.domain.signature import SIGNATURE_FILE
from headrace.serving.engine.artifact_home import hold
from headrace.serving.engine.loader import signed_manifest, verify_files
from headrace.serving.errors import ArtifactTampered, ArtifactUntrusted, RemoteStoreFault

CREATE_TRIES = 32
"""Numbers that others may take while we ask for the next: as many pushers of one model at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pushed:
    version: int
    """On the store, which counts by itself."""
    artifact_id: str
    is_new: bool
    """False: the same version was there already."""
    sent_bytes: int
    kept_bytes: int
    """Of parts that were there already."""


@dataclass(frozen=True, slots=True)
class _Cut:
    """A part of a file that is to be sent."""

    path: Path
    offset: int
    part_bytes: int


def push(
    store: Store,
    folder: Path,
    remote: Remote,
    *,
    model: str,
    progress: Progressing,
    part_bytes: int = PART_BYTES,
) -> Pushed:
    """Send an artifact. Idempotent: parts that are there are kept, and so is the version.

    Killed or refused in between, it leaves parts that nothing names; run again, it goes on.

    Args:
        store: of this home.
        folder: of the artifact in it.
        remote: where to.
        model: what it is called there.
        progress: told of every part.
        part_bytes: of each part but the last of a file; at most `PART_BYTES`.

    Raises:
        ArtifactTampered, ArtifactUntrusted: the artifact is not what was built, or this home's key
            cannot be read.
        RemoteStoreFault: the store does not answer, or keeps saying that others were first.
    """
    held = hold(folder)
    try:
        progress.stage(f"check {model}")
        manifest = signed_manifest(folder)
        verify_files(folder, manifest)
        cuts = _cut(folder, manifest, part_bytes)
        progress.stage(f"send {model} to {remote.url}")
        sent = transfer_all([_sending(remote, cut) for cut in cuts], progress)
    finally:
        os.close(held)
    descriptor = Descriptor(
        model=model,
        variant=manifest.variant,
        artifact_id=manifest.artifact_id,
        pushed_at=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        files=_files(folder, manifest, cuts, [part for part, _ in sent]),
    )
    key = signing_key(store.home)
    version, is_new = _named(remote, descriptor, key, keys_of(store.home))
    kept_bytes = sum(part.part_bytes for part, was_sent in sent if not was_sent)
    return Pushed(
        version=version,
        artifact_id=manifest.artifact_id,
        is_new=is_new,
        sent_bytes=descriptor.total_bytes - kept_bytes,
        kept_bytes=kept_bytes,
    )


def _cut(folder: Path, manifest: Manifest, part_bytes: int) -> Sequence[_Cut]:
    cuts: list[_Cut] = []
    for name in _names(manifest):
        path = folder / name
        size = path.stat().st_size
        cuts += [
            _Cut(path, offset, min(part_bytes, size - offset))
            for offset in range(0, size, part_bytes)
        ]
    return cuts


def _sending(remote: Remote, cut: _Cut) -> Transfer[tuple[Part, bool]]:
    def send() -> tuple[Part, bool]:
        with cut.path.open("rb") as file:
            file.seek(cut.offset)
            content = file.read(cut.part_bytes)
        part = Part(sha256=sha256(content).hexdigest(), part_bytes=len(content))
        if remote.holds(part.key, content):
            return part, False
        remote.put(part.key, content)
        return part, True

    return Transfer(cut.part_bytes, send)


def _files(
    folder: Path, manifest: Manifest, cuts: Sequence[_Cut], parts: Sequence[Part]
) -> tuple[RemoteFile, ...]:
    by_path: dict[Path, list[Part]] = {folder / name: [] for name in _names(manifest)}
    for cut, part in zip(cuts, parts, strict=True):
        by_path[cut.path].append(part)
    return tuple(
        RemoteFile(name=path.name, parts=tuple(its_parts)) for path, its_parts in by_path.items()
    )


def _names(manifest: Manifest) -> Sequence[str]:
    return [*sorted(manifest.files), MANIFEST_FILE, SIGNATURE_FILE]


def _named(
    remote: Remote, descriptor: Descriptor, key: SigningKey, trusted: Keys
) -> tuple[int, bool]:
    """Make the parts a version, the next that is free, and sign it; whether it is a new one."""
    looked_at: set[int] = set()
    for _ in range(CREATE_TRIES):
        there = versions_of(remote, descriptor.model)
        for number in sorted(set(there) - looked_at, reverse=True):
            if _is_same(remote, number, descriptor, trusted):
                return number, False
        looked_at.update(there)
        number = max(there, default=0) + 1
        signed = descriptor.numbered(number).signed(key)
        if remote.create(descriptor_key(descriptor.model, number), signed.to_json()):
            return number, True
    raise RemoteStoreFault(
        f"The store {remote.url} gave every number of {descriptor.model!r} to somebody else.",
        why=f"{CREATE_TRIES} times another was first.",
        fix="Run the same command again; the parts are there.",
    )


def _is_same(remote: Remote, number: int, descriptor: Descriptor, trusted: Keys) -> bool:
    try:
        found = read_descriptor(remote, descriptor.model, number, trusted)
    except (ArtifactTampered, ArtifactUntrusted):
        return False  # It is damaged, or a stranger's; the next number is taken.
    return found.artifact_id == descriptor.artifact_id and found.files == descriptor.files
