"""The monthly SLA statement of a tenant: attainment, availability, breaches and credits.

A pure function of the month's records. Every request that was offered counts, refused ones too:

* a request counts for `ttft` and `deadline` unless it is excluded; one that we refused or failed is
  a miss. For `itl` it counts if it had gaps;
* a minute is up if at least `MINUTE_UP_PPM` of the requests that came in it were answered;
  `availability` is the share of minutes that are up, of those in which the tenant asked for
  anything. An idle minute proves nothing and is left out;
* a request counts under the tier that served it: what spilled was promised what standard promises.

Shares are millionths, rounded down, so that a rounding never hides a breach.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from headrace.serving.domain.record import UsageRecord
from headrace.serving.domain.tier import Objective, Receipt, Tier, Verdict
from headrace.serving.domain.usage import Outcome
from headrace.serving.domain.verdict import AVAILABILITY, DEADLINE, ITL, TTFT
from headrace.serving.metering.sla_month import Month

PPM = 1_000_000
MINUTE_MS = 60_000
MINUTE_UP_PPM = 950_000
"""One failure in twenty does not make a minute an outage; Google's APIs draw the same line."""
BREACHES_MAX = 1_000
"""Of each kind listed for one line; all are counted."""

_OURS = frozenset({Outcome.FAILED, Outcome.RECOVERED, Outcome.EXPIRED})


@dataclass(frozen=True, slots=True, kw_only=True)
class CreditRule:
    """What is given back, of what a line was charged, when less was attained than promised."""

    objective: str
    credit_ppm: int
    below_ppm: int = PPM
    """Applies below this..."""
    short_ppm: int = 0
    """...and further below the promise than this."""

    def applies(self, *, attained_ppm: int, promised_ppm: int) -> bool:
        return attained_ppm < min(self.below_ppm, promised_ppm - self.short_ppm)


CREDIT_RULES: Sequence[CreditRule] = (
    CreditRule(objective=AVAILABILITY, below_ppm=999_000, credit_ppm=100_000),
    CreditRule(objective=AVAILABILITY, below_ppm=990_000, credit_ppm=250_000),
    CreditRule(objective=TTFT, credit_ppm=50_000),
    CreditRule(objective=TTFT, short_ppm=50_000, credit_ppm=100_000),
    CreditRule(objective=ITL, credit_ppm=50_000),
    CreditRule(objective=ITL, short_ppm=50_000, credit_ppm=100_000),
    CreditRule(objective=DEADLINE, credit_ppm=100_000),
)
"""The greatest that applies to a line is what it is credited; credits do not add up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attainment:
    """One objective of a line. For `availability` the unit is minutes, else requests."""

    objective: str
    promised_ppm: int
    counted: int
    met: int
    credit_ppm: int

    @property
    def attained_ppm(self) -> int:
        return self.met * PPM // self.counted if self.counted else PPM


@dataclass(frozen=True, slots=True, kw_only=True)
class MissedRequest:
    request_id: str
    accepted_unix_ms: int
    missed: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DownMinute:
    unix_ms: int
    offered: int
    failed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One model in one tier and currency."""

    model: str
    tier: Tier
    currency: str
    requests: int
    excluded: int
    attainments: Sequence[Attainment]
    missed_requests: int
    down_minutes: int
    missed: Sequence[MissedRequest]
    """The first of them, at most BREACHES_MAX; likewise `down`."""
    down: Sequence[DownMinute]
    charge_femto: int

    @property
    def credit_ppm(self) -> int:
        return max((each.credit_ppm for each in self.attainments), default=0)

    @property
    def credit_femto(self) -> int:
        """Rounded up: the caller's way."""
        return -(-self.charge_femto * self.credit_ppm // PPM)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdjustProposal:
    """A credit as the meter log's Adjust takes it: the id makes it apply once."""

    adjustment_id: str
    tenant_id: str
    amount_femto: int
    """Negative: it is given back."""
    currency: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Statement:
    """What a tenant was promised in a month and got."""

    tenant_id: str
    month: Month
    lines: Sequence[Line]

    def adjustments(self) -> list[AdjustProposal]:
        """The credits, one for each line that has one."""
        return [
            AdjustProposal(
                adjustment_id=f"sla/{self.month}/{line.model}/{line.tier}/{line.currency}",
                tenant_id=self.tenant_id,
                amount_femto=-line.credit_femto,
                currency=line.currency,
                reason=f"SLA of {self.month}: {line.tier} on {line.model}, "
                + ", ".join(each.objective for each in line.attainments if each.credit_ppm),
            )
            for line in self.lines
            if line.credit_femto
        ]


@dataclass(slots=True, eq=False)
class _Tally:
    """What is known of one line so far."""

    requests: int = 0
    excluded: int = 0
    counted: Counter[str] = field(default_factory=Counter[str])
    met: Counter[str] = field(default_factory=Counter[str])
    offered: Counter[int] = field(default_factory=Counter[int])
    failed: Counter[int] = field(default_factory=Counter[int])
    """By minute; a month has 44,640."""
    missed_requests: int = 0
    missed: list[MissedRequest] = field(default_factory=list[MissedRequest])
    charge_femto: int = 0

    def add(self, record: UsageRecord, receipt: Receipt, objective: Objective) -> None:
        self.requests += 1
        self.charge_femto += record.charge_femto
        if receipt.verdict is Verdict.EXCLUDED:
            self.excluded += 1
            return
        missed = receipt.missed
        has_failed = AVAILABILITY in missed
        counts = {
            TTFT: objective.ttft_ms_max is not None,
            ITL: objective.itl_ms_max is not None and receipt.itl_p99_us is not None,
            DEADLINE: objective.deadline_ms_max is not None,
        }
        for name in (name for name, does_count in counts.items() if does_count):
            self.counted[name] += 1
            self.met[name] += name not in missed and not has_failed
        minute = record.accepted_unix_ms // MINUTE_MS
        self.offered[minute] += 1
        self.failed[minute] += has_failed
        if missed:
            self.missed_requests += 1
            if len(self.missed) < BREACHES_MAX:
                self.missed.append(
                    MissedRequest(
                        request_id=record.request_id,
                        accepted_unix_ms=record.accepted_unix_ms,
                        missed=missed,
                    )
                )


def statement(
    records: Iterable[UsageRecord],
    *,
    tenant_id: str,
    month: Month,
    objective_of: Callable[[str, Tier], Objective],
    rules: Sequence[CreditRule] = CREDIT_RULES,
) -> Statement:
    """The statement of one tenant's month.

    Args:
        records: in any order; those of others, of other months, and open ones are left out.
        tenant_id: whose statement.
        month: by acceptance, in UTC.
        objective_of: what a tier promises for a model.
        rules: of credits.
    """
    tallies: defaultdict[tuple[str, Tier, str], _Tally] = defaultdict(_Tally)
    for record in records:
        is_mine = record.tenant_id == tenant_id and record.accepted_unix_ms in month
        if is_mine and record.outcome is not Outcome.OPEN:
            receipt = record.receipt or _presumed(record)
            tier = receipt.tier_served
            tally = tallies[record.model, tier, record.currency]
            tally.add(record, receipt, objective_of(record.model, tier))
    lines = [
        _line(model, tier, currency, tally, objective_of(model, tier), rules)
        for (model, tier, currency), tally in sorted(
            tallies.items(), key=lambda entry: (entry[0][0], entry[0][1].rank, entry[0][2])
        )
    ]
    return Statement(tenant_id=tenant_id, month=month, lines=lines)


def _presumed(record: UsageRecord) -> Receipt:
    """The receipt of a request whose frontend died before it could write one, or that has none.

    Whether it spilled died with the frontend: it counts under the tier that it asked for.
    """
    if record.outcome in _OURS:
        verdict, missed = Verdict.MISSED, (AVAILABILITY,)
    else:
        verdict, missed = Verdict.EXCLUDED, ()
    return Receipt(tier_asked=record.tier, tier_served=record.tier, verdict=verdict, missed=missed)


def _line(
    model: str,
    tier: Tier,
    currency: str,
    tally: _Tally,
    objective: Objective,
    rules: Sequence[CreditRule],
) -> Line:
    down = [
        DownMinute(unix_ms=minute * MINUTE_MS, offered=offered, failed=tally.failed[minute])
        for minute, offered in sorted(tally.offered.items())
        if (offered - tally.failed[minute]) * PPM < MINUTE_UP_PPM * offered
    ]
    promised: Mapping[str, tuple[int, int, int]] = {
        TTFT: (objective.ttft_ppm, tally.counted[TTFT], tally.met[TTFT]),
        ITL: (objective.itl_ppm, tally.counted[ITL], tally.met[ITL]),
        DEADLINE: (objective.deadline_ppm, tally.counted[DEADLINE], tally.met[DEADLINE]),
        AVAILABILITY: (
            objective.availability_ppm,
            len(tally.offered),
            len(tally.offered) - len(down),
        ),
    }
    return Line(
        model=model,
        tier=tier,
        currency=currency,
        requests=tally.requests,
        excluded=tally.excluded,
        attainments=[
            _attainment(name, promised_ppm, counted, met, rules)
            for name, (promised_ppm, counted, met) in promised.items()
            if counted
        ],
        missed_requests=tally.missed_requests,
        down_minutes=len(down),
        missed=tally.missed,
        down=down[:BREACHES_MAX],
        charge_femto=tally.charge_femto,
    )


def _attainment(
    name: str, promised_ppm: int, counted: int, met: int, rules: Sequence[CreditRule]
) -> Attainment:
    attained_ppm = met * PPM // counted
    credits_ppm = (
        rule.credit_ppm
        for rule in rules
        if rule.objective == name
        and rule.applies(attained_ppm=attained_ppm, promised_ppm=promised_ppm)
    )
    return Attainment(
        objective=name,
        promised_ppm=promised_ppm,
        counted=counted,
        met=met,
        credit_ppm=max(credits_ppm, default=0),
    )
