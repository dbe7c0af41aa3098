"""What a frontend has leased of one limit, and what it spends of it, without asking anybody."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from headrace.serving.admission.gcra import MINUTE_NS
from headrace.serving.admission.lease import LEASE_MS, Claim, Grant
from headrace.serving.domain.limit import Limit, Metric

SLICE_S = 3
"""Traffic that a slice should last for: between two and five seconds are lost when a frontend
dies, or can be served while the authority is away."""
TICK_NS = 1_000_000_000
"""How often spending is reported and the rate of it measured."""
RENEW_NS = LEASE_MS * 1_000_000 // 2
"""A lease is renewed when half of its time is over, or half of its slice is spent."""


class Want(NamedTuple):
    """What one request waits for."""

    need: int
    """Less does not help."""
    desired: int
    """What it will likely use."""


@dataclass(slots=True, eq=False)
class Account:
    """A lease, as its holder sees it. Totals since it was opened."""

    lease_id: str = ""
    """Empty until the authority has named it."""
    granted: int = 0
    returned: int = 0
    used: int = 0
    """Spent, and held by what runs."""
    spent: int = 0
    expires_ns: int = 0
    reported: int = 0
    """The part of `spent` that the authority was told of."""

    @property
    def free(self) -> int:
        """Leased and not used; negative after a forced charge."""
        return self.granted - self.returned - self.used

    def settle(self, held: int, spent: int) -> None:
        """What was held for a piece of work is over: `spent` of it is gone, the rest is free."""
        self.used -= held - spent
        self.spent += spent


class LeasedBucket:
    """One limit, in one frontend, spent from leases. Belongs to one event loop.

    The same for all metrics: a rate's tokens, places for requests, money. What differs is known to
    the authority.
    """

    __slots__ = (
        "_asked_ns",
        "_low",
        "_missing",
        "_on_low",
        "_per_s",
        "_taken",
        "_ticked_ns",
        "account",
        "hard",
        "left",
        "limit",
        "old",
        "wait_ms",
        "waiting",
    )

    def __init__(
        self, limit: Limit, *, now_ns: int, on_low: Callable[["LeasedBucket"], None]
    ) -> None:
        """`on_low` is called when it is time to ask for more, maybe often."""
        self.change(limit)
        self._on_low = on_low
        self._low = 0
        """Half a slice."""
        self.account = Account()
        self.old: list[Account] = []
        """Of periods that are over; kept until what they hold is settled and reported."""
        self.left = 0
        """What the authority could grant when it was last heard."""
        self.wait_ms: int | None = None
        self.waiting: list[Want] = []
        """What requests wait for."""
        self._missing = 0
        self._taken = 0
        self._per_s = 0
        self._ticked_ns = now_ns
        self._asked_ns = now_ns

    def change(self, limit: Limit) -> None:
        """From now on this is the limit; what is leased of it stays."""
        self.limit = limit
        self.hard = limit.hard

    @property
    def is_overspent(self) -> bool:
        """Of a budget: nothing is left here or elsewhere."""
        return self.left <= 0 and self.account.free <= 0 and bool(self.account.lease_id)

    def fits(self, num: int, now_ns: int) -> bool:
        account = self.account
        free = account.granted - account.returned - account.used
        return num <= free and now_ns < account.expires_ns

    def charge(self, num: int) -> Account:
        """Use `num`, whether it is leased or not. Returns: where money is to be settled."""
        account = self.account
        used = account.used = account.used + num
        self._taken += num
        if account.granted - account.returned - used < self._low:
            self._on_low(self)
        return account

    def give_back(self, num: int, now_ns: int) -> None:
        """Of a rate, or of a number in use."""
        self.account.used -= num

    def room(self, now_ns: int) -> int:
        """How much of the lease can be used now."""
        account = self.account
        if now_ns >= account.expires_ns:
            return 0
        return max(0, account.granted - account.returned - account.used)

    def charge_up_to(self, num: int, now_ns: int) -> tuple[Account, int]:
        """Use `num`, or what there is of it; more is asked for meanwhile. See `charge`."""
        room = self.room(now_ns)
        if room >= num:
            return self.charge(num), num
        self._missing = max(self._missing, num - room)
        self._on_low(self)
        return self.charge(room), room

    def remaining(self, now_ns: int) -> int:
        """An estimate over all frontends: what is free here and what the authority had left."""
        return self.account.free + self.left

    def wait_ns(self, num: int, now_ns: int) -> int | None:
        """As `RateBucket` and `GaugeBucket` answer; of a rate, as the authority has said."""
        if num > self.limit.burst_or_limit:
            return None
        return (self.wait_ms or 0) * 1_000_000

    def reset_ns(self, now_ns: int) -> int:
        missing = self.limit.burst_or_limit - self.remaining(now_ns)
        return max(0, -(-missing * MINUTE_NS // self.limit.limit))

    def claims(self, now_ns: int) -> list[Claim]:
        """What to tell and ask the authority now; empty when there is nothing worth a message."""
        self._tick(now_ns)
        claims = [self._drained(account) for account in self.old if account.used == account.spent]
        account, target = self.account, self._target()
        returns = account.free > 2 * target and not self.waiting
        if returns:
            account.returned += account.free - target
        spent = self._spent(account)
        holds = account.free > 0 or account.used != spent
        missing, self._missing = self._missing, 0
        if (
            self.waiting
            or missing
            or returns
            or account.free < min(target // 2, 1)
            or account.spent != account.reported
            or (holds and now_ns - self._asked_ns >= RENEW_NS)
        ):
            self._asked_ns = now_ns
            claims.append(
                Claim(
                    limit_name=self.limit.name,
                    lease_id=account.lease_id,
                    returned=account.returned,
                    spent=spent,
                    need=max(0, min(w.need for w in self.waiting) - account.free)
                    if self.waiting
                    else 0,
                    desired=max(
                        0, target + missing + sum(w.desired for w in self.waiting) - account.free
                    ),
                )
            )
        return claims

    def apply(self, claim: Claim, grant: Grant, *, sent_ns: int) -> None:
        """Take note of the answer to `claim`, which was sent at `sent_ns`."""
        if grant.is_closed:
            self.old = [account for account in self.old if account.lease_id != grant.lease_id]
            if grant.lease_id == self.account.lease_id:
                self.account = Account()
            return
        if not grant.lease_id:
            self.left, self.wait_ms = grant.left, grant.wait_ms
            return
        account = self._account_of(grant.lease_id)
        account.granted = max(account.granted, grant.granted)
        account.expires_ns = max(account.expires_ns, sent_ns + grant.expires_in_ms * 1_000_000)
        if claim.lease_id in ("", account.lease_id):
            account.reported = max(account.reported, claim.spent)
        self.left, self.wait_ms = grant.left, grant.wait_ms

    def knows(self, lease_id: str) -> bool:
        return any(lease_id == account.lease_id for account in (self.account, *self.old))

    def closing(self) -> list[Claim]:
        """The last words of a frontend that stops: everything that is not spent goes back."""
        accounts = [*self.old, self.account]
        return [self._drained(account) for account in accounts if account.lease_id]

    def _account_of(self, lease_id: str) -> Account:
        """The account of that name. An unknown name is a new period's lease, or the first one."""
        for account in (self.account, *self.old):
            if account.lease_id == lease_id:
                return account
        if self.account.lease_id:
            self.old.append(self.account)
            self.account = Account()
        self.account.lease_id = lease_id
        return self.account

    def _target(self) -> int:
        """How much should be free here: a slice of a rate or budget, a quarter more of a gauge."""
        if self.limit.metric in (Metric.CONCURRENCY, Metric.KV_TOKENS):
            return self.account.used // 4
        return self._per_s * SLICE_S

    def _spent(self, account: Account) -> int:
        if self.limit.metric.is_budget:
            return account.spent
        return account.used if self.limit.metric.is_rate else 0

    def _drained(self, account: Account) -> Claim:
        spent = self._spent(account)
        return Claim(
            limit_name=self.limit.name,
            lease_id=account.lease_id,
            returned=max(0, account.granted - spent),
            spent=spent,
            closes=True,
        )

    def _tick(self, now_ns: int) -> None:
        """Once a second: what was taken in it, smoothed over about four."""
        seconds = (now_ns - self._ticked_ns) // TICK_NS
        if seconds > 0:
            self._ticked_ns = now_ns
            self._per_s = (3 * self._per_s + self._taken // seconds) // 4
            self._low = self._per_s * SLICE_S // 2
            self._taken = 0
