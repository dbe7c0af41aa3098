"""What a request is promised when it is accepted: its terms, and the capacity that is held for it.

A tenant's lease bounds its reserved requests by the KV tokens and the number that are open at once,
at each frontend: with several frontends each holds that much, so a lease is configured as the
tenant's capacity divided by the frontends.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256

from headrace.serving.config_tiers import Lease, Overflow, TiersConfig
from headrace.serving.domain.generate import Generate
from headrace.serving.domain.tier import Terms, Tier
from headrace.serving.domain.usage import Price
from headrace.serving.errors import TierUnavailable
from headrace.serving.ports import Entry

RETRY_AFTER_MS = 1_000
"""About as long as one of a tenant's own answers takes to end and give its share back."""


@dataclass(slots=True, eq=False)
class _Held:
    """What one tenant's open reserved requests take of its lease."""

    kv_tokens: int = 0
    requests: int = 0


class TierDesk:
    """Implements ports.Tiers. Owned by the frontend's event loop."""

    def __init__(self, tiers: TiersConfig, *, price_for: Callable[[str, Tier], Price]) -> None:
        """Begin with nothing held.

        Args:
            tiers: objectives, leases and shares.
            price_for: of a model in a tier; what spills is priced as what it becomes.
        """
        self._tiers = tiers
        self._price_for = price_for
        self._held = {tenant_id: _Held() for tenant_id in tiers.leases}

    def terms(self, tenant_id: str, *, model: str, tier: Tier) -> Terms:
        """What `tier` means for a request of `model`."""
        share = self._tiers.shares.get(tenant_id)
        return Terms(
            tier_asked=tier,
            tier_served=tier,
            objective=self._tiers.objective(model, tier),
            tenant=tenant_number(tenant_id),
            weight=share.weight if share else 1,
        )

    def enter(self, request: Generate) -> Entry:
        """See ports.Tiers.enter."""
        if request.terms.tier_asked is not Tier.RESERVED:
            return Entry(request, _nothing)
        tenant_id = request.caller.tenant_id
        kv_tokens = len(request.prompt_ids) + request.n * request.sampling.max_tokens
        lease = self._tiers.leases.get(tenant_id)
        if lease is not None and self._take(tenant_id, lease, kv_tokens):
            return Entry(request, partial(self._give_back, tenant_id, kv_tokens))
        if self._tiers.reserved_overflow is Overflow.REFUSE:
            raise _full(tenant_id, lease, kv_tokens)
        spilled = replace(
            request.terms,
            tier_served=Tier.STANDARD,
            objective=self._tiers.objective(request.model, Tier.STANDARD),
        )
        price = self._price_for(request.model, Tier.STANDARD)
        return Entry(replace(request, terms=spilled, price=price), _nothing)

    def _take(self, tenant_id: str, lease: Lease, kv_tokens: int) -> bool:
        held = self._held[tenant_id]
        if held.requests >= lease.requests or held.kv_tokens + kv_tokens > lease.kv_tokens:
            return False
        held.requests += 1
        held.kv_tokens += kv_tokens
        return True

    def _give_back(self, tenant_id: str, kv_tokens: int) -> None:
        held = self._held[tenant_id]
        held.requests -= 1
        held.kv_tokens -= kv_tokens
        assert held.requests >= 0
        assert held.kv_tokens >= 0


def tenant_number(tenant_id: str) -> int:
    """64 bits that stand for a tenant where only equality matters: replicas learn no names."""
    return int.from_bytes(sha256(b"headrace tenant/" + tenant_id.encode()).digest()[:8])


def _nothing() -> None:
    """There was nothing to give back."""


def _full(tenant_id: str, lease: Lease | None, kv_tokens: int) -> TierUnavailable:
    if lease is None:
        return TierUnavailable(
            f"Tenant {tenant_id!r} holds no reserved capacity.",
            why="The reserved tier serves what was leased, and this server refuses the rest.",
            fix="Ask for another tier, or have a lease added under `tiers.leases`.",
            metric="reserved_requests",
            subject=f"organisation:{tenant_id}",
            field="tier",
        )
    return TierUnavailable(
        f"The reserved capacity of tenant {tenant_id!r} is taken.",
        why=f"The request may use {kv_tokens:,} tokens; the lease is {lease.kv_tokens:,} tokens in "
        f"{lease.requests:,} requests at once, and the rest of it is in use.",
        fix="Wait for an answer of yours to end, ask for another tier, or have the lease raised.",
        metric="reserved_kv_tokens",
        limit=lease.kv_tokens,
        subject=f"organisation:{tenant_id}",
        field="tier",
        retry_after_ms=RETRY_AFTER_MS,
    )
