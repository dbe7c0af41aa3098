"""Removes artifacts that nobody needs, the longest unused first, until the rest is small enough.

Never removed is what the configuration names (current, pinned, and the one a rollback would bring
back) and what a living process has loaded, which holds a lock on its manifest. An artifact leaves
the index first, then its folder in one rename: interrupted anywhere, it is whole or not visible.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from headrace.compile.names_index import ARTIFACT_ID
from headrace.compile.storage import locked_if_free, remove
from headrace.compile.store import Store
from headrace.serving.config import ModelConfig
from headrace.serving.engine.artifact_home import nobody_uses, stamp_file


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """An artifact of the home."""

    artifact_id: str
    folder: Path
    total_bytes: int
    used_unix_s: float
    """When it was last loaded; when it was built, where it never was."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """What was removed, or would be."""

    removed: Sequence[Candidate]
    kept_bytes: int
    """Of all artifacts that remain."""
    needed: Mapping[str, str]
    """Artifact id to why it is kept whatever its age."""
    leavings: Sequence[str]
    """Folders that killed builds and fetches had left."""

    @property
    def freed_bytes(self) -> int:
        return sum(each.total_bytes for each in self.removed)


def collect(
    store: Store, models: Sequence[ModelConfig], *, keep_bytes: int, dry_run: bool
) -> Collected:
    """Remove artifacts until at most `keep_bytes` remain, or only what is needed.

    Args:
        store: of the home.
        models: those that are configured, served or not.
        keep_bytes: of all artifacts together.
        dry_run: say what would be removed; remove nothing.

    Raises:
        ArtifactTampered: an index is damaged, so that what is needed is not known.
    """
    found = _artifacts(store)
    needed = dict.fromkeys(referenced(store, models), "configured")
    total, removed = sum(each.total_bytes for each in found), list[Candidate]()
    for each in sorted(found, key=lambda candidate: candidate.used_unix_s):
        if total <= keep_bytes:
            break
        if each.artifact_id in needed:
            continue
        refused = _remove(store, models, each, dry_run=dry_run)
        if refused:
            needed[each.artifact_id] = refused
            continue
        removed.append(each)
        total -= each.total_bytes
    return Collected(
        removed=removed,
        kept_bytes=total,
        needed=needed,
        leavings=_leavings(store, dry_run=dry_run),
    )


def referenced(store: Store, models: Sequence[ModelConfig]) -> frozenset[str]:
    """The artifacts that a deployment may ask for: current, pinned, and a rollback away.

    Raises:
        ArtifactTampered: an index is damaged.
    """
    found: set[str] = set()
    for model in models:
        index, variant = store.index(model.name), model.variant or f"cpu/{model.precision}"
        pinned = None if model.version is None else index.of(model.version)
        versions = (index.current(variant), index.before(variant), pinned)
        found.update(each.artifact_id for each in versions if each)
    return frozenset(found)


def _artifacts(store: Store) -> Sequence[Candidate]:
    folders = [path for path in store.artifacts.glob("*") if ARTIFACT_ID.fullmatch(path.name)]
    return [
        Candidate(
            artifact_id=folder.name,
            folder=folder,
            total_bytes=sum(file.stat().st_size for file in folder.iterdir()),
            used_unix_s=_used_unix_s(folder),
        )
        for folder in folders
    ]


def _used_unix_s(folder: Path) -> float:
    built, stamp = folder.stat().st_mtime, stamp_file(folder)
    return max(built, stamp.stat().st_mtime) if stamp.exists() else built


def _remove(
    store: Store, models: Sequence[ModelConfig], candidate: Candidate, *, dry_run: bool
) -> str:
    """Remove an artifact; why not, where it is needed after all."""
    lock = store.lock_file(candidate.artifact_id)
    with locked_if_free(lock) as is_free, nobody_uses(candidate.folder) as is_unused:
        if not is_free:
            return "being built, fetched or removed"
        if not is_unused:
            return "loaded"
        if dry_run:
            return ""
        # Asked again under the lock of the names: it may have been promoted since.
        if not store.forget(
            candidate.artifact_id,
            unless=lambda: candidate.artifact_id in referenced(store, models),
        ):
            return "configured"
        remove(candidate.folder)
        stamp_file(candidate.folder).unlink(missing_ok=True)
    return ""


def _leavings(store: Store, *, dry_run: bool) -> Sequence[str]:
    """What was left unfinished and its maker is gone: he would hold the lock of what he makes."""
    found: list[str] = []
    for path, lock in _unfinished(store):
        with locked_if_free(store.home / "locks" / lock) as is_free:
            if not is_free or not path.is_dir():
                continue
            found.append(str(path))
            if not dry_run:
                shutil.rmtree(path)
    return found


def _unfinished(store: Store) -> Iterator[tuple[Path, str]]:
    """Hidden folders, and the plans of ranks that were built so far; each with its lock's name."""
    for kind, parent in (("artifact", store.artifacts), ("checkpoint", store.home / "checkpoints")):
        for path in sorted(parent.glob(".*.*")):
            yield path, f"{kind}-{path.name[1:].rpartition('.')[0]}"
    for path in sorted((store.home / "builds").glob("*")):
        yield path, f"artifact-{path.name}"
