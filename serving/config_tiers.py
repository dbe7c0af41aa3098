"""What the tiers promise, who holds capacity, and whose share is larger: the `tiers:` section."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from headrace.serving.config_reader import bounded
from headrace.serving.domain.tier import Objective, Tier

HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS
PPM = 1_000_000


class Overflow(StrEnum):
    """What becomes of a reserved request beyond its tenant's lease."""

    SPILL = "spill"
    """It is served, and priced, as standard, and its receipt says so."""
    REFUSE = "refuse"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelObjective:
    """What a tier promises. Unset: what the tier says, else its default; 0 promises nothing."""

    ttft_ms: int | None = bounded(None, 0, HOUR_MS)
    """From acceptance to the first chunk."""
    itl_ms: int | None = bounded(None, 0, HOUR_MS)
    """The p99 of a request's gaps between chunks."""
    deadline_ms: int | None = bounded(None, 0, 7 * DAY_MS)
    """From acceptance to the whole answer."""
    ttft_ppm: int | None = bounded(None, 0, PPM)
    """Share of a month's requests for which that holds, in millionths; so with the next two."""
    itl_ppm: int | None = bounded(None, 0, PPM)
    deadline_ppm: int | None = bounded(None, 0, PPM)
    availability_ppm: int | None = bounded(None, 0, PPM)
    """Share of a month's minutes in which requests were answered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TierObjective(ModelObjective):
    """What a tier promises for every model, and where models differ."""

    models: Mapping[str, ModelObjective] = field(default_factory=dict[str, ModelObjective])
    """By model name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """Capacity that one tenant holds in the reserved tier, at each frontend."""

    kv_tokens: int = bounded(8_192, 1, 1 << 30)
    """Prompt and answer tokens of its reserved requests that may be open at once."""
    requests: int = bounded(16, 1, 1 << 16)
    """Reserved requests that may be open at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """A tenant's share beside the others of its tier."""

    weight: int = bounded(1, 1, 1_000)
    """Twice the weight is twice the tokens while both have work waiting."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TiersConfig:
    """Objectives, leases and shares.

    The defaults suit the demo model on two cores, where 32 streams see a TTFT p99 of 1.3 s and an
    ITL p99 of 49 ms.
    """

    reserved: TierObjective = field(default_factory=TierObjective)
    priority: TierObjective = field(default_factory=TierObjective)
    standard: TierObjective = field(default_factory=TierObjective)
    flex: TierObjective = field(default_factory=TierObjective)
    batch: TierObjective = field(default_factory=TierObjective)
    reserved_overflow: Overflow = Overflow.SPILL
    leases: Mapping[str, Lease] = field(default_factory=dict[str, Lease])
    """By tenant. A tenant without one has no reserved capacity: all of it overflows."""
    shares: Mapping[str, Share] = field(default_factory=dict[str, Share])
    """By tenant; everybody else has a weight of 1."""

    def objective(self, model: str, tier: Tier) -> Objective:
        """What `tier` promises for `model`: its own word, else the tier's, else the default."""
        section: TierObjective = getattr(self, tier.value)
        default = _DEFAULTS[tier]
        levels = [section] if (own := section.models.get(model)) is None else [own, section]

        def said(name: str, otherwise: int | None) -> int:
            each = (getattr(level, name) for level in levels)
            return next((value for value in each if value is not None), otherwise or 0)

        return Objective(
            ttft_ms_max=said("ttft_ms", default.ttft_ms_max) or None,
            itl_ms_max=said("itl_ms", default.itl_ms_max) or None,
            deadline_ms_max=said("deadline_ms", default.deadline_ms_max) or None,
            ttft_ppm=said("ttft_ppm", default.ttft_ppm),
            itl_ppm=said("itl_ppm", default.itl_ppm),
            deadline_ppm=said("deadline_ppm", default.deadline_ppm),
            availability_ppm=said("availability_ppm", default.availability_ppm),
        )


_DEFAULTS: Mapping[Tier, Objective] = {
    Tier.RESERVED: Objective(
        ttft_ms_max=1_000, itl_ms_max=80, ttft_ppm=990_000, availability_ppm=999_500
    ),
    Tier.PRIORITY: Objective(ttft_ms_max=1_500, itl_ms_max=80, ttft_ppm=990_000),
    Tier.STANDARD: Objective(
        ttft_ms_max=5_000, itl_ms_max=200, itl_ppm=950_000, availability_ppm=995_000
    ),
    # May be refused at any time, so it promises no availability.
    Tier.FLEX: Objective(ttft_ms_max=30_000, ttft_ppm=900_000, availability_ppm=0),
    Tier.BATCH: Objective(deadline_ms_max=DAY_MS, availability_ppm=0),
}
"""What holds where nothing is configured."""
