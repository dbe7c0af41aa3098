"""Whose turn it is inside a tier, for any arrivals: the bound of virtual token counters."""

import random
from itertools import count

import pytest

from headrace.serving.domain.tier import Promise
from headrace.serving.engine import tier_queue
from headrace.serving.engine.job import Job
from headrace.serving.engine.prefix_cache import PrefixChain
from headrace.serving.engine.tier_queue import TierQueue

PROMPT_MAX = 50
ANSWER_MAX = 20
ROWS = 4


class Tier:
    """A queue, and an engine that computes a prompt at once and an answer token by token."""

    def __init__(self, seed: int, tenants: int) -> None:
        self.rng = random.Random(seed)
        self.queue: TierQueue[Job] = TierQueue()
        self.weights = {tenant: self.rng.randint(1, 4) for tenant in range(tenants)}
        self.service = dict.fromkeys(self.weights, 0.0)
        self.running: dict[Job, int] = {}
        self.arrivals = count(1)

    def arrive(self, tenant: int) -> None:
        promise = Promise(tenant=tenant, weight=self.weights[tenant])
        prompt = [1] * self.rng.randint(1, PROMPT_MAX)
        job = Job(next(self.arrivals), prompt, PrefixChain(b"", 16), promise=promise)
        job.arrival = job.key  # pyright: ignore[reportAttributeAccessIssue]
        self.queue.add(job)

    def step(self) -> None:
        while len(self.running) < ROWS and (found := self.first()):
            job, _ = found
            self.queue.admitted(job, tokens=len(job.token_ids))
            self.queue.remove(job)
            self.serve(job, len(job.token_ids))
            job.has_begun = True
            self.running[job] = self.rng.randint(1, ANSWER_MAX)
        for job in list(self.running):
            self.queue.answered(job)
            self.serve(job, 2)
            self.running[job] -= 1
            if not self.running[job]:
                del self.running[job]

    def first(self) -> tuple[Job, bool] | None:
        return self.queue.first(is_late=lambda _: False, is_held=lambda _: False)

    def serve(self, job: Job, tokens: int) -> None:
        self.service[job.promise.tenant] += tokens / job.promise.weight


@pytest.mark.parametrize("seed", range(20))
def test_no_backlogged_tenant_gets_further_ahead_than_the_bound(seed: int) -> None:
    """Over any stretch in which both have work waiting, whatever the others do meanwhile."""
    tier = Tier(seed, tenants=4)
    bound = 2 * max(PROMPT_MAX, 2 * ROWS * ANSWER_MAX)
    ranges: dict[tuple[int, int], tuple[float, float]] = {}
    for step in range(2_000):
        for tenant in tier.weights:
            # Each has its own times of activity; two are always backlogged.
            is_active = tenant < 2 or (step // (100 * tenant)) % 2
            if is_active and len(tier.queue) < 40 and tier.rng.random() < 0.3:
                tier.arrive(tenant)
        tier.step()
        waiting = sorted(tier.queue.backlogged)
        pairs = {(a, b) for a in waiting for b in waiting if a < b}
        for pair in pairs:
            lead = tier.service[pair[0]] - tier.service[pair[1]]
            low, high = ranges.get(pair, (lead, lead))
            ranges[pair] = min(low, lead), max(high, lead)
            assert ranges[pair][1] - ranges[pair][0] <= bound, f"seed {seed}, step {step}"
        for pair in ranges.keys() - pairs:
            del ranges[pair]


def test_a_returning_tenant_keeps_what_it_had_been_served() -> None:
    """It went away ahead of the others: coming back at once, it is still ahead."""
    tier = Tier(1, tenants=2)
    tier.arrive(0)
    tier.step()
    served = tier.queue.counter(0)
    tier.arrive(1)

    tier.arrive(0)

    assert tier.queue.counter(0) == served > tier.queue.counter(1) - 1


def test_only_so_many_absent_tenants_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flood of names cannot fill the memory; a forgotten one is a newcomer."""
    monkeypatch.setattr(tier_queue, "TENANTS_MAX", 3)
    tier = Tier(1, tenants=10)

    for tenant in tier.weights:
        tier.arrive(tenant)
        while len(tier.queue):
            tier.step()

    assert sum(tier.queue.counter(tenant) > 0 for tenant in tier.weights) == 3


def test_the_rate_of_admission_is_that_of_times_when_something_waited() -> None:
    """100 tokens in the second in which one waited; the idle minutes before do not count."""
    tier = Tier(1, tenants=1)
    tier.queue.watch(0.0)
    tier.queue.watch(60_000.0)
    tier.arrive(0)
    tier.queue.watch(1_000.0)

    found = tier.first()
    assert found is not None
    tier.queue.admitted(found[0], tokens=100)
    tier.queue.remove(found[0])
    tier.queue.watch(1_000.0)

    assert tier.queue.tokens_per_s == len(found[0].token_ids)
