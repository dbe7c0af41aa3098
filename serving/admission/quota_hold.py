"""What one request holds of its caller's limits, from admission to settlement.

    reserve    exact input, expected output, one place, money for both
    cover      before each chunk is delivered: is it paid for? else hold 64 tokens more
    settle     what was not used goes back; what was delivered is spent, to the femto

A hard budget covers a chunk or the chunk is not delivered, so there is nothing to overshoot with.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from headrace.serving.admission.gcra import GaugeBucket, RateBucket
from headrace.serving.admission.lease_bucket import LeasedBucket, Want
from headrace.serving.admission.lease_keeper import LeaseKeeper, now_ns
from headrace.serving.admission.quota_estimate import Percentile95
from headrace.serving.clock import Clock
from headrace.serving.domain.generate import Generate
from headrace.serving.domain.limit import Limit, Metric
from headrace.serving.domain.usage import Outcome, Usage
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


class HeldMoney:
    """Money of one budget. More than one part when it was topped up."""

    __slots__ = ("bucket", "parts", "total")

    def __init__(self, bucket: LeasedBucket, femto: int, now_ns: int) -> None:
        """Holds `femto`; of a hard budget that has less at hand, what it has."""
        self.bucket = bucket
        part = bucket.charge_up_to(femto, now_ns) if bucket.hard else (bucket.charge(femto), femto)
        self.parts = [part]
        self.total = part[1]

    def add(self, femto: int) -> None:
        self.parts.append((self.bucket.charge(femto), femto))
        self.total += femto

    def settle(self, femto: int) -> None:
        """`femto` of it was charged, the rest is free. A soft budget may be charged more."""
        for account, held in self.parts[:-1]:
            account.settle(held, min(held, femto))
            femto -= min(held, femto)
        account, held = self.parts[-1]
        assert femto <= held or not self.bucket.hard, "a hard budget was overspent"
        account.settle(held, femto)


@dataclass(frozen=True, slots=True, kw_only=True)
class Applicable:
    """The limits that apply to one caller's requests for one model, looked up once."""

    taken: Sequence[tuple[Bucket, int]]
    """Rates and numbers in use, and which amount of a request counts for each."""
    limits: Sequence[Limit]
    """Of each of `taken`."""
    outputs: Sequence[Bucket]
    """Those of `taken` that count output tokens."""
    output_burst: int
    """Most output tokens that can be reserved at once."""
    budgets: Sequence[LeasedBucket]
    foreign: Limit | None
    """A hard budget in another currency than the price: nothing can be compared."""
    estimate: Percentile95 | None
    """How long the answers are; None when no limit asks."""


class Hold:
    """One request's. Owned by the task that runs it; settled or released once, the first wins."""

    __slots__ = (
        "_amounts",
        "_clock",
        "_is_open",
        "_leases",
        "_limits",
        "_money",
        "_request",
        "_sure_tokens",
        "_token_femto",
        "short_of",
    )

    def __init__(
        self,
        request: Generate,
        limits: Applicable,
        amounts: list[int],
        money: Sequence[HeldMoney],
        leases: LeaseKeeper | None,
        clock: Clock,
        *,
        prompt_femto: int,
        token_femto: int,
    ) -> None:
        """Takes over what was taken.

        Args:
            request: whose.
            limits: what was taken from.
            amounts: how much of each, by slot.
            money: of each budget.
            leases: where more money comes from; needed when there is money.
            clock: of the buckets.
            prompt_femto: the most that the prompt can cost.
            token_femto: the most that a token of an answer can cost.
        """
        self._request = request
        self._limits = limits
        self._amounts = amounts
        self._money = money
        self._leases = leases
        self._clock = clock
        self._token_femto = token_femto
        self._is_open = True
        self.short_of: LeasedBucket | None = None
        """The budget that did not cover a chunk, if one did not."""
        self._sure_tokens = self._sure(0, prompt_femto)

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
            missing = self._request.price.charge_femto(usage) - self._held_of(bucket)
            try:
                want = Want(missing, missing + TOPUP_TOKENS * self._token_femto)
                came = await self._leases.acquire(bucket, want)
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
        if self._limits.estimate is not None and outcome is Outcome.OK:
            self._limits.estimate.add(-(-usage.completion_tokens // self._request.n))
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
        for bucket, slot in self._limits.taken:
            if amounts[slot]:
                bucket.give_back(amounts[slot], now)

    def _stretch(self, usage: Usage) -> bool:
        """Hold what `usage` costs and 64 tokens more, of all budgets or of none."""
        charge = self._request.price.charge_femto(usage) if self._money else 0
        now = now_ns(self._clock)
        for money in self._money:
            missing = charge - money.total
            if missing > 0 and money.bucket.hard and not money.bucket.fits(missing, now):
                self.short_of = money.bucket
                return False
        for money in self._money:
            self._top_up(money, charge, now)
        if self._limits.outputs and usage.completion_tokens > self._amounts[Slot.OUTPUT]:
            missing = usage.completion_tokens - self._amounts[Slot.OUTPUT]
            more = -(-missing // TOPUP_TOKENS) * TOPUP_TOKENS
            for bucket in self._limits.outputs:
                bucket.charge(more)
            self._amounts[Slot.OUTPUT] += more
        self._sure_tokens = self._sure(usage.completion_tokens, charge)
        return True

    def _top_up(self, money: HeldMoney, charge: int, now: int) -> None:
        missing = charge - money.total
        if missing <= 0:
            return
        more = missing + TOPUP_TOKENS * self._token_femto
        if money.bucket.hard and not money.bucket.fits(more, now):
            more = missing
        money.add(more)

    def _sure(self, tokens: int, charge: int) -> int:
        """Up to how many tokens all is covered, whatever they are, if `tokens` cost `charge`."""
        sure = self._amounts[Slot.OUTPUT] if self._limits.outputs else EVERYTHING
        if token_femto := self._token_femto:
            for money in self._money:
                sure = min(sure, tokens + (money.total - charge) // token_femto)
        return sure

    def _held_of(self, bucket: LeasedBucket) -> int:
        return next(money.total for money in self._money if money.bucket is bucket)
