"""The jobs of one tier that wait, and whose turn it is: virtual token counters.

Each tenant has a counter of the service it has had, divided by its weight; the tenant with the
smallest is next (VTC, Sheng et al., arXiv 2401.00588, algorithm 2). A prompt token counts 1, a
token of an answer 2: it costs a step of its own. What is computed again after a preemption counts
nothing. A tenant that comes back after it had nothing to wait for is lifted to the smallest counter
of those who wait: idleness earns no credit.

The promise: of two tenants that both have work waiting, neither gets ahead of the other by more
than 2 * max(longest prompt, 2 * tokens of answers that run at once), in weighted tokens, over any
stretch of time (theorem 4.4 there).

Inside a tenant jobs go by arrival, but those whose first token is late follow those that can still
be in time, and get one turn in `LATE_TURN`.
"""

from bisect import insort
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterator
from typing import Generic, TypeVar

from headrace.serving.engine.job import Job

PROMPT_WEIGHT = 1
ANSWER_WEIGHT = 2
LATE_TURN = 8
"""Every so many admissions of a tenant, its longest-waiting late job is next."""
TENANTS_MAX = 4096
"""Counters kept of tenants with nothing waiting; the one that left longest ago is forgotten, and
is lifted like any newcomer when it returns. Eight frontends' worth of connections."""
RATE_MEMORY_MS = 10_000.0
"""How far back the rate of admission looks: long enough for several admissions of a busy tier,
short enough to follow a burst."""

JobT = TypeVar("JobT", bound=Job)


class _Tenant(Generic[JobT]):
    """One tenant's waiting jobs and its counter."""

    __slots__ = ("counter", "in_time", "late")

    def __init__(self, counter: float) -> None:
        self.counter = counter
        self.in_time: deque[JobT] = deque()
        self.late: deque[JobT] = deque()

    def __len__(self) -> int:
        return len(self.in_time) + len(self.late)

    def sort_out(self, is_late: "Callable[[JobT], bool]") -> int:
        """Set those apart that are late; the number of their tokens.

        A tenant's arrivals are due in their order, so it is the first ones that are late.
        """
        tokens = 0
        while self.in_time and is_late(self.in_time[0]):
            tokens += len(self.in_time[0].token_ids)
            self.late.append(self.in_time.popleft())
        return tokens


class TierQueue(Generic[JobT]):
    """Waiting jobs of one tier. Owned by the engine's thread."""

    def __init__(self) -> None:
        self._tenants: dict[int, _Tenant[JobT]] = {}
        """Those with jobs that wait."""
        self._idle: OrderedDict[int, float] = OrderedDict()
        """Counters of those without, by when they left."""
        self._begun: list[JobT] = []
        """Jobs that had begun and lost their blocks, by arrival: they have been paid for."""
        self._left_at = 0.0
        """Counter of the tenant that was last to leave."""
        self._turns = 0
        """Admissions since the start."""
        self._num_waiting = 0
        self.pending_tokens = 0
        """Tokens of all that wait."""
        self._late_tokens = 0
        self._admitted = 0
        self._watched_ms = 0.0
        self._had_waiting = False
        self.tokens_per_s = 0.0
        """Tokens admitted lately for each second in which something waited."""

    def __len__(self) -> int:
        return self._num_waiting

    def __iter__(self) -> Iterator[JobT]:
        yield from self._begun
        for tenant in self._tenants.values():
            yield from tenant.in_time
            yield from tenant.late

    @property
    def tokens_ahead(self) -> int:
        """Tokens of those that a newcomer waits for: late ones let it pass."""
        return self.pending_tokens - self._late_tokens

    def add(self, job: JobT) -> None:
        """Queue a newcomer, or one that lost its blocks."""
        self._num_waiting += 1
        self.pending_tokens += len(job.token_ids)
        if job.has_begun:
            insort(self._begun, job, key=_arrival)
            return
        name = job.promise.tenant
        tenant = self._tenants.get(name)
        if tenant is None:
            tenant = self._tenants[name] = _Tenant(self._lifted(name))
        insort(tenant.in_time, job, key=_arrival)

    def remove(self, job: JobT) -> None:
        """Take `job` out, because it is admitted or has ended."""
        self._num_waiting -= 1
        self.pending_tokens -= len(job.token_ids)
        if job.has_begun:
            self._begun.remove(job)
            return
        name = job.promise.tenant
        tenant = self._tenants[name]
        if job in tenant.in_time:
            tenant.in_time.remove(job)
        else:
            tenant.late.remove(job)
            self._late_tokens -= len(job.token_ids)
        if not tenant:
            del self._tenants[name]
            self._left_at = tenant.counter
            self._remember(name, tenant.counter)

    def first(
        self, *, is_late: Callable[[JobT], bool], is_held: Callable[[JobT], bool]
    ) -> tuple[JobT, bool] | None:
        """Whose turn it is, leaving out those that are held.

        Returns the job, and whether it is late and has its turn all the same.
        """
        for job in self._begun:
            if not is_held(job):
                return job, False
        tenants = self._tenants.values()
        if len(tenants) > 1:
            tenants = sorted(tenants, key=_counter)
        has_turn = self._turns % LATE_TURN == LATE_TURN - 1
        late: JobT | None = None
        for tenant in tenants:
            self._late_tokens += tenant.sort_out(is_late)
            if late is None:
                late = next((job for job in tenant.late if not is_held(job)), None)
                if late is not None and has_turn:
                    return late, True
            for job in tenant.in_time:
                if not is_held(job):
                    return job, False
        return None if late is None else (late, False)

    def admitted(self, job: JobT, *, tokens: int) -> None:
        """Charge `job`, which `remove` follows, for the prompt tokens that it computes first."""
        self._admitted += len(job.token_ids)
        if not job.has_begun:
            tenant = self._tenants[job.promise.tenant]
            self._turns += 1
            tenant.counter += PROMPT_WEIGHT * tokens / job.promise.weight

    def answered(self, job: JobT) -> None:
        """Charge a running job for one token of its answer."""
        name = job.promise.tenant
        cost = ANSWER_WEIGHT / job.promise.weight
        tenant = self._tenants.get(name)
        if tenant is not None:
            tenant.counter += cost
        elif name in self._idle:
            self._idle[name] += cost

    def watch(self, elapsed_ms: float) -> None:
        """Take note of how fast the tier is admitted; call once a step."""
        if self._had_waiting and elapsed_ms > 0:
            rate = 1000 * self._admitted / elapsed_ms
            # The first seconds are a plain mean: there is nothing to remember yet.
            self._watched_ms = min(self._watched_ms + elapsed_ms, RATE_MEMORY_MS)
            share = min(1.0, elapsed_ms / self._watched_ms)
            self.tokens_per_s += (rate - self.tokens_per_s) * share
        self._had_waiting = bool(self._num_waiting)
        self._admitted = 0

    @property
    def backlogged(self) -> Collection[int]:
        """Tenants with work that waits and can still be in time."""
        return [name for name, tenant in self._tenants.items() if tenant.in_time]

    def counter(self, tenant: int) -> float:
        """Service that a tenant has had, in weighted tokens; for tests and figures."""
        known = self._tenants.get(tenant)
        return known.counter if known is not None else self._idle.get(tenant, 0.0)

    def _lifted(self, name: int) -> float:
        """Where a tenant begins that had nothing waiting."""
        floor = min((each.counter for each in self._tenants.values()), default=self._left_at)
        return max(self._idle.pop(name, 0.0), floor)

    def _remember(self, name: int, counter: float) -> None:
        self._idle[name] = counter
        if len(self._idle) > TENANTS_MAX:
            self._idle.popitem(last=False)


def _arrival(job: Job) -> int:
    return job.arrival


def _counter(tenant: _Tenant[JobT]) -> float:
    return tenant.counter
