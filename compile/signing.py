"""The home's own key, which signs what is built here, and the public keys that the home trusts.

    keys/artifact-signing.pem   Ed25519, PKCS 8, mode 0600; made on first use
    trust/<key id>.pem          public keys; the home's own is put there when it is made

Whoever can write `trust/` decides what this home serves.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from headrace.compile.storage import locked, write_atomically
from headrace.serving.domain.artifact import MANIFEST_FILE
from headrace.serving.domain.signature import (
    SIGNATURE_FILE,
    Purpose,
    Signature,
    key_id,
    signed_bytes,
)
from headrace.serving.engine.signature import (
    KEY_BYTES_MAX,
    parse_public_key,
    read_public_key,
    trusted_keys,
)
from headrace.serving.errors import ArtifactUntrusted, InvalidRequest, KeyNotFound

Keys = Mapping[str, Ed25519PublicKey]
"""Public keys by their ids."""


class SigningKey:
    """A private key. Its repr and its errors say which one, never what it is."""

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private

    @property
    def key_id(self) -> str:
        return key_id(self._private.public_key().public_bytes_raw())

    @property
    def public_pem(self) -> str:
        return _pem(self._private.public_key())

    def __repr__(self) -> str:
        return f"SigningKey({self.key_id})"

    def sign(self, folder: Path) -> None:
        """Write the signature of a folder's manifest beside it, replacing one that is there."""
        signature = self.signature((folder / MANIFEST_FILE).read_bytes(), Purpose.MANIFEST)
        (folder / SIGNATURE_FILE).write_text(signature.to_json(), "utf-8")

    def signature(self, content: bytes, purpose: Purpose) -> Signature:
        """Of these exact bytes, for this purpose only."""
        value = self._private.sign(signed_bytes(content, purpose))
        return Signature(key_id=self.key_id, value=value)


@dataclass(frozen=True, slots=True)
class Trusted:
    """A public key that the home trusts."""

    key_id: str
    is_own: bool
    pem: str


def signing_key(home: Path) -> SigningKey:
    """The home's key, made on first use. Processes that come at once agree on one.

    Raises:
        ArtifactUntrusted: the file cannot be read, or holds something else.
        StorageFull: the disk has no room.
    """
    path = _own(home)
    with locked(home / "locks" / "signing-key"):
        if not path.exists():
            _make(home, path)
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError):
        key = None  # What the parser says may quote what it read.
    if not isinstance(key, Ed25519PrivateKey):
        raise ArtifactUntrusted(
            f"The key {path} cannot be read.",
            why="What is built here is signed with it: an Ed25519 key in PEM, readable for this "
            "user.",
            fix="Restore it from a backup; or delete it to have another made, and build again.",
        )
    return SigningKey(key)


def trusted(home: Path) -> Sequence[Trusted]:
    """The keys that the home trusts, by id.

    Raises:
        ArtifactUntrusted: a file among them is no key.
    """
    own = signing_key(home).key_id if _own(home).exists() else None
    keys = keys_of(home)
    return [Trusted(name, name == own, _pem(key)) for name, key in sorted(keys.items())]


def keys_of(home: Path) -> Keys:
    """The keys that the home trusts, as signatures are verified with them.

    Raises:
        ArtifactUntrusted: a file among them is no key.
    """
    return trusted_keys(home / "trust")


def trust(home: Path, pem: bytes, *, where: str) -> str:
    """Trust a public key; answer its id. Idempotent.

    Args:
        home: whose trust it is.
        pem: an Ed25519 public key.
        where: it came from, for messages.

    Raises:
        InvalidRequest: it is something else.
        StorageFull: the disk has no room.
    """
    try:
        key = parse_public_key(pem[: KEY_BYTES_MAX + 1])
    except ValueError as error:
        raise InvalidRequest(
            f"{where} is not a public key: {error}.",
            why="An Ed25519 public key in PEM is wanted, as `headrace models key` prints it.",
            fix="Run `headrace models key` in the home that is to be trusted, and save what it "
            "prints.",
            field="file",
        ) from error
    name = key_id(key.public_bytes_raw())
    folder = home / "trust"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_atomically(folder / f"{name}.pem", _pem(key))
    return name


def distrust(home: Path, name: str) -> None:
    """Trust a key no longer, whatever its file is called. What it signed is not loaded any more.

    Raises:
        KeyNotFound: it is not trusted.
        ArtifactUntrusted: a file among the trusted keys is no key.
    """
    found = False
    for path in (home / "trust").glob("*.pem"):
        if key_id(read_public_key(path).public_bytes_raw()) == name:
            path.unlink()
            found = True
    if not found:
        raise KeyNotFound(
            f"The key {name!r} is not trusted here.",
            why=f"{home / 'trust'} does not hold it.",
            fix="`headrace models trust list` shows the keys that are.",
        )


def _own(home: Path) -> Path:
    return home / "keys" / "artifact-signing.pem"


def _make(home: Path, path: Path) -> None:
    private = Ed25519PrivateKey.generate()
    # Trusted first: a crash between leaves a key that signs nothing, not one that is refused.
    trust(home, _pem(private.public_key()).encode(), where="the key that was made")
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    write_atomically(path, pem.decode("ascii"), mode=0o600)


def _pem(key: Ed25519PublicKey) -> str:
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode("ascii")
