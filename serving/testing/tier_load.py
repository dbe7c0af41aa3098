"""Offered load for the tier simulation: arrivals, their mix of tiers and tenants, and the promises.

A trace says when requests come and how long they are. Who sends them, and in which tier, is drawn
with a seed: traces do not say.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from headrace.serving.domain.tier import Objective, Tier

MIX: Mapping[Tier, float] = {
    Tier.RESERVED: 0.05,
    Tier.PRIORITY: 0.15,
    Tier.STANDARD: 0.35,
    Tier.FLEX: 0.30,
    Tier.BATCH: 0.15,
}
"""Share of requests. At 1.5 times the capacity the tiers that are not relegated ask for 83 % of it,
flex for 45 and batch for 22: promises can be kept, if the right ones give way."""

OBJECTIVES: Mapping[Tier, Objective] = {
    Tier.RESERVED: Objective(ttft_ms_max=1_500, itl_ms_max=100),
    Tier.PRIORITY: Objective(ttft_ms_max=2_000, itl_ms_max=100),
    Tier.STANDARD: Objective(ttft_ms_max=5_000, itl_ms_max=200),
    Tier.FLEX: Objective(ttft_ms_max=30_000),
    Tier.BATCH: Objective(deadline_ms_max=86_400_000),
}
"""For prompts of a thousand tokens on one accelerator: 0.15 s of prefill, 20 to 30 ms a step."""

TENANT_RATES = (0.29, 0.08, 0.07, 0.05, 0.04, 0.04, 0.04, 0.03)
"""Relative rates of a tier's tenants: the eight largest clients of ServeGen's reasoning set."""
TENANTS_APART = 1_000
"""Tenants of different tiers have different numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """One request as its client sends it."""

    at_ms: float
    prompt_tokens: int
    answer_tokens: int
    tier: Tier = Tier.STANDARD
    tenant: int = 0


def assigned(
    arrivals: Sequence[Arrival],
    *,
    seed: int,
    mix: Mapping[Tier, float] = MIX,
    rates: Sequence[float] = TENANT_RATES,
) -> list[Arrival]:
    """The same requests, each in a tier and from a tenant drawn by `seed`."""
    rng = random.Random(seed)  # noqa: S311 - reproducible, not secret
    tiers, shares = list(mix), list(mix.values())
    given: list[Arrival] = []
    for arrival in arrivals:
        (tier,) = rng.choices(tiers, shares)
        (number,) = rng.choices(range(len(rates)), rates)
        tenant = 1 + TENANTS_APART * tier.rank + number
        given.append(replace(arrival, tier=tier, tenant=tenant))
    return given


def at_rate(arrivals: Sequence[Arrival], requests_per_s: float) -> list[Arrival]:
    """The same requests, closer together or further apart: bursts keep their shape."""
    first_ms = arrivals[0].at_ms
    span_ms = arrivals[-1].at_ms - first_ms
    scale = (len(arrivals) - 1) * 1000 / (requests_per_s * span_ms)
    return [replace(each, at_ms=(each.at_ms - first_ms) * scale) for each in arrivals]


def synthetic(count: int, *, seed: int) -> list[Arrival]:
    """A small stand-in for the conversation trace: the same medians, and bursts.

    Prompts are log-normal around 1,020 tokens and answers around 129; the rate swings between half
    and twice its mean every 40 s.
    """
    rng = random.Random(seed)  # noqa: S311 - reproducible, not secret
    at_ms = 0.0
    made: list[Arrival] = []
    for _ in range(count):
        is_burst = at_ms % 40_000 < 15_000
        at_ms += rng.expovariate(1 / (500.0 if not is_burst else 125.0))
        made.append(
            Arrival(
                at_ms=at_ms,
                prompt_tokens=min(8_000, max(8, round(rng.lognormvariate(6.93, 0.75)))),
                answer_tokens=min(1_000, max(1, round(rng.lognormvariate(4.86, 0.95)))),
            )
        )
    return made
