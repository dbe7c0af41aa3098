"""Organisation, project, key: whom a request belongs to, and who is charged.

An organisation is the tenant of every record, and its id is their `tenant_id`. What limits hang on
are the three ids. Nothing here is ever deleted: records, statements and the audit log go on
naming it, so things are suspended or revoked instead.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Generic, TypeVar

from headrace.serving.domain.scope import Scope

T = TypeVar("T")


class AccountState(StrEnum):
    ACTIVE = "active"
    SUSPENDED = "suspended"
    """Its keys are refused until it is resumed; what runs already ends as usual."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Organisation:
    tenant_id: str
    display_name: str
    """For people; may be empty."""
    state: AccountState
    created_unix_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Project:
    """A part of an organisation that has its own keys and limits."""

    tenant_id: str
    project_id: str
    """Unique within its organisation."""
    state: AccountState
    created_unix_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """What is kept of a key. Nothing here can be presented as one."""

    key_id: str
    """Its public part, between the two underscores; unique everywhere."""
    tenant_id: str
    project_id: str
    label: str
    """For people; may be empty."""
    scope: Scope
    created_unix_ms: int
    expires_unix_ms: int | None
    """None: never."""
    revoked_unix_ms: int | None = None
    rotated_from: str = ""
    """The key that this one replaces; empty for one that was made afresh."""
    last_used_unix_ms: int | None = None
    """To the minute, and a minute late."""
    digest: str = field(default="", repr=False)
    """HMAC-SHA256(pepper, key), hex. Only the store and the authenticator have it."""
    pepper_id: str = field(default="", repr=False)

    def is_in_force(self, now_unix_ms: int) -> bool:
        is_expired = self.expires_unix_ms is not None and now_unix_ms >= self.expires_unix_ms
        return self.revoked_unix_ms is None and not is_expired


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key at the one moment it is known in full."""

    key: str = field(repr=False)
    stored: ApiKey


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditRecord:
    """One change: who did what to what, and when. Holds digests of the states, no state."""

    seq: int
    """From 1, without a gap."""
    unix_ms: int
    actor: str
    """`local:<unix user>`, `key:<key id>` or `oidc:<issuer's name>:<subject>`."""
    action: str
    """For example `key.revoke`."""
    tenant_id: str
    target: str
    """For example `key:3f9k2m1x`."""
    changed: str
    """Names of the fields that differ, with commas between them."""
    before: str
    """SHA-256, hex, of the state before as canonical JSON; empty where there was none."""
    after: str
    previous_hash: str
    """`hash` of the record before; of the first one, empty."""
    hash: str = ""
    """SHA-256, hex, over previous_hash and all of the above as canonical JSON."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditVerdict:
    """What a check of the whole audit log found."""

    records: int
    """How many were checked and found right."""
    head: str
    """Hash of the last of them. Kept elsewhere, it proves later that nothing before it changed."""
    problem: str = ""
    """What is wrong with the first record that is; empty when all is well."""


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """A bounded part of a list."""

    items: Sequence[T]
    next_token: str = ""
    """Where the next page begins; empty when there is none."""
