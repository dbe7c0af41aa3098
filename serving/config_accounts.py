"""What may be configured about accounts: where they are, and whose tokens operators present."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from headrace.serving.config_reader import bounded
from headrace.serving.domain.permission import Role


@dataclass(frozen=True, slots=True, kw_only=True)
class AccountsConfig:
    """Organisations, projects, keys and the audit log."""

    postgres: str | None = None
    """A PostgreSQL connection string, for many frontends; give its password in a file, with
    `passfile=`. Unset: `accounts.db` in the home."""
    stale_s: float = bounded(60.0, 1, 3600)
    """How long known keys go on while the accounts cannot be read; then every key is refused. A
    minute outlasts a PostgreSQL failover, and is the longest that a key which is revoked in that
    moment lives on."""


class TokenAlgorithm(StrEnum):
    """What an operator's token may be signed with: public keys only."""

    RS256 = "RS256"
    ES256 = "ES256"
    EDDSA = "EdDSA"


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorRole:
    """What a value of a token's roles claim means here."""

    name: str
    """The value."""
    role: Role
    tenant: str | None = None
    """The organisation that the role is for; "*" is all of them. Unset: the one that the token's
    tenant claim names, and without that claim the role is not given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorIssuer:
    """Whose tokens operators may present to administrative methods."""

    name: str
    """In the audit log: `oidc:<name>:<subject>`."""
    issuer: str
    """The `iss` claim, exactly."""
    audience: str
    """What `aud` must name."""
    jwks: Path
    """File with the issuer's public keys (a JWK set); read again when it changes."""
    algorithms: tuple[TokenAlgorithm, ...] = tuple(TokenAlgorithm)
    roles_claim: str = "roles"
    """A text or a list of texts."""
    tenant_claim: str = "tenant"
    roles: tuple[OperatorRole, ...] = ()
    """Values that are not listed mean nothing."""
