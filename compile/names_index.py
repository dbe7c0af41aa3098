"""A model's builds as numbered versions, and which one is current: values in, values out.

A variant is target, precision and split: `cpu/int8`, `rtx/bf16/tp2`. What a variant means is its
newest line in the history; a rollback is a line too, so nothing that happened is taken back. An
index is one file, `names/<model>.json`.
"""

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from enum import StrEnum
from typing import Any

from headrace.serving.domain.artifact import Precision

INDEX_VERSION = 2
VERSIONS_MAX = 256
"""Builds of one model that are remembered. Beyond it the oldest go that no variant needs."""
HISTORY_MAX = 1024
"""Changes that are remembered: more than two for each variant that there can be."""
ARTIFACT_ID = re.compile(r"[0-9a-f]{64}")
VARIANT = re.compile(r"[a-z0-9_]+/[a-z0-9]+(/[a-z0-9-]+)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """One build of a model."""

    version: int
    """Counts up from 1 for each model; never given twice."""
    artifact_id: str
    variant: str
    registered_at: str
    """UTC, ISO 8601."""


class Cause(StrEnum):
    """Why another version became current."""

    BUILD = "build"
    FETCH = "fetch"
    PROMOTE = "promote"
    ROLLBACK = "rollback"


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A version that became current of its variant."""

    version: int
    variant: str
    cause: Cause
    at: str
    """UTC, ISO 8601."""


@dataclass(frozen=True, slots=True)
class Index:
    """All versions of one model, oldest first, and what became current when."""

    versions: tuple[Version, ...] = ()
    history: tuple[Change, ...] = ()
    next_version: int = 1

    def of(self, version: int) -> Version | None:
        return next((each for each in self.versions if each.version == version), None)

    @property
    def variants(self) -> Sequence[str]:
        """Those that mean something."""
        return sorted({each.variant for each in self.history})

    def stack(self, variant: str) -> Sequence[int]:
        """Versions that rollbacks go back through; the last is current."""
        found: list[int] = []
        for change in self.history:
            if change.variant != variant:
                continue
            if change.cause is Cause.ROLLBACK and found:
                found.pop()
            if not found or found[-1] != change.version:
                found.append(change.version)
        return found

    def current(self, variant: str) -> Version | None:
        stack = self.stack(variant)
        return self.of(stack[-1]) if stack else None

    def before(self, variant: str) -> Version | None:
        """What a rollback would make current."""
        stack = self.stack(variant)
        return self.of(stack[-2]) if len(stack) > 1 else None

    def registered(self, artifact_id: str, variant: str, *, cause: Cause, at: str) -> "Index":
        """With the artifact as current of its variant: a new version, unless it is one already."""
        known = next((each for each in self.versions if each.artifact_id == artifact_id), None)
        if known is not None:
            return self.promoted(known, cause=cause, at=at)
        version = Version(
            version=self.next_version, artifact_id=artifact_id, variant=variant, registered_at=at
        )
        added = replace(
            self, versions=(*self.versions, version), next_version=self.next_version + 1
        )
        return added.promoted(version, cause=cause, at=at)._bounded()

    def promoted(self, version: Version, *, cause: Cause, at: str) -> "Index":
        """With this version as current; the same where it is that already."""
        if self.current(version.variant) == version:
            return self
        change = Change(version=version.version, variant=version.variant, cause=cause, at=at)
        return replace(self, history=_trimmed((*self.history, change)))

    def without(self, artifact_ids: Collection[str]) -> "Index":
        """Without these artifacts' versions.

        A variant whose current version goes means nothing until something is promoted or built:
        none of its others takes the place unasked.
        """
        lost = {
            variant
            for variant in self.variants
            if (current := self.current(variant)) and current.artifact_id in artifact_ids
        }
        kept = tuple(each for each in self.versions if each.artifact_id not in artifact_ids)
        numbers = {each.version for each in kept}
        history = (each for each in self.history if each.version in numbers)
        return replace(
            self,
            versions=kept,
            history=tuple(each for each in history if each.variant not in lost),
        )

    def _bounded(self) -> "Index":
        surplus = len(self.versions) - VERSIONS_MAX
        if surplus <= 0:
            return self
        needed = {each for variant in self.variants for each in self.stack(variant)[-2:]}
        spare = [each for each in self.versions if each.version not in needed][:surplus]
        return self.without({each.artifact_id for each in spare})

    def to_json(self) -> str:
        raw = {
            "index_version": INDEX_VERSION,
            "next_version": self.next_version,
            "versions": [asdict(each) for each in self.versions],
            "history": [asdict(each) for each in self.history],
        }
        return json.dumps(raw, indent=1, sort_keys=True) + "\n"


def _trimmed(history: tuple[Change, ...]) -> tuple[Change, ...]:
    """Without the oldest change of the variant that has the most, where there are too many."""
    if len(history) <= HISTORY_MAX:
        return history
    ((busiest, _),) = Counter(each.variant for each in history).most_common(1)
    oldest = next(number for number, each in enumerate(history) if each.variant == busiest)
    return history[:oldest] + history[oldest + 1 :]


def parse_index(text: str, *, at: str) -> Index:
    """Read an index; one that maps precisions to ids, as there were before versions, is converted.

    Args:
        text: of the file.
        at: when that file was written, for what is converted.

    Raises:
        ValueError: it is no index.
    """
    raw = json.loads(text)
    if not isinstance(raw, dict):
        raise ValueError("it is no object")
    if "index_version" not in raw:
        return _converted(raw, at=at)
    if raw["index_version"] != INDEX_VERSION:
        raise ValueError(f"index_version is {raw['index_version']!r}")
    if raw.keys() != {"index_version", "next_version", "versions", "history"}:
        raise ValueError("it lacks a field or has one too many")
    versions = tuple(Version(**_fields(Version, each)) for each in raw["versions"])
    history = tuple(Change(**_fields(Change, each)) for each in raw["history"])
    index = Index(versions, history, raw["next_version"])
    _check(index)
    return index


def _converted(ids: Mapping[str, object], *, at: str) -> Index:
    index = Index()
    for precision, artifact_id in sorted(ids.items()):
        if precision not in set(Precision) or not isinstance(artifact_id, str):
            raise ValueError("it does not map precisions to ids")
        index = index.registered(artifact_id, f"cpu/{precision}", cause=Cause.BUILD, at=at)
    _check(index)
    return index


def _check(index: Index) -> None:
    numbers = [each.version for each in index.versions]
    if not isinstance(index.next_version, int) or index.next_version <= max(numbers, default=0):
        raise ValueError("next_version is no number above all others")
    if numbers != sorted(set(numbers)) or (numbers and numbers[0] < 1):
        raise ValueError("versions do not count up")
    for each in index.versions:
        if not ARTIFACT_ID.fullmatch(each.artifact_id) or not VARIANT.fullmatch(each.variant):
            raise ValueError(f"version {each.version} is damaged")
    variants = {each.version: each.variant for each in index.versions}
    for change in index.history:
        if variants.get(change.version) != change.variant:
            raise ValueError(f"the history has a version {change.version} that there is not")


def _fields(kind: type, raw: object) -> dict[str, Any]:
    if not isinstance(raw, dict) or raw.keys() != {each.name for each in fields(kind)}:
        raise ValueError(f"a {kind.__name__.lower()} lacks a field or has one too many")
    for name, value in raw.items():
        wanted = int if name == "version" else str
        if not isinstance(value, wanted) or isinstance(value, bool):
            raise ValueError(f"{name} is {value!r}")
    return raw | ({"cause": Cause(raw["cause"])} if "cause" in raw else {})
