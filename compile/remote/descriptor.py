"""What a version on a store is made of: its files, and the parts that they are cut into."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from headrace.compile.names_index import ARTIFACT_ID, VARIANT
from headrace.compile.remote.patience import Remote
from headrace.compile.store import check_name
from headrace.serving.domain.file_digest import PART_BYTES
from headrace.serving.errors import ArtifactTampered, ModelNotFound

DESCRIPTOR_VERSION = 1
DESCRIPTOR_BYTES_MAX = 8 * 2**20
"""Some 60,000 parts: 4 TB."""
VERSIONS_MAX = 10_000
"""Of one model on one store; each is read when one is looked for by its content."""

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A piece of a file, in its order: at most `PART_BYTES`.

    That much is sent at once, held in memory by each sender, and sent again when it was cut off.
    """

    sha256: str
    part_bytes: int

    @property
    def key(self) -> str:
        return f"blobs/sha256/{self.sha256}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteFile:
    name: str
    parts: tuple[Part, ...]

    @property
    def file_bytes(self) -> int:
        return sum(part.part_bytes for part in self.parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Descriptor:
    """A version of a model. What it says is believed only as far as hashes and signature prove."""

    descriptor_version: int = DESCRIPTOR_VERSION
    model: str
    variant: str
    artifact_id: str
    pushed_at: str
    """UTC, ISO 8601."""
    files: tuple[RemoteFile, ...]
    """Manifest and signature too."""

    @property
    def total_bytes(self) -> int:
        return sum(file.file_bytes for file in self.files)

    def to_json(self) -> bytes:
        return (json.dumps(asdict(self), indent=1, sort_keys=True) + "\n").encode()

    @classmethod
    def from_json(cls, content: bytes, *, where: str) -> "Descriptor":
        """Read strictly.

        Raises:
            ArtifactTampered: it is not a descriptor of this version.
        """
        try:
            if len(content) > DESCRIPTOR_BYTES_MAX:
                raise ValueError(f"it is longer than {DESCRIPTOR_BYTES_MAX:,} bytes")
            raw = _exact(cls, json.loads(content))
            if raw["descriptor_version"] != DESCRIPTOR_VERSION:
                raise ValueError(f"descriptor_version is {raw['descriptor_version']!r}")
            if not ARTIFACT_ID.fullmatch(raw["artifact_id"]):
                raise ValueError("artifact_id is no id")
            if not VARIANT.fullmatch(raw["variant"]):
                raise ValueError("variant is none")
            raw["files"] = tuple(_file(each) for each in raw["files"])
            names = [file.name for file in raw["files"]]
            if len(set(names)) != len(names):
                raise ValueError("a file stands twice")
            return cls(**raw)
        except (ValueError, TypeError, RecursionError) as error:
            raise ArtifactTampered(
                f"The descriptor {where} cannot be read: {error}.",
                why=f"Version {DESCRIPTOR_VERSION} is read strictly, and nothing is guessed.",
                fix="Push the version again from a home that has it, and fetch that.",
            ) from error


def versions_of(remote: Remote, model: str) -> Sequence[int]:
    """The numbers of a model's versions on the store, the oldest first."""
    found = (name.removesuffix(".json") for name in remote.names(f"models/{check_name(model)}"))
    return sorted(int(name) for name in found if name.isascii() and name.isdecimal())[
        -VERSIONS_MAX:
    ]


def descriptor_key(model: str, number: int) -> str:
    return f"models/{check_name(model)}/{number:06}.json"


def read_descriptor(remote: Remote, model: str, number: int) -> Descriptor:
    """Read what a version is made of.

    Raises:
        ModelNotFound: there is no such version.
        ArtifactTampered: it is damaged.
        RemoteStoreFault: the store does not answer.
    """
    key = descriptor_key(model, number)
    content = remote.get(key, bytes_max=DESCRIPTOR_BYTES_MAX)
    if content is None:
        there = ", ".join(str(each) for each in versions_of(remote, model)[-10:])
        raise ModelNotFound(
            f"The model {model!r} has no version {number} at {remote.url}.",
            why=f"There is {there or 'none'}.",
            fix=f"`headrace models versions {model} --at {remote.url}` shows them.",
        )
    return Descriptor.from_json(content, where=f"{remote.url}/{key}")


def find(
    remote: Remote, model: str, number: int | None, variant: str | None
) -> tuple[int, Descriptor]:
    """The version with this number, else the newest (of the variant).

    Raises:
        ModelNotFound: there is none.
        ArtifactTampered: one that had to be read is damaged.
        RemoteStoreFault: the store does not answer.
    """
    if number is not None:
        return number, read_descriptor(remote, model, number)
    for each in reversed(versions_of(remote, model)):
        found = read_descriptor(remote, model, each)
        if variant in (None, found.variant):
            return each, found
    raise ModelNotFound(
        f"There is no {variant or 'version'} of the model {model!r} at {remote.url}.",
        why="Nobody pushed one there.",
        fix=f"Push it from a home that has it: `headrace models push {model} {remote.url}`.",
    )


def _file(value: object) -> RemoteFile:
    raw = _exact(RemoteFile, value)
    name = raw["name"]
    if not isinstance(name, str) or Path(name).name != name or name.startswith("."):
        raise ValueError(f"{name!r} is no name of a file")
    return RemoteFile(name=name, parts=tuple(_part(each) for each in raw["parts"]))


def _part(value: object) -> Part:
    raw = _exact(Part, value)
    if not isinstance(raw["sha256"], str) or not _SHA256.fullmatch(raw["sha256"]):
        raise ValueError(f"{raw['sha256']!r} is no SHA-256")
    if type(raw["part_bytes"]) is not int or not 0 < raw["part_bytes"] <= PART_BYTES:
        raise ValueError(f"a part of {raw['part_bytes']!r} bytes")
    return Part(**raw)


def _exact(kind: type, value: object) -> dict[str, Any]:
    if not isinstance(value, dict) or value.keys() != {each.name for each in fields(kind)}:
        raise ValueError(f"a {kind.__name__} lacks a field or has one too many")
    return value
