"""Keeps a frontend supplied with leases: asks ahead of need, reports, and returns.

`LeaseHolder` is what is said and heard, as a state machine without time or network; `LeaseKeeper`
drives it on an event loop. One message is under way at a time.
"""

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence

from headrace.serving import log
from headrace.serving.admission.lease import Ask, Authority, Claim, Grant
from headrace.serving.admission.lease_bucket import TICK_NS, LeasedBucket, Want
from headrace.serving.clock import Clock
from headrace.serving.domain.limit import Limit
from headrace.serving.errors import QuotaUnavailable, ServingError

REPORT_S = 1.0
"""How often spending is reported: what a budget's view lags behind."""
CALL_S = 2.0
"""Longest that a request waits for an authority; beyond it, it counts as away."""
CLAIMS_PER_ASK = 1_000
"""Half a megabyte; what is more goes into the next message."""
RETRY_S = 0.5
"""Pause before an authority that is away is asked again."""


class LeaseHolder:
    """All leases of one life of a frontend."""

    def __init__(
        self, *, holder: str, epoch: str, on_low: Callable[[], None] = lambda: None
    ) -> None:
        """`on_low` is called when a message should be sent soon."""
        self._on_low = on_low
        self.holder = holder
        self.epoch = epoch
        self.buckets: dict[str, LeasedBucket] = {}
        """One that was ever leased stays: who forgot what it has spent would spend it again."""
        self._urgent: dict[LeasedBucket, None] = {}
        self._looked_ns = 0
        self._seq = 0

    def bucket(self, limit: Limit, *, now_ns: int) -> LeasedBucket:
        """What is leased of `limit`; of a limit that changed, what was leased before stays."""
        known = self.buckets.get(limit.name)
        if known is None:
            known = LeasedBucket(limit, now_ns=now_ns, on_low=self.hurry)
            self.buckets[limit.name] = known
        known.change(limit)
        return known

    def hurry(self, bucket: LeasedBucket) -> None:
        """Of this one, something is to be said soon."""
        self._urgent[bucket] = None
        self._on_low()

    def ask(self, now_ns: int) -> Ask | None:
        """The next message; None when there is nothing to say.

        What is urgent, and once a second what all others have to report.
        """
        if now_ns - self._looked_ns >= TICK_NS:
            self._looked_ns = now_ns
            self._urgent |= dict.fromkeys(self.buckets.values())
        claims: list[Claim] = []
        while self._urgent and len(claims) < CLAIMS_PER_ASK:
            bucket = next(iter(self._urgent))
            del self._urgent[bucket]
            claims += bucket.claims(now_ns)
        if self._urgent:
            self._on_low()
        return self._message(claims)

    def last_ask(self) -> Ask | None:
        """The message of a frontend that stops; nothing is spent after it."""
        return self._message([c for b in self.buckets.values() for c in b.closing()])

    def apply(self, ask: Ask, grants: Sequence[Grant], *, sent_ns: int) -> None:
        """Take note of the answer to `ask`. Harmless when repeated or out of order."""
        claims = {(claim.limit_name, claim.lease_id): claim for claim in ask.claims}
        for grant in grants:
            bucket = self.buckets.get(grant.limit_name)
            if bucket is None:
                continue
            # A lease that we do not know is one that we closed, unless we have just asked for it.
            if ask.seq != self._seq and not bucket.knows(grant.lease_id):
                continue
            bucket.apply(_claim_of(claims, grant), grant, sent_ns=sent_ns)

    def _message(self, claims: list[Claim]) -> Ask | None:
        if not claims:
            return None
        self._seq += 1
        return Ask(holder=self.holder, epoch=self.epoch, seq=self._seq, claims=tuple(claims))


class LeaseKeeper:
    """Belongs to one event loop. `start`, and `close` when nothing runs any more."""

    def __init__(
        self,
        authority: Authority,
        *,
        holder: str,
        epoch: str,
        clock: Clock,
        on_grants: Callable[[], None] = lambda: None,
    ) -> None:
        """`on_grants` is called after every answer."""
        self._authority = authority
        self._clock = clock
        self._on_grants = on_grants
        self._wakes = asyncio.Event()
        self._holder = LeaseHolder(holder=holder, epoch=epoch, on_low=self._wakes.set)
        self._next_round: list[asyncio.Future[bool]] = []
        self._task: asyncio.Task[None] | None = None
        self._is_reached = True

    @property
    def buckets(self) -> Mapping[str, LeasedBucket]:
        return self._holder.buckets

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run(), name="lease keeper")

    async def close(self) -> None:
        """Give back what is not spent. An authority that is away learns it from a successor."""
        if self._task is None:
            return
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._task = None
        if (ask := self._holder.last_ask()) is not None:
            await self._say(ask)
        self._answer(self._next_round, is_reached=False)

    def bucket(self, limit: Limit) -> LeasedBucket:
        return self._holder.bucket(limit, now_ns=now_ns(self._clock))

    async def acquire(self, bucket: LeasedBucket, want: Want) -> bool:
        """Ask for more and wait for the answer; what came is for whoever takes it first.

        Returns: whether anything came that makes another look worth while.

        Raises:
            QuotaUnavailable: the authority does not answer.
        """
        before = self._supply(bucket)
        bucket.waiting.append(want)
        self._holder.hurry(bucket)
        answered: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._next_round.append(answered)
        try:
            is_reached = await answered
        finally:
            bucket.waiting.remove(want)
        if not is_reached:
            raise unavailable("it did not answer")
        return before != self._supply(bucket)

    async def _run(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REPORT_S):
                    await self._wakes.wait()
            self._wakes.clear()
            waiting, self._next_round = self._next_round, []
            is_reached = False
            try:
                ask = self._holder.ask(now_ns(self._clock))
                is_reached = ask is None or await self._say(ask)
            except Exception as error:  # The task's root: a defect must not end the rounds.
                log.crashed(during="keeping leases", error=error)
            finally:
                self._answer(waiting, is_reached=is_reached)
            if not is_reached:
                await asyncio.sleep(RETRY_S)

    async def _say(self, ask: Ask) -> bool:
        """Whether the authority answered."""
        sent_ns = now_ns(self._clock)
        try:
            async with asyncio.timeout(CALL_S):
                grants = await self._authority.lease(ask)
        except TimeoutError:
            self._note_away(unavailable(f"silent for {CALL_S:.0f} s"))
            return False
        except ServingError as error:
            self._note_away(error)
            return False
        self._is_reached = True
        self._holder.apply(ask, grants, sent_ns=sent_ns)
        self._on_grants()
        return True

    def _note_away(self, error: ServingError) -> None:
        """Once, not with every try."""
        if self._is_reached:
            log.refused(error, during="leasing")
        self._is_reached = False

    def _supply(self, bucket: LeasedBucket) -> tuple[str, int, bool]:
        account = bucket.account
        return account.lease_id, account.granted, now_ns(self._clock) < account.expires_ns

    def _answer(self, waiting: Sequence["asyncio.Future[bool]"], *, is_reached: bool) -> None:
        for answered in waiting:
            if not answered.done():
                answered.set_result(is_reached)


def now_ns(clock: Clock) -> int:
    """Whole nanoseconds of the monotonic clock. Exact for 100 days of uptime."""
    return int(clock.monotonic_ms() * 1_000_000)


def unavailable(why: str) -> QuotaUnavailable:
    return QuotaUnavailable(
        f"The quota authority cannot be asked: {why}.",
        why="A limit that is shared between frontends is spent from slices that it grants, and "
        "this frontend's slice is used up.",
        fix="Retry with jitter. Operator: check `quota.authority`, and the disk under its home.",
        retry_after_ms=1000,
    )


def _claim_of(claims: Mapping[tuple[str, str], Claim], grant: Grant) -> Claim:
    """The claim that a grant answers: of the same lease, else the one that asked for a lease."""
    known = claims.get((grant.limit_name, grant.lease_id))
    if known is not None:
        return known
    return next(
        (claim for claim in claims.values() if claim.limit_name == grant.limit_name),
        Claim(limit_name=grant.limit_name),
    )
