"""What one request holds of its caller's limits, from admission to settlement.

    reserve    exact input, expected output, one place, money for both
    cover      before each chunk is delivered: is it paid for? else hold 64 tokens more
    settle     what was not used goes back; what was delivered is spent, to the femto

A hard budget covers a chunk or the chunk is not delivered, so there is nothing to overshoot with.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from headrace.serving.admission.gcra import GaugeBucket, RateBucket
from headrace.serving.admission.lease_bucket import Account, LeasedBucket
from headrace.serving.admission.lease_keeper import LeaseKeeper, now_ns
from headrace.serving.admission.quota_estimate import Percentile95
from headrace.serving.clock import Clock
from headrace.serving.domain import units
from headrace.serving.domain.generate import Generate
from headrace.serving.domain.limit import Metric
from headrace.serving.domain.usage import Outcome, Price, Usage
from headrace.serving.errors import QuotaUnavailable

TOPUP_TOKENS = 64
"""Held more at a time while an answer grows: a checkpoint's worth."""
ROUNDS_MAX = 16
"""How often one request asks the authority for the same thing: others may take what comes."""
_OURS = (Outcome.FAILED, Outcome.REJECTED)
"""What was not the caller's doing: without an answer it counts as nothing."""
EVERYTHING = 1 << 62
"""More tokens than any answer has."""

Bucket = RateBucket | GaugeBucket | LeasedBucket


class Slot(IntEnum):
    """Where a request's amounts stand, by what is limited. Money is held apart."""

    REQUESTS = 0
    INPUT = 1
    OUTPUT = 2
    CONCURRENCY = 3
    KV = 4


SLOTS = {
    Metric.REQUESTS: Slot.REQUESTS,
    Metric.INPUT_TOKENS: Slot.INPUT,
    Metric.OUTPUT_TOKENS: Slot.OUTPUT,
    Metric.CONCURRENCY: Slot.CONCURRENCY,
    Metric.KV_TOKENS: Slot.KV,
}


@dataclass(frozen=True, slots=True)
class Worst:
    """The most that tokens can cost by one price, in femto-currency."""

    prompt_femto: int
    """The whole prompt, none of it cached."""
    token_femto: int
    """One token of an answer."""


def worst_of(price: Price, prompt_tokens: int) -> Worst:
    rates = price.rates
    each = max(rates.get(unit, 0) for unit in (units.PROMPT, units.CACHE_READ, units.CACHE_WRITE))
    token = max(rates.get(unit, 0) for unit in (units.COMPLETION, units.REASONING))
    return Worst(prompt_tokens * each, token)


@dataclass(slots=True, eq=False)
class HeldMoney:
    """Money of one budget. More than one part when it was topped up."""

    bucket: LeasedBucket
    parts: list[tuple[Account, int]] = field(default_factory=list[tuple[Account, int]])
    total: int = 0

    def add(self, femto: int) -> None:
        self.parts.append((self.bucket.charge(femto), femto))
        self.total += femto

    def settle(self, femto: int) -> None:
        """`femto` of it was charged, the rest is free. A soft budget may be charged more."""
        for account, held in self.parts[:-1]:
            account.settle(held, min(held, femto))
            femto -= min(held, femto)
        account, held = self.parts[-1]
        assert femto <= held or not self.bucket.limit.hard, "a hard budget was overspent"
        account.settle(held, femto)


class Hold:
    """One request's. Owned by the task that runs it; settled or released once, the first wins."""

    __slots__ = (
        "_amounts",
        "_clock",
        "_estimate",
        "_is_open",
        "_leases",
        "_money",
        "_outputs",
        "_price",
        "_sure_tokens",
        "_taken",
        "_worst",
        "num_choices",
        "short_of",
    )

    def __init__(
        self,
        request: Generate,
        *,
        taken: Sequence[tuple[Bucket, Slot]],
        amounts: list[int],
        money: Sequence[HeldMoney],
        worst: Worst | None,
        estimate: Percentile95 | None,
        leases: LeaseKeeper | None,
        clock: Clock,
    ) -> None:
        """Takes over what was taken.

        Args:
            request: whose.
            taken: rates and numbers in use, and which amount was taken of each.
            amounts: by slot.
            money: of each budget.
            worst: what the request's tokens can cost; needed when there is money.
            estimate: learns how long the answers were; None when nobody wants to know.
            leases: where more money comes from; needed when there is money.
            clock: of the buckets.
        """
        self._price = request.price
        self.num_choices = request.n
        self._taken = taken
        self._amounts = amounts
        self._money = money
        self._worst = worst
        self._estimate = estimate
        self._leases = leases
        self._clock = clock
        self._is_open = True
        self.short_of: LeasedBucket | None = None
        """The budget that did not cover a chunk, if one did not."""
        self._outputs = [bucket for bucket, slot in taken if slot is Slot.OUTPUT]
        self._sure_tokens = self._sure(tokens=0, charge=worst.prompt_femto if worst else 0)

    def covers(self, usage: Usage) -> bool:
        """Whether the caller may have a chunk after which `usage` is what it used.

        Holds more where that is needed and there. Most calls compare two numbers.
        """
        return usage.completion_tokens <= self._sure_tokens or self._stretch(usage)

    async def extend(self, usage: Usage) -> bool:
        """Like `covers`, after asking for money that other frontends might have left."""
        for _ in range(ROUNDS_MAX):
            bucket = self.short_of
            if bucket is None or self._leases is None:
                break
            missing = self._price.charge_femto(usage) - self._held_of(bucket)
            try:
                came = await self._leases.acquire([(bucket, missing)])
            except QuotaUnavailable:
                # What is not covered is not delivered, whatever the reason.
                return False
            self.short_of = None
            if self.covers(usage):
                return True
            if not came and self.short_of is bucket:
                return False
        return False

    def settle(self, *, usage: Usage, outcome: Outcome, charge_femto: int) -> None:
        """It ended: `usage` was delivered, `charge_femto` charged. Idempotent."""
        if outcome in _OURS and not usage.completion_tokens:
            self.release()
        if not self._is_open:
            return
        self._is_open = False
        for money in self._money:
            money.settle(charge_femto)
        if self._estimate is not None and outcome is Outcome.OK:
            self._estimate.add(-(-usage.completion_tokens // self.num_choices))
        # A caller who leaves before the first token has had the prompt computed all the same: a
        # rate counts it, although nothing is charged.
        self._give_back(
            [
                0,
                usage.cached_tokens,
                self._amounts[Slot.OUTPUT] - usage.completion_tokens,
                self._amounts[Slot.CONCURRENCY],
                self._amounts[Slot.KV],
            ]
        )

    def release(self) -> None:
        """It never ran: everything goes back. Idempotent."""
        if self._is_open:
            self._is_open = False
            for money in self._money:
                money.settle(0)
            self._give_back(self._amounts)

    def _give_back(self, amounts: Sequence[int]) -> None:
        now = now_ns(self._clock)
        for bucket, slot in self._taken:
            if amounts[slot]:
                bucket.give_back(amounts[slot], now)

    def _stretch(self, usage: Usage) -> bool:
        """Hold what `usage` costs and 64 tokens more, of all budgets or of none."""
        charge = self._price.charge_femto(usage) if self._money else 0
        now = now_ns(self._clock)
        for money in self._money:
            missing = charge - money.total
            if missing > 0 and money.bucket.limit.hard and not money.bucket.fits(missing, now):
                self.short_of = money.bucket
                return False
        for money in self._money:
            self._top_up(money, charge, now)
        if self._outputs and usage.completion_tokens > self._amounts[Slot.OUTPUT]:
            missing = usage.completion_tokens - self._amounts[Slot.OUTPUT]
            more = -(-missing // TOPUP_TOKENS) * TOPUP_TOKENS
            for bucket in self._outputs:
                bucket.charge(more)
            self._amounts[Slot.OUTPUT] += more
        self._sure_tokens = self._sure(tokens=usage.completion_tokens, charge=charge)
        return True

    def _top_up(self, money: HeldMoney, charge: int, now: int) -> None:
        missing = charge - money.total
        if missing <= 0:
            return
        assert self._worst is not None
        more = missing + TOPUP_TOKENS * self._worst.token_femto
        if money.bucket.limit.hard and not money.bucket.fits(more, now):
            more = missing
        money.add(more)

    def _sure(self, *, tokens: int, charge: int) -> int:
        """Up to how many tokens everything is covered, whatever they are, after `tokens`."""
        sure = self._amounts[Slot.OUTPUT] if self._outputs else EVERYTHING
        token_femto = self._worst.token_femto if self._worst else 0
        for money in self._money:
            if token_femto:
                sure = min(sure, tokens + (money.total - charge) // token_femto)
        return sure

    def _held_of(self, bucket: LeasedBucket) -> int:
        return next(money.total for money in self._money if money.bucket is bucket)
