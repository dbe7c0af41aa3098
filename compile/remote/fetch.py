"""`headrace models fetch`: a version on a store into this home, whole and trusted or not at all."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from headrace.compile.names_index import Cause
from headrace.compile.progress import Progressing
from headrace.compile.remote.descriptor import Descriptor, Part, RemoteFile, find
from headrace.compile.remote.parallel import Transfer, transfer_all
from headrace.compile.remote.patience import Remote
from headrace.compile.remote.seen import remember, require_no_older
from headrace.compile.signing import keys_of
from headrace.compile.storage import locked, publish, refusing_when_full, require_room
from headrace.compile.store import Store, check_name
from headrace.serving.domain.artifact import MANIFEST_FILE, Manifest
from headrace.serving.domain.signature import SIGNATURE_BYTES_MAX, SIGNATURE_FILE
from headrace.serving.engine.loader import MANIFEST_BYTES_MAX, signed_manifest, verify_files
from headrace.serving.errors import ArtifactError, ArtifactTampered, ArtifactUntrusted


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    folder: Path
    version: int
    """In this home, which counts by itself; it is current of its variant."""
    remote_version: int
    artifact_id: str
    is_new: bool
    """False: the artifact was here already."""
    received_bytes: int
    kept_bytes: int
    """Of parts that an earlier try had left."""


def fetch(
    store: Store,
    remote: Remote,
    *,
    model: str,
    number: int | None,
    variant: str | None,
    progress: Progressing,
) -> Fetched:
    """Bring a version here and make it current of its variant. Idempotent.

    Nothing is believed of a descriptor that no trusted key signed. Then the manifest's signature is
    verified before the large files are asked for, every part before it is written, every file
    before the folder appears. A try that was killed leaves a hidden folder,
    whose right parts the next one keeps.

    Args:
        store: of this home.
        remote: where from.
        model: what it is called there, and here.
        number: of the version there; None takes the newest, unless this home has seen a newer one.
        variant: the newest of this one.
        progress: told of every part.

    Raises:
        ModelNotFound: there is no such version.
        ArtifactTampered: a descriptor, a part, a file or a signature does not fit, or what is there
            is older than what was there.
        ArtifactUntrusted: descriptor or manifest was signed with a key that is not trusted here.
        RemoteStoreFault: the store does not answer.
        StorageFull: the disk has no room.
    """
    progress.stage(f"look for {model} at {remote.url}")
    descriptor = find(remote, check_name(model), number, variant, keys_of(store.home))
    if number is None:
        require_no_older(store.home, remote, descriptor, variant)
    remember(store.home, remote, descriptor)
    place = store.folder(descriptor.artifact_id)
    with locked(store.lock_file(descriptor.artifact_id)):
        received = kept = 0
        manifest = _here(place)
        is_new = manifest is None
        if manifest is not None:
            _require_same(descriptor, manifest)
        else:
            with refusing_when_full(place):
                manifest, received, kept = _bring(remote, descriptor, place, progress)
        version = store.register(manifest, model=model, cause=Cause.FETCH)
    return Fetched(
        folder=place,
        version=version.version,
        remote_version=descriptor.version,
        artifact_id=manifest.artifact_id,
        is_new=is_new,
        received_bytes=received,
        kept_bytes=kept,
    )


def _here(place: Path) -> Manifest | None:
    """The manifest of an artifact that is here whole; None where it is not."""
    if not place.is_dir():
        return None
    try:
        manifest = signed_manifest(place)
        verify_files(place, manifest)
    except ArtifactError:
        return None
    return manifest


def _bring(
    remote: Remote, descriptor: Descriptor, place: Path, progress: Progressing
) -> tuple[Manifest, int, int]:
    """Fill the hidden folder and publish it; the manifest, bytes received and bytes kept."""
    partial = place.with_name(f".{place.name}.fetch")
    partial.mkdir(parents=True, exist_ok=True)
    files = {file.name: file for file in descriptor.files}
    try:
        manifest = _proved(remote, descriptor, files, partial)
    except (ArtifactTampered, ArtifactUntrusted):
        shutil.rmtree(partial)
        raise
    require_room(partial, needed_bytes=descriptor.total_bytes - _allocated(partial))
    for leftover in partial.iterdir():
        if leftover.name not in files:
            leftover.unlink()
    progress.stage(f"receive {manifest.model} ({descriptor.total_bytes / 1e6:,.0f} MB)")
    transfers = [each for name in manifest.files for each in _parts(remote, files[name], partial)]
    arrived = transfer_all(transfers, progress)
    progress.stage("verify every file")
    try:
        verify_files(partial, manifest)
    except ArtifactTampered:
        # The parts are what the descriptor says, and that is not what was signed.
        shutil.rmtree(partial)
        raise
    publish(partial, place)
    sizes = zip((each.part_bytes for each in transfers), arrived, strict=True)
    received = sum(part_bytes for part_bytes, came in sizes if came)
    return manifest, received, sum(each.part_bytes for each in transfers) - received


def _proved(
    remote: Remote, descriptor: Descriptor, files: Mapping[str, RemoteFile], partial: Path
) -> Manifest:
    """The manifest, signed by whom we trust, and promising what the descriptor lists."""
    limits = {MANIFEST_FILE: MANIFEST_BYTES_MAX, SIGNATURE_FILE: SIGNATURE_BYTES_MAX}
    for name, bytes_max in limits.items():
        if name not in files or files[name].file_bytes > bytes_max:
            raise _differs(descriptor, f"It lists no {name} of at most {bytes_max:,} bytes.")
        for transfer in _parts(remote, files[name], partial):
            transfer.run()
    manifest = signed_manifest(partial)
    _require_same(descriptor, manifest)
    if files.keys() != {*manifest.files, MANIFEST_FILE, SIGNATURE_FILE}:
        raise _differs(descriptor, "Its files are others than those in the manifest.")
    return manifest


def _require_same(descriptor: Descriptor, manifest: Manifest) -> None:
    """Two signatures, one artifact."""
    if manifest.artifact_id != descriptor.artifact_id:
        raise _differs(descriptor, f"The manifest is that of {manifest.artifact_id[:12]}.")
    if manifest.variant != descriptor.variant:
        raise _differs(descriptor, f"The manifest says that it is {manifest.variant}.")


def _parts(remote: Remote, file: RemoteFile, partial: Path) -> list[Transfer[bool]]:
    """Make room for a file, and say what has to come; each answers whether it had to."""
    path = partial / file.name
    path.touch()
    os.truncate(path, file.file_bytes)
    transfers: list[Transfer[bool]] = []
    offset = 0
    for part in file.parts:
        transfers.append(_receiving(remote, part, path, offset))
        offset += part.part_bytes
    return transfers


def _receiving(remote: Remote, part: Part, path: Path, offset: int) -> Transfer[bool]:
    def receive() -> bool:
        with path.open("r+b") as file:
            file.seek(offset)
            if sha256(file.read(part.part_bytes)).hexdigest() == part.sha256:
                return False
            content = remote.get(part.key, bytes_max=part.part_bytes)
            if content is None or sha256(content).hexdigest() != part.sha256:
                found = "is gone" if content is None else "has another hash"
                raise ArtifactTampered(
                    f"A part of {path.name} at {remote.url} {found}.",
                    why=f"{part.key} holds what has that SHA-256, or nothing.",
                    fix="Push the version again from a home that has it: parts that are wrong are "
                    "replaced. Then fetch again; the right ones are kept.",
                )
            file.seek(offset)
            file.write(content)
        return True

    return Transfer(part.part_bytes, receive)


def _allocated(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.iterdir())


def _differs(descriptor: Descriptor, why: str) -> ArtifactTampered:
    return ArtifactTampered(
        f"The descriptor of {descriptor.model} {descriptor.artifact_id[:12]} is not that of what "
        "was signed.",
        why=why,
        fix="Push the version again from a home that has it, and fetch that.",
    )
