"""What the meter keeps of a request: an opening before any work, a settlement at its end."""

from dataclasses import dataclass

from headrace.serving.domain.usage import Outcome, Price, Usage


@dataclass(frozen=True, slots=True)
class Caller:
    """Who a key belongs to."""

    tenant_id: str
    key_id: str
    """Public part of the key, safe to log."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Settlement:
    """How an opened request ended; written before the caller's final message."""

    tenant_id: str
    request_id: str
    usage: Usage
    """What was delivered, whatever was charged for it."""
    outcome: Outcome
    charge_nano: int
    version: str
    """The artifact that delivered the last token: a rolling upgrade may have changed it."""
    first_token_unix_ms: int | None
    settled_unix_ms: int
    replicas_tried: int = 1


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
    currency: str
    price_version: str
    accepted_unix_ms: int
    first_token_unix_ms: int | None
    settled_unix_ms: int | None
    replicas_tried: int
