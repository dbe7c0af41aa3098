"""What a version on a store is: which model's, its files, and the parts that they are cut into.

Whoever pushes a version signs its descriptor, so that who keeps the store cannot give a name
another meaning: a descriptor of another model, number or variant is none.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from headrace.compile.names_index import ARTIFACT_ID, VARIANT
from headrace.compile.remote.patience import Remote
from headrace.compile.signing import Keys, SigningKey
from headrace.compile.store import check_name
from headrace.serving.domain.file_digest import PART_BYTES
from headrace.serving.domain.signature import Purpose, Signature
from headrace.serving.engine.signature import is_signed
from headrace.serving.errors import ArtifactTampered, ModelNotFound

DESCRIPTOR_VERSION = 2
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
    """A version of a model on a store."""

    descriptor_version: int = DESCRIPTOR_VERSION
    model: str
    version: int = 0
    """Its number there; 0 until it has one."""
    variant: str
    artifact_id: str
    pushed_at: str
    """UTC, ISO 8601."""
    files: tuple[RemoteFile, ...]
    """Manifest and signature too."""

    @property
    def total_bytes(self) -> int:
        return sum(file.file_bytes for file in self.files)

    def numbered(self, version: int) -> "Descriptor":
        return replace(self, version=version)

    def signed(self, key: SigningKey) -> "SignedDescriptor":
        return SignedDescriptor(self, key.signature(self.statement(), Purpose.DESCRIPTOR))

    def statement(self) -> bytes:
        """What is signed: every field, and so the parts of the manifest too."""
        return json.dumps(asdict(self), sort_keys=True).encode()


@dataclass(frozen=True, slots=True)
class SignedDescriptor:
    """What is on the store. Nothing of it is proved yet."""

    descriptor: Descriptor
    signature: Signature

    def to_json(self) -> bytes:
        raw = {"descriptor": asdict(self.descriptor), "signature": self.signature.fields()}
        return (json.dumps(raw, indent=1, sort_keys=True) + "\n").encode()

    @classmethod
    def from_json(cls, content: bytes, *, where: str) -> "SignedDescriptor":
        """Read strictly.

        Raises:
            ArtifactTampered: it is not a signed descriptor of this version.
        """
        try:
            if len(content) > DESCRIPTOR_BYTES_MAX:
                raise ValueError(f"it is longer than {DESCRIPTOR_BYTES_MAX:,} bytes")
            both = json.loads(content)
            if not isinstance(both, dict) or both.keys() != {"descriptor", "signature"}:
                raise ValueError("it is no descriptor with a signature")
            raw = _exact(Descriptor, both["descriptor"])
            if raw["descriptor_version"] != DESCRIPTOR_VERSION:
                raise ValueError(f"descriptor_version is {raw['descriptor_version']!r}")
            if type(raw["version"]) is not int:
                raise ValueError(f"version is {raw['version']!r}")
            if not ARTIFACT_ID.fullmatch(raw["artifact_id"]):
                raise ValueError("artifact_id is no id")
            if not VARIANT.fullmatch(raw["variant"]):
                raise ValueError("variant is none")
            raw["files"] = tuple(_file(each) for each in raw["files"])
            names = [file.name for file in raw["files"]]
            if len(set(names)) != len(names):
                raise ValueError("a file stands twice")
            return cls(Descriptor(**raw), Signature.from_fields(both["signature"]))
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


def read_descriptor(remote: Remote, model: str, number: int, trusted: Keys) -> Descriptor:
    """Read what a version is, as somebody who is trusted signed it.

    Raises:
        ModelNotFound: there is no such version.
        ArtifactTampered: it is damaged, is not signed, or is another model's or number's.
        ArtifactUntrusted: whoever signed it is not trusted here.
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
    where = f"{remote.url}/{key}"
    signed = SignedDescriptor.from_json(content, where=where)
    found, statement = signed.descriptor, signed.descriptor.statement()
    if not is_signed(
        statement, signed.signature, trusted, Purpose.DESCRIPTOR, what=f"descriptor {where}"
    ):
        raise _misleads(where, f"The signature of {signed.signature.key_id[:32]} does not fit it.")
    if (found.model, found.version) != (model, number):
        raise _misleads(where, f"What was signed is {found.model!r}, version {found.version}.")
    return found


def find(
    remote: Remote, model: str, number: int | None, variant: str | None, trusted: Keys
) -> Descriptor:
    """The version with this number, else the newest (of the variant).

    Raises:
        ModelNotFound: there is none, or that number is another variant.
        ArtifactTampered: one that had to be read is damaged, or is not what was signed.
        ArtifactUntrusted: whoever signed one that had to be read is not trusted here.
        RemoteStoreFault: the store does not answer.
    """
    if number is not None:
        found = read_descriptor(remote, model, number, trusted)
        if variant not in (None, found.variant):
            raise ModelNotFound(
                f"Version {number} of {model!r} at {remote.url} is no {variant}.",
                why=f"It is {found.variant}.",
                fix="Leave out --variant, or the number.",
            )
        return found
    for each in reversed(versions_of(remote, model)):
        found = read_descriptor(remote, model, each, trusted)
        if variant in (None, found.variant):
            return found
    raise ModelNotFound(
        f"There is no {variant or 'version'} of the model {model!r} at {remote.url}.",
        why="Nobody pushed one there.",
        fix=f"Push it from a home that has it: `headrace models push {model} {remote.url}`.",
    )


def _misleads(where: str, why: str) -> ArtifactTampered:
    return ArtifactTampered(
        f"The descriptor {where} is not what was signed there.",
        why=f"{why} Who keeps the store, or writes to it, may have changed it.",
        fix="Ask who keeps the store; push the version again from a home that has it, and fetch "
        "that.",
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
