"""Statements as signed files: JSON in a compact JWS, Ed25519 (RFC 7515, RFC 9864).

Whoever has the public key can check a statement without us, offline.
"""

import json
from base64 import urlsafe_b64encode
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from joserfc import jws
from joserfc.errors import JoseError
from joserfc.jwk import OKPKey

from headrace.serving.errors import ConfigRefused, InvalidRequest
from headrace.serving.metering.sla import CREDIT_RULES, Attainment, Line, Statement

ALGORITHM = "Ed25519"
TYPE = "headrace-sla+jws"
STATEMENT_BYTES_MAX = 16 << 20
"""Some hundred lines with all their breaches; a longer file is not one of ours."""
SEED_BYTES = 32


class StatementKey:
    """The key that signs; made from a secret of 32 bytes in hex, as `secret_file` makes one."""

    def __init__(self, secret: bytes, *, where: str) -> None:
        """Take the secret that the file `where` holds.

        Raises:
            ConfigRefused: it is not 32 bytes in hex.
        """
        try:
            seed = bytes.fromhex(secret.decode("ascii"))
        except ValueError:
            seed = b""
        if len(seed) != SEED_BYTES:
            raise ConfigRefused(
                f"The key {where} is not an Ed25519 seed.",
                why="It is 32 random bytes in hex; statements are signed with it.",
                fix="Restore it from a backup. A new one makes statements that the old public key "
                "does not verify.",
            )
        public = Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw()
        self._key = OKPKey.import_key(
            {"kty": "OKP", "crv": "Ed25519", "x": _base64(public), "d": _base64(seed)}
        )

    @property
    def public_jwk(self) -> dict[str, str]:
        """The public half, with the id that statements name."""
        public = self._key.as_dict(private=False)
        return {name: str(public[name]) for name in ("kty", "crv", "x")} | {
            "kid": self._key.thumbprint()
        }

    def sign(self, statement: Statement, *, issued_unix_ms: int) -> str:
        """The statement as a file's one line."""
        header = {"alg": ALGORITHM, "typ": TYPE, "kid": self._key.thumbprint()}
        payload = statement_json(statement) | {"issued_unix_ms": issued_unix_ms}
        text = json.dumps(payload, sort_keys=True, separators=(",", ":"))
        return jws.serialize_compact(header, text, self._key, algorithms=[ALGORITHM])


def verify(signed: str, public_jwk: Mapping[str, str]) -> dict[str, Any]:
    """What a signed statement says, if the key's owner says it.

    Raises:
        InvalidRequest: it was not signed with that key, was changed since, or is something else.
    """
    try:
        key = OKPKey.import_key({name: public_jwk[name] for name in ("kty", "crv", "x")})
        if len(signed) > STATEMENT_BYTES_MAX:
            raise ValueError("it is too long")
        found = jws.deserialize_compact(signed.strip(), key, algorithms=[ALGORITHM])
        if found.headers().get("typ") != TYPE:
            raise ValueError("it is another kind of document")
        payload = json.loads(found.payload)
    except (JoseError, ValueError, KeyError) as error:
        raise InvalidRequest(
            "The statement does not verify.",
            why=f"It is not what the owner of this key signed: {str(error) or 'unreadable'}.",
            fix="Ask for it again, or check that the key is the issuer's: `headrace sla key`.",
            field="file",
        ) from error
    return payload


def statement_json(statement: Statement) -> dict[str, Any]:
    """What scripts and auditors rely on: names stay, more may be added."""
    return {
        "tenant_id": statement.tenant_id,
        "month": str(statement.month),
        "lines": [_line(line) for line in statement.lines],
        "credit_rules": [asdict(rule) for rule in CREDIT_RULES],
        "adjustments": [asdict(each) for each in statement.adjustments()],
    }


def _line(line: Line) -> dict[str, Any]:
    return {
        "model": line.model,
        "tier": line.tier.value,
        "currency": line.currency,
        "requests": line.requests,
        "excluded": line.excluded,
        "attainments": [_attainment(each) for each in line.attainments],
        "missed_requests": line.missed_requests,
        "down_minutes": line.down_minutes,
        "missed": [asdict(each) for each in line.missed],
        "down": [asdict(each) for each in line.down],
        "charge_femto": line.charge_femto,
        "credit_ppm": line.credit_ppm,
        "credit_femto": line.credit_femto,
    }


def _attainment(each: Attainment) -> dict[str, Any]:
    return asdict(each) | {"attained_ppm": each.attained_ppm}


def _base64(raw: bytes) -> str:
    return urlsafe_b64encode(raw).rstrip(b"=").decode()
