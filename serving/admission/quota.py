"""Whether a caller may have what it asks for: all limits that apply to it pass, or none is touched.

Rates, places and money of key, project and organisation, each maybe of one model alone. What a
request reserves is exact for its input and expected for its output: the 95th percentile of the
tenant's recent answers. A decision compares and adds whole numbers; it waits for nobody while this
frontend holds a lease of each shared limit.

Measured with `headrace bench admission`: 4.7 us for six limits of which one is a hard budget, on a
Zen 5 core that other work shared (2026-11-27).
"""

from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from headrace.serving.admission.gcra import GaugeBucket, RateBucket
from headrace.serving.admission.lease_bucket import LeasedBucket, Want
from headrace.serving.admission.lease_keeper import LeaseKeeper, now_ns
from headrace.serving.admission.quota_estimate import OutputEstimator
from headrace.serving.admission.quota_hold import (
    ROUNDS_MAX,
    SLOTS,
    Applicable,
    Bucket,
    HeldMoney,
    Hold,
    Slot,
)
from headrace.serving.admission.quota_refusal import refusal_of, short_of_budget, wrong_currency
from headrace.serving.clock import Clock
from headrace.serving.domain.generate import Generate
from headrace.serving.domain.limit import Limit, Metric, subjects_of
from headrace.serving.domain.record import Caller
from headrace.serving.errors import LimitExceeded
from headrace.serving.observe_quota import Decision, QuotaMetrics

CALLERS_MAX = 10_000
"""Callers times models whose limits are looked up once: 10 MB."""


class Short(NamedTuple):
    """Why a request cannot begin."""

    limit: Limit
    bucket: Bucket
    want: Want


@dataclass(frozen=True, slots=True)
class Allowance:
    """A rate as its caller is shown it."""

    limit: int
    remaining: int
    reset_ns: int


class Quota:
    """One for each frontend; belongs to its event loop."""

    def __init__(
        self,
        *,
        clock: Clock,
        leases: LeaseKeeper | None = None,
        metrics: QuotaMetrics | None = None,
        limits: Sequence[Limit] = (),
        leases_all: bool = False,
    ) -> None:
        """Nothing is limited but by `limits`.

        Args:
            clock: for refilling.
            leases: where budgets' money comes from; needed when there are budgets.
            metrics: None keeps them to itself.
            limits: what holds until `use` is called.
            leases_all: several frontends share all limits, not only budgets.
        """
        self._clock = clock
        self._leases = leases
        self._metrics = metrics or QuotaMetrics()
        self._leases_all = leases_all
        self._estimator = OutputEstimator()
        self._buckets: dict[str, Bucket] = {}
        self._limits: Mapping[tuple[str, str | None], Sequence[Limit]] = {}
        self._applicable: OrderedDict[tuple[str, ...], Applicable] = OrderedDict()
        self.use(limits)

    def use(self, limits: Sequence[Limit]) -> None:
        """From now on these limits hold; what was taken of one that stays, stays taken."""
        now = now_ns(self._clock)
        self._buckets = {limit.name: self._bucket(limit, now) for limit in limits}
        by_scope: defaultdict[tuple[str, str | None], list[Limit]] = defaultdict(list)
        for limit in limits:
            by_scope[limit.subject, limit.model].append(limit)
        self._limits = dict(by_scope)
        self._applicable.clear()

    async def admit(self, request: Generate) -> Hold:
        """Reserve what the request needs of every limit, or refuse it; the caller settles the hold.

        Raises:
            QuotaExceeded: a rate; with the time after which it fits, if it ever does.
            ConcurrencyExceeded: too many requests, or too much KV cache in use.
            BudgetExhausted: a hard budget does not cover the prompt and one token.
            QuotaUnavailable: a shared limit's slice is used up and its authority is away.
        """
        hold = self.decide(request)
        rounds = 0
        came = True
        while not isinstance(hold, Hold):
            bucket, want = hold.bucket, hold.want
            if not came or rounds >= ROUNDS_MAX or not isinstance(bucket, LeasedBucket):
                raise self._refusal(hold)
            assert self._leases is not None
            came = await self._leases.acquire(bucket, want)
            rounds += 1
            hold = self.decide(request)
            if not isinstance(hold, Hold) and hold.bucket is not bucket:
                came = True  # Another one is short, and was not asked for yet.
        self._metrics.decided(None, Decision.ALLOWED)
        return hold

    def decide(self, request: Generate) -> "Hold | Short":
        """The hold; or which limit is short, and of what. Then nothing is taken.

        Raises:
            BudgetExhausted: a hard budget is in another currency.
        """
        price, n, max_tokens = request.price, request.n, request.sampling.max_tokens
        limits = self._applicable_to(request.caller, request.model, price.currency)
        now = now_ns(self._clock)
        prompt_tokens = len(request.prompt_ids)
        estimate = limits.estimate
        expected = n * min(max_tokens, estimate.value) if estimate is not None else 0
        reserved = min(expected, limits.output_burst)
        amounts = [1, prompt_tokens, reserved, 1, prompt_tokens + n * max_tokens]
        for bucket, slot in limits.taken:
            if not bucket.fits(amounts[slot], now):
                limit = limits.limits[limits.taken.index((bucket, slot))]
                return Short(limit, bucket, Want(amounts[slot], amounts[slot]))
        money: Sequence[HeldMoney] = ()
        prompt_femto = token_femto = 0
        if limits.budgets:
            if limits.foreign is not None:
                raise wrong_currency(limits.foreign, price)
            each_femto, token_femto = price.dearest_femto()
            prompt_femto = prompt_tokens * each_femto
            start = prompt_femto + token_femto
            wanted = prompt_femto + max(1, expected) * token_femto
            for budget in limits.budgets:
                if budget.hard and not budget.fits(start, now):
                    return Short(budget.limit, budget, Want(start, wanted))
            money = [HeldMoney(budget, wanted, now) for budget in limits.budgets]
        for bucket, slot in limits.taken:
            bucket.charge(amounts[slot])
        return Hold(
            request,
            limits,
            amounts,
            money,
            self._leases,
            self._clock,
            prompt_femto=prompt_femto,
            token_femto=token_femto,
        )

    def over_budget(self, hold: Hold) -> None:
        """Note that a hard budget ended a request in the middle."""
        if hold.short_of is not None:
            self._metrics.decided(hold.short_of.limit.metric, Decision.ENDED)

    def allowance(self, caller: Caller, model: str, metrics: Sequence[Metric]) -> Allowance | None:
        """The tightest of the caller's rates in these metrics: of which least is left."""
        now = now_ns(self._clock)
        found = [
            Allowance(limit.limit, max(0, bucket.remaining(now)), bucket.reset_ns(now))
            for bucket, limit in self._rates(caller, model)
            if limit.metric in metrics
        ]
        return min(found, key=lambda each: each.remaining, default=None)

    def warnings(self, caller: Caller, model: str, currency: str) -> Sequence[Limit]:
        """Soft budgets of the caller's that are spent."""
        limits = self._applicable_to(caller, model, currency)
        spent = [b.limit for b in limits.budgets if not b.limit.hard and b.is_overspent]
        for limit in spent:
            self._metrics.decided(limit.metric, Decision.WARNED)
        return spent

    def left_here(self) -> Mapping[str, int]:
        """Of the limits that are counted in this process: what is left of each now, by name."""
        now = now_ns(self._clock)
        return {
            name: bucket.remaining(now)
            for name, bucket in self._buckets.items()
            if not isinstance(bucket, LeasedBucket)
        }

    def observe(self) -> None:
        """Publish how much of the budgets is left. Called now and then, not for each request."""
        self._metrics.budgets(
            (bucket.limit, bucket.remaining(0))
            for bucket in self._buckets.values()
            if isinstance(bucket, LeasedBucket)
        )

    def _rates(self, caller: Caller, model: str) -> list[tuple[RateBucket | LeasedBucket, Limit]]:
        limits = self._applicable_to(caller, model, "")
        return [
            (bucket, limit)
            for (bucket, _), limit in zip(limits.taken, limits.limits, strict=True)
            if limit.metric.is_rate and not isinstance(bucket, GaugeBucket)
        ]

    def _applicable_to(self, caller: Caller, model: str, currency: str) -> Applicable:
        key = (caller.tenant_id, caller.project_id, caller.key_id, model, currency)
        known = self._applicable.get(key)
        if known is None:
            known = self._applicable[key] = self._look_up(caller, model, currency)
            if len(self._applicable) > CALLERS_MAX:
                self._applicable.popitem(last=False)
        return known

    def _look_up(self, caller: Caller, model: str, currency: str) -> Applicable:
        mine = [
            limit
            for subject in subjects_of(caller)
            for scope in (model, None)
            for limit in self._limits.get((subject, scope), ())
        ]
        counted = [limit for limit in mine if not limit.metric.is_budget]
        budgets = [limit for limit in mine if limit.metric.is_budget]
        foreign = [limit for limit in budgets if limit.hard and limit.currency != currency]
        outputs = [x.burst_or_limit for x in counted if x.metric is Metric.OUTPUT_TOKENS]
        leased = [self._buckets[x.name] for x in budgets if x.currency == currency or x.hard]
        asks = bool(outputs or budgets)
        taken = [(self._buckets[limit.name], SLOTS[limit.metric].value) for limit in counted]
        return Applicable(
            taken=taken,
            limits=counted,
            outputs=[bucket for bucket, slot in taken if slot == Slot.OUTPUT],
            output_burst=min(outputs, default=0),
            budgets=[bucket for bucket in leased if isinstance(bucket, LeasedBucket)],
            foreign=foreign[0] if foreign else None,
            estimate=self._estimator.of(caller.tenant_id, model) if asks else None,
        )

    def _bucket(self, limit: Limit, now: int) -> Bucket:
        """The bucket of a limit; the one that is there goes on with the new numbers."""
        if limit.metric.is_budget or self._leases_all:
            assert self._leases is not None, "budgets are spent from leases"
            return self._leases.bucket(limit)
        known = self._buckets.get(limit.name)
        if isinstance(known, RateBucket):
            known.change(limit=limit.limit, burst=limit.burst_or_limit, now_ns=now)
            return known
        if isinstance(known, GaugeBucket):
            known.limit = limit.limit
            return known
        if limit.metric.is_rate:
            return RateBucket(limit=limit.limit, burst=limit.burst_or_limit, now_ns=now)
        return GaugeBucket(limit=limit.limit)

    def _refusal(self, short: Short) -> LimitExceeded:
        limit, bucket, want = short
        self._metrics.decided(limit.metric, Decision.REFUSED)
        if limit.metric.is_budget:
            return short_of_budget(limit, want.need)
        wait_ns = bucket.wait_ns(want.need, now_ns(self._clock))
        return refusal_of(limit, want.need, wait_ns=wait_ns)
