"""Signs artifacts that tests write, with a key that everybody knows and nobody should trust."""

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from headrace.serving.domain.artifact import MANIFEST_FILE
from headrace.serving.domain.signature import SIGNATURE_FILE, Signature, key_id, signed_bytes

TEST_KEY = Ed25519PrivateKey.from_private_bytes(b"headrace, for tests and no else ")


def sign_artifact(folder: Path, key: Ed25519PrivateKey = TEST_KEY) -> None:
    """Write the signature of the folder's manifest, as compile would with a home's own key."""
    manifest = (folder / MANIFEST_FILE).read_bytes()
    signature = Signature(
        key_id=key_id(key.public_key().public_bytes_raw()), value=key.sign(signed_bytes(manifest))
    )
    (folder / SIGNATURE_FILE).write_text(signature.to_json(), "utf-8")


def trust_key(trust: Path, key: Ed25519PrivateKey = TEST_KEY) -> Path:
    """Put the public key into a trust folder, which is made where it is not there; answer it."""
    trust.mkdir(parents=True, exist_ok=True)
    public = key.public_key()
    pem = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (trust / f"{key_id(public.public_bytes_raw())}.pem").write_bytes(pem)
    return trust
