"""What the meter keeps of a request: an opening before any work, a settlement at its end."""

from dataclasses import dataclass

from headrace.serving.domain.scope import UNLIMITED, Scope
from headrace.serving.domain.tier import Receipt, Tier
from headrace.serving.domain.usage import Outcome, Price, Usage, nano_of

DEFAULT_PROJECT = "default"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who a key belongs to: organisation (the tenant, who is charged), project, key."""

    tenant_id: str
    key_id: str
    """Public part of the key, safe to log."""
    project_id: str = DEFAULT_PROJECT
    scope: Scope = UNLIMITED
    """What the key may do."""

    @property
    def tier_default(self) -> Tier:
        """Of a request that asks for none."""
        return self.scope.default_tier


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """A request that was accepted; written before an engine sees it."""

    tenant_id: str
    request_id: str
    key_id: str
    model: str
    version: str
    price: Price
    """Frozen here: a price that changes while the request runs does not touch it."""
    accepted_unix_ms: int
    project_id: str = DEFAULT_PROJECT
    tier: Tier = Tier.STANDARD
    """As asked; the settlement says which one served."""
    hold_femto: int = 0
    """Most that the request may cost: its exact input and all the output it may have."""
    idempotency_digest: bytes = b""
    """Of the tenant's idempotency key; empty when none was given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settlement:
    """How an opened request ended; written before the caller's final message."""

    tenant_id: str
    request_id: str
    usage: Usage
    """What was delivered, whatever was charged for it."""
    outcome: Outcome
    charge_femto: int
    """Exact; the ledger adds these up."""
    version: str
    """The artifact that delivered the last token: a rolling upgrade may have changed it."""
    first_token_unix_ms: int | None
    settled_unix_ms: int
    replicas_tried: int = 1
    receipt: Receipt | None = None
    """None for work that no tier promises anything about."""

    @property
    def charge_nano(self) -> int:
        """What the caller was shown."""
        return nano_of(self.charge_femto)


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """A request that ended before it was opened: one event, nothing charged."""

    tenant_id: str
    request_id: str
    """With a suffix that no caller can send: the id itself stays free for the retry."""
    key_id: str
    model: str
    price: Price
    outcome: Outcome
    refused_unix_ms: int
    project_id: str = DEFAULT_PROJECT
    tier: Tier = Tier.STANDARD
    receipt: Receipt | None = None
    """Says whether it was our doing, which the outcome does not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Adjustment:
    """A correction by a person or a rule; what was written before stays."""

    adjustment_id: str
    """Unique within the tenant: the same correction is applied once."""
    tenant_id: str
    amount_femto: int
    """Added to what is owed; negative gives back."""
    currency: str
    reason: str
    actor: str
    project_id: str = DEFAULT_PROJECT
    request_id: str = ""
    """The request that it corrects; empty when it corrects none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """Credit for a tenant, or a slice of a budget that was leased to a frontend."""

    grant_id: str
    tenant_id: str
    amount_femto: int
    currency: str
    actor: str
    budget_id: str = ""
    expires_unix_ms: int = 0
    """0: never."""
    project_id: str = ""
    """Empty: the organisation as a whole."""
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageRecord:
    """One row of `headrace usage`."""

    tenant_id: str
    request_id: str
    key_id: str
    model: str
    version: str
    usage: Usage
    outcome: Outcome
    charge_nano: int
    """`charge_femto`, rounded up."""
    currency: str
    price_version: str
    accepted_unix_ms: int
    first_token_unix_ms: int | None
    settled_unix_ms: int | None
    replicas_tried: int
    project_id: str = DEFAULT_PROJECT
    charge_femto: int = 0
    receipt: Receipt | None = None
    tier: Tier = Tier.STANDARD
    """As asked; the receipt says which one served."""
    hold_femto: int = 0
    waived_femto: int = 0
    """What it would have cost, had its end not been a fault of ours."""
    idempotency_digest: bytes = b""
    """Of the idempotency key that it ran under; empty when none was given."""
