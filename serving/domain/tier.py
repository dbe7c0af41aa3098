"""A tier is a promise that is measured: its objectives, and what a request got."""

from dataclasses import dataclass
from enum import StrEnum


class Tier(StrEnum):
    """From the strongest promise to none."""

    RESERVED = "reserved"
    """Capacity is held for the tenant; beyond it a request spills to standard or is refused."""
    PRIORITY = "priority"
    STANDARD = "standard"
    FLEX = "flex"
    """Cheaper, and the first to be refused, delayed or preempted."""
    BATCH = "batch"
    """Within 24 hours, on capacity that nobody else wants."""

    @property
    def rank(self) -> int:
        """0 is served first."""
        return _RANKS[self]

    @property
    def may_be_relegated(self) -> bool:
        """Whether its work gives way when the others' promises are at stake."""
        return self in (Tier.FLEX, Tier.BATCH)


_RANKS = {tier: rank for rank, tier in enumerate(Tier)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """What a tier promises for one model. None promises nothing."""

    ttft_ms_max: int | None = None
    """First token within this, for `ttft_share` of requests in a month."""
    itl_ms_max: int | None = None
    """A request's p99 gap between tokens is at most this, for `itl_share` of requests."""
    deadline_ms_max: int | None = None
    """The whole answer within this (batch: 24 h)."""
    ttft_ppm: int = 950_000
    """Share of requests that must meet ttft_ms_max, in millionths."""
    itl_ppm: int = 990_000
    deadline_ppm: int = 990_000
    availability_ppm: int = 999_000
    """Share of one-minute intervals in which requests were answered, in millionths."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """What a scheduler needs to know of a sequence's tier to keep its objective."""

    tier: Tier = Tier.STANDARD
    """The one that serves it."""
    tenant: int = 0
    """Whose work it is, for fairness inside a tier: opaque, equal for one tenant."""
    weight: int = 1
    """The tenant's share beside others of its tier."""
    due_ms: float | None = None
    """When the first token is due, on the monotonic clock of whoever holds this; None: nothing
    was promised."""
    itl_ms_max: int | None = None
    """Longest gap between two tokens; None: nothing was promised."""


NOTHING_PROMISED = Promise()


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What a request is promised, decided when it is accepted."""

    tier_asked: Tier = Tier.STANDARD
    tier_served: Tier = Tier.STANDARD
    objective: Objective = Objective()
    """Of the tier that serves."""
    tenant: int = 0
    weight: int = 1
    """As in Promise."""


PLAIN = Terms()
"""Standard, with nothing promised."""


class Verdict(StrEnum):
    """Whether one request got what its tier promises."""

    MET = "met"
    MISSED = "missed"
    EXCLUDED = "excluded"
    """The caller ended it, or sent what cannot be answered: no promise applies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What one request was promised and got. Microseconds, so that integers keep the precision."""

    tier_asked: Tier
    tier_served: Tier
    ttft_us: int | None = None
    """From acceptance to the first chunk at the gateway's edge; None when there was none."""
    itl_p50_us: int | None = None
    itl_p99_us: int | None = None
    """Gaps between chunks of one answer; None with fewer than two."""
    verdict: Verdict = Verdict.EXCLUDED
    missed: tuple[str, ...] = ()
    """Which objectives: `ttft`, `itl`, `deadline`, `availability`."""
