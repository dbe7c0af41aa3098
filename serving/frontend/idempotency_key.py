"""The metadata `idempotency-key`, and what of it and of the request is stored: nothing readable."""

import hmac
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from headrace.serving.errors import InvalidRequest
from headrace.serving.idempotency.vault import Vault
from headrace.v1 import inference_pb2 as pb

KEY_NAME = "idempotency-key"
KEY_CHARS_MAX = 128


def has_key(metadata: Iterable[tuple[str, str | bytes]] | None) -> bool:
    return any(name == KEY_NAME for name, _ in metadata or ())


def key_of(metadata: Iterable[tuple[str, str | bytes]] | None) -> str:
    """The call's idempotency key.

    Raises:
        InvalidRequest: it is given twice, or is not 1 to 128 printable ASCII characters.
    """
    values = [value for name, value in metadata or () if name == KEY_NAME]
    key = values[0] if len(values) == 1 else ""
    is_text = isinstance(key, str) and key.isascii() and key.isprintable()
    if not is_text or not 1 <= len(key) <= KEY_CHARS_MAX:
        raise InvalidRequest(
            f"The metadata has {len(values)} idempotency keys, of {len(key)} characters.",
            why=f"There is one, of 1 to {KEY_CHARS_MAX} printable ASCII characters.",
            fix="Send a UUID that is kept for the retries of the request.",
            field=KEY_NAME,
        )
    return str(key)


@dataclass(frozen=True, slots=True, kw_only=True)
class Secrets:
    """What makes keys and requests unreadable in the store; all three follow from the pepper."""

    digest_key: bytes = field(repr=False)
    fingerprint_key: bytes = field(repr=False)
    vault: Vault = field(repr=False)

    @classmethod
    def derived(cls, derive: Callable[[str], bytes]) -> "Secrets":
        """`derive` makes 32 bytes for each label; see `KeyStore.derive`."""
        return cls(
            digest_key=derive("idempotency/keys"),
            fingerprint_key=derive("idempotency/requests"),
            vault=Vault(derive("idempotency/answers")),
        )

    def digest(self, *, tenant_id: str, key: str) -> bytes:
        # No tenant's name holds a NUL, so no two pairs make one text.
        return hmac.digest(self.digest_key, f"{tenant_id}\0{key}".encode(), "sha256")

    def fingerprint(self, message: pb.GenerateRequest) -> bytes:
        """Of everything that is asked for; the request_id only names the asking."""
        asked = pb.GenerateRequest()
        asked.CopyFrom(message)
        asked.ClearField("request_id")
        return hmac.digest(
            self.fingerprint_key, asked.SerializeToString(deterministic=True), "sha256"
        )
