"""Operators' tokens: signed by an issuer that is configured, checked offline.

A token is a JWT. Its algorithm must be one that the issuer is configured with, and never a
symmetric one or none; its key must be in the issuer's JWK set, a file that is read again when it
changes. What its roles mean here is configuration, not what the token says.
"""

import base64
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from joserfc import jwk, jwt
from joserfc.errors import JoseError, SecurityWarning

from headrace.serving import log
from headrace.serving.clock import Clock
from headrace.serving.config_accounts import OperatorIssuer, OperatorRole
from headrace.serving.domain.principal import Grant, Principal
from headrace.serving.errors import ConfigRefused, Unauthenticated

LEEWAY_S = 60
"""How far the issuer's clock and ours may differ."""
TOKEN_CHARS_MAX = 8 << 10
"""Metadata holds 16 KiB in all; a token with a hundred groups has 4."""
KEYS_MAX = 64
"""In one JWK set; issuers publish two or three."""
KEY_FILE_BYTES_MAX = 1 << 20
LOOK_EVERY_MS = 500
"""How often a key file's time stamp is looked at."""
RSA_BITS_MIN = 2048
SUBJECT_CHARS_MAX = 128
EVERY_TENANT = "*"

_Stamp = tuple[int, int, int] | None
_CURVES = ("P-256", "Ed25519")
_PublicKey = jwk.RSAKey | jwk.ECKey | jwk.OKPKey


class OperatorTokens:
    """Checks tokens of the configured issuers. Belongs to one thread, the event loop's.

    A check takes about 0.2 ms, and now and then reads a file of a few KB: administrative calls
    are rare.
    """

    def __init__(self, issuers: Sequence[OperatorIssuer], *, clock: Clock) -> None:
        """Reads the key files.

        Raises:
            ConfigRefused: a file cannot be read as a set of public keys, or two issuers have one
                name.
        """
        self._clock = clock
        self._issuers = {each.issuer: _Issuer(each, clock) for each in issuers}
        names = {each.name for each in issuers}
        if len(self._issuers) < len(issuers) or len(names) < len(issuers):
            raise ConfigRefused(
                "Two entries of operators have the same name or issuer.",
                why="A token must have one reading, and an entry of the audit log one source.",
                fix="Merge them, or name them apart.",
                field="operators",
            )

    def verify(self, token: str) -> Principal:
        """Who presents this token, and their roles; there may be none.

        Raises:
            Unauthenticated: it is not a good token of a configured issuer. The text says what is
                wrong with it, for it helps only whoever has one.
        """
        if len(token) > TOKEN_CHARS_MAX:
            raise _refusal(f"it has more than {TOKEN_CHARS_MAX:,} characters")
        issuer = self._issuers.get(_unverified_issuer(token))
        if issuer is None:
            raise _refusal("its issuer is none of those configured")
        claims = issuer.checked(token)
        return Principal(
            actor=f"oidc:{issuer.name}:{claims['sub']}",
            grants=tuple(_grants(issuer.config, claims)),
        )


class _Issuer:
    """One issuer and its keys."""

    def __init__(self, config: OperatorIssuer, clock: Clock) -> None:
        self.config = config
        self.name = config.name
        self._clock = clock
        self._looked_ms = clock.monotonic_ms()
        self._stamp = self._file_stamp()
        self._keys = _read_keys(config)

    def checked(self, token: str) -> Mapping[str, Any]:
        """The claims, once signature, audience and times are right."""
        self._reload_if_changed()
        registry = jwt.JWTClaimsRegistry(
            now=self._clock.unix_ms() // 1000,
            leeway=LEEWAY_S,
            iss={"essential": True, "value": self.config.issuer},
            aud={"essential": True, "value": self.config.audience},
            exp={"essential": True},
            sub={"essential": True},
        )
        try:
            with warnings.catch_warnings():
                # The name `EdDSA` gives way to `Ed25519`, of which issuers do not know yet.
                warnings.simplefilter("ignore", SecurityWarning)
                algorithms = [each.value for each in self.config.algorithms]
                decoded = jwt.decode(token, self._key_for, algorithms=algorithms)
            registry.validate(decoded.claims)
        except (JoseError, ValueError, TypeError, KeyError, RecursionError) as error:
            # The library says what is wrong by many types; what it says quotes no secret.
            raise _refusal(str(error) or type(error).__name__) from error
        subject = decoded.claims["sub"]
        if len(subject) > SUBJECT_CHARS_MAX or not subject.isprintable():
            raise _refusal("its subject is too long, or cannot be printed")
        return decoded.claims

    def _key_for(self, signed: Any) -> _PublicKey:
        """The key that the header names; without a name, the only one there is."""
        kid = signed.headers().get("kid")
        if kid is None and len(self._keys) == 1:
            return next(iter(self._keys.values()))
        if not isinstance(kid, str) or kid not in self._keys:
            raise ValueError("its key is not in the issuer's set")
        return self._keys[kid]

    def _reload_if_changed(self) -> None:
        now_ms = self._clock.monotonic_ms()
        if now_ms - self._looked_ms < LOOK_EVERY_MS:
            return
        self._looked_ms = now_ms
        stamp = self._file_stamp()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._keys = _read_keys(self.config)
        except ConfigRefused as error:
            log.operator_keys_unreadable(path=str(self.config.jwks), why=error.what)

    def _file_stamp(self) -> _Stamp:
        try:
            status = os.stat(self.config.jwks)
        except OSError:
            return None
        return status.st_mtime_ns, status.st_ino, status.st_size


def _read_keys(config: OperatorIssuer) -> Mapping[str, _PublicKey]:
    """Signing keys by id. Those we have no algorithm for are passed over."""
    try:
        with config.jwks.open("rb") as file:
            raw = json.loads(file.read(KEY_FILE_BYTES_MAX))
        found = [jwk.import_key(each) for each in raw["keys"] if _is_ours(each)]
        keys = {key.kid or key.thumbprint(): key for key in found if _is_strong(key)}
    except (OSError, ValueError, TypeError, KeyError, JoseError, RecursionError) as error:
        raise _unusable(config, str(error)) from error
    if not 1 <= len(keys) <= KEYS_MAX:
        raise _unusable(config, f"it has {len(keys)} keys that we can use")
    return keys  # pyright: ignore[reportReturnType] - _is_ours has left no symmetric one.


def _is_ours(entry: Any) -> bool:
    """Whether it is a public key for signatures of a kind that we take."""
    if not isinstance(entry, dict):
        raise TypeError("an entry is no key")
    if entry.get("use", "sig") != "sig":
        return False
    return entry["kty"] == "RSA" or (entry["kty"] in ("EC", "OKP") and entry["crv"] in _CURVES)


def _is_strong(key: jwk.Key) -> bool:
    return not isinstance(key, jwk.RSAKey) or key.raw_value.key_size >= RSA_BITS_MIN


def _grants(config: OperatorIssuer, claims: Mapping[str, Any]) -> list[Grant]:
    held = claims.get(config.roles_claim)
    values = [held] if isinstance(held, str) else held if isinstance(held, list) else []
    tenant = claims.get(config.tenant_claim)
    from_token = tenant if isinstance(tenant, str) and tenant not in ("", EVERY_TENANT) else None
    return [
        Grant(role=role.role, tenant_id=tenant_id)
        for role in config.roles
        if role.name in values
        for tenant_id in _tenants(role, from_token)
    ]


def _tenants(role: OperatorRole, from_token: str | None) -> list[str | None]:
    """Where the role holds: at most one place. No token makes a role global."""
    if role.tenant == EVERY_TENANT:
        return [None]
    tenant_id = role.tenant or from_token
    return [tenant_id] if tenant_id else []


def _unverified_issuer(token: str) -> str:
    """What the token says of itself: only to choose the keys it is then checked against."""
    try:
        payload = token.split(".")[1]
        claims = json.loads(_unpadded(payload))
        return claims["iss"] if isinstance(claims["iss"], str) else ""
    except (IndexError, ValueError, TypeError, KeyError, RecursionError):
        return ""


def _unpadded(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def _refusal(why: str) -> Unauthenticated:
    return Unauthenticated(
        "The token is not accepted.",
        why=f"It must be a current, signed token of a configured issuer: {why[:200]}.",
        fix="Sign in again; operators are configured under `operators`.",
    )


def _unusable(config: OperatorIssuer, why: str) -> ConfigRefused:
    return ConfigRefused(
        f"{config.jwks} cannot be used as public keys: {why}.",
        why=f"Tokens of the issuer {config.name!r} are checked against them.",
        fix="Put the issuer's JWK set there: RSA from 2,048 bits, P-256 or Ed25519.",
        field="operators",
    )
