"""Verifies who signed. Signing is compile's; no private key is ever read here."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from headrace.serving.domain.signature import (
    SIGNATURE_BYTES_MAX,
    SIGNATURE_FILE,
    Purpose,
    Signature,
    key_id,
    read_signatures,
    signed_bytes,
)
from headrace.serving.errors import ArtifactTampered, ArtifactUntrusted

KEY_BYTES_MAX = 4096
"""A public key in PEM has 113 bytes; people put comments around it."""
KEYS_MAX = 256
"""Homes that one home trusts. Each costs a file's read whenever an engine is loaded."""


def parse_public_key(pem: bytes) -> Ed25519PublicKey:
    """Read an Ed25519 public key in PEM.

    Raises:
        ValueError: it is something else.
    """
    if len(pem) > KEY_BYTES_MAX:
        raise ValueError(f"it is longer than {KEY_BYTES_MAX:,} bytes")
    try:
        key = load_pem_public_key(pem)
    except UnsupportedAlgorithm as error:
        raise ValueError(str(error)) from error
    if not isinstance(key, Ed25519PublicKey):
        raise ValueError("it is a key of another kind than Ed25519")
    return key


def trusted_keys(trust: Path) -> Mapping[str, Ed25519PublicKey]:
    """The keys in a trust folder by their ids; none where there is no folder.

    Raises:
        ArtifactUntrusted: a file there is no key, or there are more than `KEYS_MAX`.
    """
    paths = sorted(trust.glob("*.pem"))
    if len(paths) > KEYS_MAX:
        raise ArtifactUntrusted(
            f"{trust} holds {len(paths)} keys.",
            why=f"At most {KEYS_MAX} are read.",
            fix="Remove those that sign nothing any more: `headrace models trust remove KEY_ID`.",
        )
    keys = [read_public_key(path) for path in paths]
    return {key_id(key.public_bytes_raw()): key for key in keys}


def verify_signature(
    folder: Path, manifest: bytes, trusted: Mapping[str, Ed25519PublicKey]
) -> Signature:
    """Check that a trusted key signed these bytes; answer the signature that fits.

    Args:
        folder: of the artifact; holds the signature.
        manifest: the exact bytes of its manifest.
        trusted: keys by their ids.

    Raises:
        ArtifactTampered: the signature is missing or does not fit.
        ArtifactUntrusted: whoever signed is not trusted here.
    """
    found = _signatures(folder)
    known = [each for each in found if each.key_id in trusted]
    if not known:
        raise _untrusted(f"artifact {folder}", found[0], trusted)
    for each in known:
        if _fits(trusted[each.key_id], each, manifest, Purpose.MANIFEST):
            return each
    raise _unsigned(folder, f"The signature of {known[0].key_id} does not fit its manifest.")


def is_signed(
    content: bytes,
    signature: Signature,
    trusted: Mapping[str, Ed25519PublicKey],
    purpose: Purpose,
    *,
    what: str,
) -> bool:
    """Whether the signature fits these bytes.

    Args:
        content: the exact bytes.
        signature: that is said to be of them.
        trusted: keys by their ids.
        purpose: that it was made for.
        what: they are, for messages.

    Raises:
        ArtifactUntrusted: whoever signed is not trusted here.
    """
    key = trusted.get(signature.key_id)
    if key is None:
        raise _untrusted(what, signature, trusted)
    return _fits(key, signature, content, purpose)


def _untrusted(
    what: str, signature: Signature, trusted: Mapping[str, Ed25519PublicKey]
) -> ArtifactUntrusted:
    return ArtifactUntrusted(
        f"The {what} was signed with the key {signature.key_id[:32]!r}.",
        why=f"This home trusts {', '.join(sorted(trusted)) or 'no key at all'}.",
        fix="If it comes from a home of yours, get that home's key with `headrace models key` "
        "there and trust it here with `headrace models trust add FILE`.",
    )


def _fits(key: Ed25519PublicKey, signature: Signature, content: bytes, purpose: Purpose) -> bool:
    try:
        key.verify(signature.value, signed_bytes(content, purpose))
    except InvalidSignature:
        return False
    return True


def _signatures(folder: Path) -> Sequence[Signature]:
    try:
        with (folder / SIGNATURE_FILE).open("rb") as file:
            text = file.read(SIGNATURE_BYTES_MAX + 1)
        if len(text) > SIGNATURE_BYTES_MAX:
            raise ValueError(f"it is longer than {SIGNATURE_BYTES_MAX:,} bytes")
        return read_signatures(text.decode("utf-8"))
    except FileNotFoundError as error:
        raise _unsigned(
            folder, f"It has no {SIGNATURE_FILE}; what is built has one since manifest version 2."
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise _unsigned(folder, f"{SIGNATURE_FILE} cannot be read: {error}.") from error


def read_public_key(path: Path) -> Ed25519PublicKey:
    """Read a file of a trust folder.

    Raises:
        ArtifactUntrusted: it is no key.
    """
    try:
        with path.open("rb") as file:
            return parse_public_key(file.read(KEY_BYTES_MAX + 1))
    except (OSError, ValueError) as error:
        raise ArtifactUntrusted(
            f"The trusted key {path} cannot be read: {error}.",
            why="Each file there holds one Ed25519 public key in PEM.",
            fix="Take the file away, or put the key back with `headrace models trust add FILE`.",
        ) from error


def _unsigned(folder: Path, why: str) -> ArtifactTampered:
    return ArtifactTampered(
        f"The artifact {folder} is not what was built and signed.",
        why=why,
        fix="Build it again with `headrace compile`, or fetch it again.",
    )
