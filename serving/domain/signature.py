"""A detached signature, as text: who signed, and what exactly is signed.

In a manifest's file each line is one. Two stand there where a manifest was replaced: the new one's,
and the old one's. The file is replaced before the manifest is, so that one of its lines fits
whichever manifest a reader has met, and a process that dies in between leaves an artifact as good
as before.
"""

import json
from base64 import b64decode, b64encode
from binascii import Error as NotBase64
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from hashlib import sha256

SIGNATURE_FILE = "manifest.sig"
SIGNATURE_BYTES_MAX = 4096
"""Two lines of two short fields."""
SIGNATURES_MAX = 2


class Purpose(StrEnum):
    """Stands before what is signed, so that a signature made for one thing never fits another."""

    MANIFEST = "headrace artifact manifest"
    DESCRIPTOR = "headrace store descriptor"


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """An Ed25519 signature (RFC 8032) of one content for one purpose."""

    key_id: str
    value: bytes

    def fields(self) -> dict[str, str]:
        """As JSON holds it."""
        return {"key_id": self.key_id, "signature": b64encode(self.value).decode()}

    def to_json(self) -> str:
        return json.dumps(self.fields(), sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Signature":
        """Read strictly.

        Raises:
            ValueError: it is not the text of a signature.
        """
        return cls.from_fields(json.loads(text))

    @classmethod
    def from_fields(cls, raw: object) -> "Signature":
        """Read what `fields` answers, strictly.

        Raises:
            ValueError: it is something else.
        """
        if not isinstance(raw, dict) or raw.keys() != {"key_id", "signature"}:
            raise ValueError("it does not hold a key_id and a signature")
        key_id, value = raw["key_id"], raw["signature"]
        if not isinstance(key_id, str) or not isinstance(value, str):
            raise ValueError("key_id and signature are texts")
        try:
            return cls(key_id=key_id, value=b64decode(value, validate=True))
        except NotBase64 as error:
            raise ValueError(f"signature is not base64: {error}") from error


def read_signatures(text: str) -> Sequence[Signature]:
    """Read a signature file strictly.

    Raises:
        ValueError: it is none.
    """
    lines = text.splitlines()
    if not 1 <= len(lines) <= SIGNATURES_MAX:
        raise ValueError(f"it has {len(lines)} lines; one or {SIGNATURES_MAX} are signatures")
    return [Signature.from_json(line) for line in lines]


def signed_bytes(content: bytes, purpose: Purpose = Purpose.MANIFEST) -> bytes:
    """What is signed: the exact bytes, under their purpose."""
    return f"{purpose}\n".encode() + content


def key_id(public: bytes) -> str:
    """The name of a public key of 32 bytes: 32 hex digits of its SHA-256."""
    return sha256(public).hexdigest()[:32]
