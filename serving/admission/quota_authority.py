"""The one place that grants: it debits durably, then says so, so nothing is ever granted twice.

Whatever becomes of a message, of a frontend or of this process, the sum of what frontends may
spend is never more than a limit: a grant is in the book before it is on the wire. Money in a lease
whose frontend died stays debited until `resolve` says what the meter log knows of it.

A rate's bucket is in memory only, and empty after a start: what was granted before is not known to
have drained. Time never runs backwards: a clock that is set back stands still until it catches up,
so no period is opened twice.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

from headrace.serving.admission.gcra import RateBucket
from headrace.serving.admission.lease import LEASE_MS, Ask, Claim, Grant
from headrace.serving.admission.quota_book import Lease, QuotaBook
from headrace.serving.clock import Clock
from headrace.serving.domain.limit import Limit, Metric
from headrace.serving.domain.usage import FEMTO_PER_NANO
from headrace.serving.errors import AccountNotFound, AmountOutOfRange

KEEP_CLOSED_MS = 24 * 3_600_000
"""How long a closed lease is remembered, so that a message about it is not taken for a new one.
Messages are given up after seconds."""
CLAIMS_MAX = 10_000
"""In one message: as many as there may be limits."""

SWEEP_MS = 60_000
KEEP_PAST_MS = 400 * KEEP_CLOSED_MS
"""A period's total is kept for a year and a month."""

_Period = tuple[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """One limit as the authority sees it now. Money is femto-currency."""

    limit: Limit
    period: str
    total: int
    spent: int
    """As reported; for a rate and a number in use, nothing."""
    held: int
    """Leased to frontends and not reported as spent."""
    left: int
    """Of a rate: what could be taken now. Negative when a soft budget is overspent."""


class QuotaAuthority:
    """Belongs to one thread. Every method is one transaction."""

    def __init__(self, book: QuotaBook, *, clock: Clock, limits: Sequence[Limit] = ()) -> None:
        """Take up what the book says. Owns the book from now on."""
        self._book = book
        self._clock = clock
        self._unix_ms = max(clock.unix_ms(), book.unix_ms())
        self._past = book.past()
        self._rates: dict[str, RateBucket] = {}
        self._limits: Mapping[str, Limit] = {}
        self.use(limits)
        self._leases: dict[str, Lease] = {}
        self._by_period: dict[_Period, set[str]] = {}
        """Open leases of each limit and period."""
        self._debits = dict(self._past)
        """Of budgets: what is spent or leased."""
        self._spent = dict(self._past)
        """Of budgets: what is spent, as far as it was reported."""
        self._expires_ms: dict[str, float] = {}
        # Since when a holder is silent is not known after a start: its lease begins anew.
        for lease in book.leases():
            self._index(lease)
        self._swept_ms = clock.monotonic_ms()

    def use(self, limits: Sequence[Limit]) -> None:
        """From now on these hold. What was granted and spent stays granted and spent."""
        self._limits = {limit.name: limit for limit in limits}
        now_ns = self._now_ns()
        for limit in limits:
            if limit.metric.is_rate:
                known = self._rates.get(limit.name)
                if known is None:
                    known = RateBucket(limit=limit.limit, burst=limit.burst_or_limit, now_ns=now_ns)
                    known.charge(limit.burst_or_limit)
                    self._rates[limit.name] = known
                known.change(limit=limit.limit, burst=limit.burst_or_limit, now_ns=now_ns)
        self._rates = {name: rate for name, rate in self._rates.items() if name in self._limits}

    @property
    def limits(self) -> Sequence[Limit]:
        return list(self._limits.values())

    def lease(self, ask: Ask) -> list[Grant]:
        """Hear what a holder has spent and returned, and grant what it may have.

        Raises:
            AmountOutOfRange: an amount is negative, or there are too many claims.
            QuotaUnavailable: nothing was written, so nothing is granted.
        """
        _check(ask)
        self._tick()
        changed: dict[str, Lease] = {}
        grants = [self._answer(ask, claim, changed) for claim in ask.claims]
        with self._book.changing(self._unix_ms) as book:
            book.save(changed.values())
        for lease in changed.values():
            self._install(lease)
        return grants

    def resolve(self, lease_id: str, *, spent: int) -> None:
        """Close a dead frontend's lease: its meter log says that `spent` of it was charged.

        Idempotent: a closed lease stays as it is.

        Raises:
            AccountNotFound: no such lease.
            AmountOutOfRange: less than was reported, or more than was granted.
            QuotaUnavailable: it was not written.
        """
        lease = self._leases.get(lease_id)
        if lease is None:
            raise AccountNotFound(
                f"There is no lease {lease_id!r}.",
                why="Closed leases are forgotten after a day.",
                fix="See open_leases.",
            )
        if not lease.is_open:
            return
        if not lease.spent <= spent <= max(lease.granted, lease.spent):
            raise AmountOutOfRange(
                f"The lease {lease_id!r} cannot have spent {spent:,}.",
                why=f"{lease.spent:,} were reported, {lease.granted:,} were granted.",
                fix="Compare with `headrace meterlog dump`.",
            )
        self._tick()
        closed = replace(lease, spent=spent, closed_unix_ms=self._unix_ms)
        with self._book.changing(self._unix_ms) as book:
            book.save([closed])
        self._install(closed)

    def open_leases(self, holder: str, *, epoch: str) -> list[Lease]:
        """Budgets' leases that other lives of `holder` left open: what `epoch` has to resolve.

        Only a successor asks, who knows that they are over: it has their meter log's lock.
        """
        return [
            lease
            for lease in self._leases.values()
            if lease.holder == holder
            and lease.epoch != epoch
            and lease.is_open
            and self._is_budget(lease)
        ]

    def standings(self) -> list[Standing]:
        """Every limit, as it stands."""
        self._tick()
        return [self._standing(limit) for limit in self._limits.values()]

    def close(self) -> None:
        self._book.close()

    def _answer(self, ask: Ask, claim: Claim, changed: dict[str, Lease]) -> Grant:
        """What becomes of one claim; the leases that it changes go to `changed`."""
        limit = self._limits.get(claim.limit_name)
        said = self._leases.get(claim.lease_id)
        if said is not None and (said.holder, said.epoch) == (ask.holder, ask.epoch):
            said = changed[said.lease_id] = self._heard(said, ask, claim)
            if not said.is_open:
                return Grant(limit_name=claim.limit_name, lease_id=said.lease_id, is_closed=True)
        if limit is None or claim.closes:
            return Grant(limit_name=claim.limit_name)
        period, ends_in_ms = self._period(limit.metric)
        lease = self._lease_of(ask, limit, period, changed)
        left = self._left(limit, period, instead=lease)
        amount = self._slice(claim, left, (limit.name, period)) if ask.seq > lease.seq else 0
        changed[lease.lease_id] = replace(
            lease, granted=lease.granted + amount, seq=max(lease.seq, ask.seq)
        )
        return Grant(
            limit_name=limit.name,
            lease_id=lease.lease_id,
            granted=lease.granted + amount,
            expires_in_ms=min(LEASE_MS, ends_in_ms),
            left=left - amount,
            wait_ms=None if amount else self._wait_ms(limit, claim.need),
        )

    def _lease_of(self, ask: Ask, limit: Limit, period: str, changed: Mapping[str, Lease]) -> Lease:
        """The holder's open lease of this period; a fresh one when there is none."""
        name = lease_id = f"{ask.holder}/{ask.epoch}/{limit.name}@{period}"
        number = 1
        while (known := changed.get(lease_id) or self._leases.get(lease_id)) is not None:
            if known.is_open:
                return known
            number += 1
            lease_id = f"{name}~{number}"
        return Lease(
            lease_id=lease_id,
            limit_name=limit.name,
            period=period,
            holder=ask.holder,
            epoch=ask.epoch,
            seq=-1,
            opened_unix_ms=self._unix_ms,
        )

    def _heard(self, lease: Lease, ask: Ask, claim: Claim) -> Lease:
        """The lease with what its holder says of it. A closed one has heard its last."""
        if not lease.is_open:
            return lease
        spent = lease.spent
        if self._is_budget(lease):
            spent = max(spent, claim.spent)
        elif ask.seq > lease.seq:
            spent = claim.spent
        returned = min(max(lease.returned, claim.returned), max(0, lease.granted - spent))
        return replace(
            lease,
            spent=spent,
            returned=max(lease.returned, returned),
            closed_unix_ms=self._unix_ms if claim.closes else None,
        )

    def _slice(self, claim: Claim, left: int, of: _Period) -> int:
        """How much to grant: what is desired, at most an equal share of half of what is left.

        So slices shrink as the end comes near; but what somebody waits for is granted down to the
        last.
        """
        if left <= 0 or not claim.desired or left < claim.need:
            return 0
        now_ms = self._clock.monotonic_ms()
        holders = sum(self._expires_ms[each] > now_ms for each in self._by_period.get(of, ()))
        return max(claim.need, min(claim.desired, left // (2 * max(1, holders))))

    def _left(self, limit: Limit, period: str, *, instead: Lease | None = None) -> int:
        """What may still be granted, as if `instead` stood in place of the lease of its name."""
        if limit.metric.is_rate:
            return self._rates[limit.name].remaining(self._now_ns())
        of = (limit.name, period)
        if limit.metric.is_budget:
            debit = self._debits.get(of, 0)
            if instead is not None:
                known = self._leases.get(instead.lease_id)
                debit += instead.debit - (known.debit if known else 0)
            return limit.limit * FEMTO_PER_NANO - debit
        now_ms = self._clock.monotonic_ms()
        others = self._by_period.get(of, set()) - {instead.lease_id if instead else ""}
        debit = sum(self._leases[e].debit for e in others if self._expires_ms[e] > now_ms)
        return limit.limit - debit - (instead.debit if instead else 0)

    def _wait_ms(self, limit: Limit, need: int) -> int | None:
        if not limit.metric.is_rate or not need:
            return None
        wait_ns = self._rates[limit.name].wait_ns(need, self._now_ns())
        return None if wait_ns is None else -(-wait_ns // 1_000_000)

    def _install(self, lease: Lease) -> None:
        """`lease` is in the book: let it count."""
        rate = self._rates.get(lease.limit_name)
        if rate is not None:
            known = self._leases.get(lease.lease_id)
            rate.charge(lease.granted - (known.granted if known else 0))
            rate.give_back(lease.returned - (known.returned if known else 0), self._now_ns())
        self._index(lease)

    def _index(self, lease: Lease) -> None:
        of = (lease.limit_name, lease.period)
        if self._is_budget(lease):
            known = self._leases.get(lease.lease_id)
            change = lease.debit - (known.debit if known else 0)
            self._debits[of] = self._debits.get(of, 0) + change
            change = lease.spent - (known.spent if known else 0)
            self._spent[of] = self._spent.get(of, 0) + change
        self._leases[lease.lease_id] = lease
        members = self._by_period.setdefault(of, set())
        if lease.is_open:
            members.add(lease.lease_id)
        else:
            members.discard(lease.lease_id)
        self._expires_ms[lease.lease_id] = self._clock.monotonic_ms() + LEASE_MS

    def _sweep(self) -> None:
        """Forget leases that can never matter again; keep what they have spent."""
        now_ms = self._clock.monotonic_ms()
        if now_ms - self._swept_ms < SWEEP_MS:
            return
        self._swept_ms = now_ms
        closed = [
            replace(e, closed_unix_ms=self._unix_ms)
            for e in self._leases.values()
            if e.is_open and self._is_over(e)
        ]
        old = [
            e
            for e in self._leases.values()
            if not e.is_open and self._unix_ms - (e.closed_unix_ms or 0) > KEEP_CLOSED_MS
        ]
        past = dict(self._past)
        oldest = _at(self._unix_ms - KEEP_PAST_MS).strftime("%Y-%m-%d")
        with self._book.changing(self._unix_ms) as book:
            book.save(closed)
            for lease in old:
                of = (lease.limit_name, lease.period)
                past[of] = past.get(of, 0) + lease.spent
                book.fold(lease, past_spent=past[of])
            book.forget_past(before=oldest)
        for lease in closed:
            self._install(lease)
        for lease in old:
            del self._leases[lease.lease_id], self._expires_ms[lease.lease_id]
        self._past = {of: spent for of, spent in past.items() if not of[1] or of[1] >= oldest}

    def _is_over(self, lease: Lease) -> bool:
        """Whether nothing can be spent of an open lease any more."""
        silent_ms = self._clock.monotonic_ms() - self._expires_ms[lease.lease_id]
        if silent_ms < KEEP_CLOSED_MS:
            return False
        return lease.debit == lease.spent or not self._is_budget(lease)

    def _standing(self, limit: Limit) -> Standing:
        period = self._period(limit.metric)[0]
        of = (limit.name, period)
        left = self._left(limit, period)
        total = limit.limit
        spent = 0
        if limit.metric.is_rate:
            total = limit.burst_or_limit
        elif limit.metric.is_budget:
            total = limit.limit * FEMTO_PER_NANO
            spent = self._spent.get(of, 0)
        held = 0 if limit.metric.is_rate else total - left - spent
        return Standing(limit=limit, period=period, total=total, spent=spent, held=held, left=left)

    def _tick(self) -> None:
        self._unix_ms = max(self._unix_ms, self._clock.unix_ms())
        self._sweep()

    def _now_ns(self) -> int:
        return int(self._clock.monotonic_ms() * 1_000_000)

    def _is_budget(self, lease: Lease) -> bool:
        return Metric(lease.limit_name.split("|")[2]).is_budget

    def _period(self, metric: Metric) -> tuple[str, int]:
        """The period that runs, and for how many milliseconds more."""
        now = _at(self._unix_ms)
        midnight = now.replace(hour=0, minute=0, second=0, microsecond=0)
        match metric:
            case Metric.BUDGET_DAY:
                name, end = f"{now:%Y-%m-%d}", midnight + timedelta(days=1)
            case Metric.BUDGET_MONTH:
                next_month = midnight.replace(day=1) + timedelta(days=32)
                name, end = f"{now:%Y-%m}", next_month.replace(day=1)
            case _:
                return "", LEASE_MS
        return name, (end - now) // timedelta(milliseconds=1)


def _at(unix_ms: int) -> datetime:
    return datetime.fromtimestamp(unix_ms // 1000, UTC) + timedelta(milliseconds=unix_ms % 1000)


def _check(ask: Ask) -> None:
    amounts = [
        each
        for claim in ask.claims
        for each in (claim.returned, claim.spent, claim.need, claim.desired)
    ]
    if len(ask.claims) > CLAIMS_MAX or any(amount < 0 for amount in amounts) or ask.seq < 0:
        raise AmountOutOfRange(
            "The message of a lease's holder cannot be right.",
            why=f"Amounts are not negative, and a message has at most {CLAIMS_MAX:,} claims.",
            fix="Run the same version of Headrace on all frontends.",
        )
