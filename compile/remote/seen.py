"""The highest version of each model that this home has seen on each store.

A signature says what a version is, not that there is no newer one: who keeps a store can take the
newest away. Nothing on the store can show that; what is remembered here does, from the first fetch
on. `remotes.json` in the home holds it.
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from headrace.compile.remote.descriptor import Descriptor
from headrace.compile.remote.patience import Remote
from headrace.compile.storage import locked, write_atomically
from headrace.serving.errors import ArtifactTampered

SEEN_VERSION = 1
SEEN_MAX = 4096
"""Variants of models on stores that are remembered, some 200 bytes each. Beyond it the one that was
fetched the longest ago is forgotten, and met as if for the first time."""
SEEN_BYTES_MAX = 16 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """The highest version of a variant."""

    place: str
    model: str
    variant: str
    version: int


def require_no_older(home: Path, remote: Remote, found: Descriptor, variant: str | None) -> None:
    """Refuse what is said to be the newest, where a newer one was seen.

    Args:
        home: that remembers.
        remote: the store.
        found: the newest there.
        variant: of this one; None: of all.

    Raises:
        ArtifactTampered: the store had a newer one before; or what is remembered is damaged.
    """
    place = _place(remote)
    newest = max(
        (
            each.version
            for each in _read(_file(home))
            if (each.place, each.model) == (place, found.model) and variant in (None, each.variant)
        ),
        default=0,
    )
    if found.version < newest:
        raise ArtifactTampered(
            f"The newest {variant or 'version'} of {found.model!r} at {remote.url} is "
            f"{found.version}, and this home has seen {newest}.",
            why="Nothing is ever deleted on a store, so somebody took the newer one away or shows "
            "an old state of it.",
            fix="Ask who keeps the store. To take the older one knowingly, name it: `headrace "
            f"models fetch {found.model}@{found.version} {remote.url}`. Where the store was begun "
            f"anew, delete {_file(home)}: then this home meets every store for the first time.",
        )


def remember(home: Path, remote: Remote, found: Descriptor) -> None:
    """Note a version that was proved. Idempotent.

    Raises:
        ArtifactTampered: what is remembered is damaged.
        StorageFull: the disk has no room.
    """
    path, place = _file(home), _place(remote)
    with locked(home / "locks" / "remotes"):
        before = _read(path)
        # The latest fetched stands last, so that the first is what can be forgotten.
        seen: dict[tuple[str, str, str], int] = {
            (each.place, each.model, each.variant): each.version for each in before
        }
        key = (place, found.model, found.variant)
        seen[key] = max(found.version, seen.pop(key, 0))
        kept = [
            _Seen(place=place, model=model, variant=variant, version=version)
            for (place, model, variant), version in list(seen.items())[-SEEN_MAX:]
        ]
        if kept != before:
            raw = {"seen_version": SEEN_VERSION, "seen": [asdict(each) for each in kept]}
            write_atomically(path, json.dumps(raw, indent=1, sort_keys=True) + "\n")


def _file(home: Path) -> Path:
    return home / "remotes.json"


def _place(remote: Remote) -> str:
    """The same bucket's name means another bucket at another endpoint."""
    url = remote.url.rstrip("/")
    return f"{url} at {remote.endpoint_url}" if remote.endpoint_url else url


def _read(path: Path) -> list[_Seen]:
    try:
        with path.open("rb") as file:
            content = file.read(SEEN_BYTES_MAX + 1)
        if len(content) > SEEN_BYTES_MAX:
            raise ValueError("it is too long")
        raw = json.loads(content)
        if not isinstance(raw, dict) or raw.keys() != {"seen_version", "seen"}:
            raise ValueError("it lacks a field or has one too many")
        if raw["seen_version"] != SEEN_VERSION:
            raise ValueError(f"seen_version is {raw['seen_version']!r}")
        return [_entry(each) for each in raw["seen"]]
    except FileNotFoundError:
        return []
    except (ValueError, TypeError, RecursionError) as error:
        raise ArtifactTampered(
            f"What this home has seen on stores cannot be read: {path}.",
            why=f"Reading it: {error}. It shows whether a store hides its newest version.",
            fix="Restore it from a backup; or delete it, to meet every store for the first time.",
        ) from error


def _entry(raw: Any) -> _Seen:
    kinds: dict[str, type] = {
        each.name: int if each.name == "version" else str for each in fields(_Seen)
    }
    if not isinstance(raw, dict) or raw.keys() != kinds.keys():
        raise ValueError("an entry lacks a field or has one too many")
    for name, kind in kinds.items():
        if type(raw[name]) is not kind:
            raise ValueError(f"{name} is {raw[name]!r}")
    return _Seen(**raw)
