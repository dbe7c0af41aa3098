"""Filter, score, pick; the reason is kept.

The score is a cost in tokens: how much a replica would compute before and beside the newcomer's
first token. Prefix affinity and load meet in one unit, so no weights need tuning:

    cost = (prompt - resident prefix) + pending prompt tokens + FULL_BATCH_TOKENS * sequences / rows

What waits in weaker tiers is not pending to a request: it goes first.

A replica with the whole prompt of 400 tokens resident and half its 32 rows busy costs
0 + 0 + 512 * 16 / 32 = 256, an idle one without the prefix 400: the warm one wins. At 30 busy rows
it would cost 480 and lose.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from headrace.serving.domain.tier import Tier
from headrace.serving.router.endpoint import Endpoint

STALE_AFTER_MS = 3_000.0
"""Three missed heartbeats: what we know of the replica is no longer worth acting on."""

FULL_BATCH_TOKENS = 512
"""A replica whose rows are all busy is as far away as this many prompt tokens: one full step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What a request needs of a replica."""

    model: str
    prompt_tokens: int
    chain: Sequence[int]
    """From `prefix_chain`."""
    version: str = ""
    """The preferred artifact; another one serves when no replica has this one. Empty: any."""
    without: Collection[str] = ()
    """Replicas this request has lost already."""
    tier: Tier = Tier.BATCH
    """That serves it; the weakest waits for everybody."""


@dataclass(frozen=True, slots=True)
class Picked:
    endpoint: Endpoint
    why: str


def refusal(endpoint: Endpoint, ask: Ask, *, now_ms: float) -> str | None:
    """Why `endpoint` cannot take the request; None when it can."""
    facts = endpoint.facts
    checks = (
        (facts.model != ask.model, f"serves {facts.model}"),
        (facts.replica_id in ask.without, "was lost under this request"),
        (not endpoint.is_connected, "not connected"),
        (not facts.ready, "not ready"),
        (endpoint.load.draining, "draining"),
        (now_ms - endpoint.heard_ms > STALE_AFTER_MS, "silent for over 3 s"),
    )
    return next((why for applies, why in checks if applies), None)


def cost_tokens(endpoint: Endpoint, ask: Ask) -> tuple[float, int]:
    """The formula of this module, and the resident prefix it assumed."""
    load = endpoint.load
    resident = min(endpoint.prefixes.matched_tokens(ask.chain), ask.prompt_tokens)
    sequences = load.running + load.waiting + endpoint.sent_sequences
    weaker = sum(q.pending_tokens for tier, q in load.tiers.items() if tier.rank > ask.tier.rank)
    cost = (
        ask.prompt_tokens
        - resident
        + load.pending_tokens
        - weaker
        + endpoint.sent_tokens
        + FULL_BATCH_TOKENS * sequences / max(load.rows_max, 1)
    )
    return cost, resident


def pick(endpoints: Sequence[Endpoint], ask: Ask, *, now_ms: float) -> Picked | str:
    """The cheapest replica that can take the request, or why none can."""
    refused: list[str] = []
    eligible: list[Endpoint] = []
    for endpoint in endpoints:
        if endpoint.facts.model != ask.model:
            continue
        if why := refusal(endpoint, ask, now_ms=now_ms):
            refused.append(f"{endpoint.facts.replica_id}: {why}")
        else:
            eligible.append(endpoint)
    if not eligible:
        return "; ".join(refused[:8]) or "no replica of it is known"
    preferred = [e for e in eligible if e.facts.version == ask.version] or eligible
    costs = [(*cost_tokens(e, ask), e.facts.replica_id, e) for e in preferred]
    cost, resident, replica_id, endpoint = min(costs, key=lambda entry: (entry[0], entry[2]))
    why = (
        f"{replica_id} costs {cost:.0f} tokens ({resident} of {ask.prompt_tokens} resident, "
        f"{endpoint.load.running} running, {endpoint.load.waiting} waiting); "
        f"{len(costs) - 1} others cost more, {len(refused)} cannot"
    )
    return Picked(endpoint, why)
