"""Which tokens the next step runs.

There is no prefill phase and no decode phase. A job has pending tokens, a step grants some of
them, and a long prompt is a job that needs several grants.

The order of a step: first one token for every job that decodes, so that a stream that has begun
never waits for a prompt; then prompts, those under way and those in the queues, by urgency
(`tier_policy.py`: slack and due times over all tiers; `tier_queue.py`: fairness between the tenants
of one). Without promises that is the order of arrival. While anything decodes, all prompts
together get what fits into the least gap that was promised to those who decode, by a model of step
times that is learnt, and at most `prefill_tokens_max`.

Blocks for all known tokens are taken when a job is admitted, so only decoding can run out of
them. Then the youngest job of the weakest tier loses its blocks and computes its tokens again
later; the oldest of the strongest never does, so some job always ends. A promise at stake takes
rows and blocks from flex and batch in the same way. A reserved job holds the blocks of its whole
answer from the start, and so is never preempted.
"""

from bisect import insort
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from headrace.serving.domain.tier import Tier
from headrace.serving.engine import tier_policy
from headrace.serving.engine.base import Limits
from headrace.serving.engine.block_pool import BlockPool
from headrace.serving.engine.job import Job, service_order
from headrace.serving.engine.prefix_cache import resident
from headrace.serving.engine.step_time import StepTimeModel
from headrace.serving.engine.tier_policy import AT_STAKE, Urgency
from headrace.serving.engine.tier_queue import TierQueue

PROMOTION_EVERY_MS = 1_000.0
"""How often it is looked whether someone has given way for long enough."""

_STANDARD = Tier.STANDARD.rank
_FLEX = Tier.FLEX.rank
_BATCH = Tier.BATCH.rank

Policy = Callable[[Job, float, float, float], Urgency]
"""`tier_policy.urgency`, or what a benchmark compares it with."""

JobT = TypeVar("JobT", bound=Job)


@dataclass(slots=True)
class Plan(Generic[JobT]):
    """One step: who runs how many tokens, and who lost their blocks to make room."""

    grants: list[tuple[JobT, int]]
    preempted: list[JobT]
    num_decoding: int = 0
    """The first so many grants are single tokens of jobs that decode."""


class Scheduler(Generic[JobT]):
    """Continuous batching over a fixed pool of KV blocks. Owned by the engine's thread."""

    def __init__(
        self,
        limits: Limits,
        *,
        prefill_tokens_max: int | None = None,
        urgency: Policy = tier_policy.urgency,
    ) -> None:
        """Schedule for an engine.

        Args:
            limits: the engine's.
            prefill_tokens_max: most prompt tokens of a step in which something decodes; all that
                the batch has room for, by default.
            urgency: who goes first.
        """
        # Every running job must be able to decode in every step.
        assert limits.batch_tokens_max >= limits.rows_max
        self._limits = limits
        self._block_tokens = limits.kv_block_tokens
        self._prefill_tokens_max = prefill_tokens_max or limits.batch_tokens_max
        self._policy = urgency
        self.pool = BlockPool(limits.kv_blocks)
        self.sequence_tokens_max = min(
            limits.sequence_tokens_max, self.pool.num_blocks * limits.kv_block_tokens
        )
        """The longest sequence that fits an otherwise empty engine."""
        # An engine of linear caches has a block for each row, as long as any sequence: then none
        # ever needs another, and blocks kept free for that would be rows that never run.
        self._spare_each = int(self.sequence_tokens_max > limits.kv_block_tokens)
        self.times = StepTimeModel()
        self.running: list[JobT] = []
        """Jobs that have blocks, by tier and arrival: the last one gives way first."""
        self.queues: tuple[TierQueue[JobT], ...] = tuple(TierQueue() for _ in Tier)
        """Jobs that have none, by rank of their tier."""
        self._computing: dict[bytes, JobT] = {}
        """Blocks that a running job's prompt is about to fill."""
        self._arrivals = 0
        self._now_ms = 0.0
        self._promotion_due_ms = 0.0
        self._ms_per_prompt_token = 0.0
        """At the chunk that the step before allowed, decoding rows included."""
        self.recomputed_tokens = 0
        """Tokens computed more than once, since the start."""
        self.preemptions = 0
        """Jobs that lost their blocks, since the start: a pool too small for its rows."""

    def add(self, job: JobT, now_ms: float = 0.0) -> None:
        """Queue `job`, which is owned by the scheduler until `remove`."""
        assert job.token_ids
        assert len(job.token_ids) <= self.sequence_tokens_max
        self._arrivals += 1
        job.arrival = self._arrivals
        job.queued_ms = now_ms
        self.queues[job.rank].add(job)

    def plan(self, now_ms: float = 0.0) -> Plan[JobT]:
        """Choose the next step, as of `now_ms`. Empty only when there is nothing to do."""
        elapsed_ms, self._now_ms = now_ms - self._now_ms, now_ms
        plan = Plan[JobT]([], [])
        for queue in self.queues:
            queue.watch(elapsed_ms)
        if self.num_waiting:
            self._promote()
            self._make_way(plan)
        num_evicted = len(plan.preempted)
        itl_ms = self._plan_decoding(plan)
        plan.num_decoding = rows = len(plan.grants)
        tokens_left = self._limits.batch_tokens_max - rows
        if rows:
            most = min(tokens_left, self._prefill_tokens_max)
            tokens_left = tier_policy.chunk_tokens(self.times, rows=rows, itl_ms=itl_ms, most=most)
        if tokens_left:
            self._ms_per_prompt_token = self.times.ms(rows, tokens_left) / tokens_left
        # Blocks that decoding jobs took from others belong to these, not to newcomers.
        self._plan_prompts(plan, tokens_left, admits=len(plan.preempted) == num_evicted)
        assert plan.grants or not (self.running or self.num_waiting), "work left, none planned"
        return plan

    def advance(self, job: JobT, num_tokens: int) -> None:
        """Record that a grant ran."""
        first, end = job.num_computed, job.num_computed + num_tokens
        assert end <= len(job.token_ids)
        job.num_computed = end
        known = job.computed_once
        if first < job.computed_once:
            self.recomputed_tokens += min(end, job.computed_once) - first
        if end > job.computed_once:
            if job.has_begun:
                self.queues[job.rank].answered(job)
            job.computed_once = end
        if end == len(job.token_ids):
            job.has_begun = True
        size = self._block_tokens
        for index in range(first // size, end // size):
            digest = job.chain.digest(index, job.token_ids)
            if self.pool.label(job.block_ids[index], digest) and (index + 1) * size > known:
                job.num_written += size
            if self._computing.get(digest) is job:
                del self._computing[digest]

    def observe(self, plan: Plan[JobT], step_ms: float) -> None:
        """Learn how long the step of `plan` took."""
        rows = plan.num_decoding
        tokens = sum(count for _, count in plan.grants) - rows
        self.times.observe(rows, tokens, step_ms)

    def remove(self, job: JobT) -> None:
        """Forget `job`, waiting or running, and take its blocks back. Full ones stay cached."""
        if job.block_ids:
            self.running.remove(job)
            self._release(job)
        else:
            self.queues[job.rank].remove(job)

    @property
    def num_waiting(self) -> int:
        return sum(map(len, self.queues))

    @property
    def waiting(self) -> list[JobT]:
        """Jobs that have no blocks, by arrival."""
        return sorted((job for queue in self.queues for job in queue), key=_arrival)

    @property
    def pending_tokens(self) -> int:
        """Prompt tokens not yet computed, of running and waiting jobs. Any thread."""
        return sum(queue.pending_tokens for queue in self.queues) + sum(
            pending
            for job in tuple(self.running)
            if (pending := len(job.token_ids) - job.num_computed) > 1
        )

    @property
    def prompt_tokens_per_s(self) -> float:
        """Prompt tokens that can be computed beside what runs. Any thread."""
        per_token_ms = self._ms_per_prompt_token or self.times.token_ms
        return 1000 / per_token_ms

    def check(self) -> None:
        """Assert every invariant of jobs and blocks; for tests."""
        assert len(self.running) <= self._limits.rows_max
        order = [service_order(job) for job in self.running]
        assert order == sorted(set(order)), "jobs are out of order or doubled"
        waiting = self.waiting
        assert len({job.arrival for job in waiting}) == len(waiting) == self.num_waiting
        assert not any(job.block_ids or job.num_computed for job in waiting)
        for rank, queue in enumerate(self.queues):
            assert all(job.rank == rank for job in queue), "a job waits in another tier's queue"
            assert queue.pending_tokens == sum(len(job.token_ids) for job in queue)
        for job in self.running:
            assert len(job.block_ids) >= self._blocks_for(job.num_computed)
            assert len(job.block_ids) <= self._blocks_for(max(len(job.token_ids), job.tokens_held))
        assert set(self._computing.values()) <= set(self.running), "a ghost computes a prefix"
        self.pool.check(job.block_ids for job in self.running)

    def _plan_decoding(self, plan: Plan[JobT]) -> float | None:
        """Grant a token to all that decode; the least gap that any of them was promised.

        Flex and batch pause where a step with them would take longer than that.
        """
        size = self._block_tokens
        running = self.running
        least_ms: float | None = None
        index = 0
        while index < len(running):
            job = running[index]
            index += 1
            computed = job.num_computed
            if len(job.token_ids) - computed != 1:
                continue
            if (
                job.rank >= _FLEX
                and least_ms is not None
                and len(plan.grants) >= tier_policy.rows_within(self.times, least_ms)
            ):
                break  # Those who follow are no stronger.
            if computed == len(job.block_ids) * size and not self._make_room(plan, job):
                break
            plan.grants.append((job, 1))
            itl_ms = job.promise.itl_ms_max
            if itl_ms is not None and (least_ms is None or itl_ms < least_ms):
                least_ms = itl_ms
        return least_ms

    def _plan_prompts(self, plan: Plan[JobT], tokens_left: int, *, admits: bool) -> None:
        """Share the tokens among prompts under way and, where it `admits`, newcomers."""
        under_way = [
            (self._urgency(job), job)
            for job in self.running
            if len(job.token_ids) - job.num_computed > 1
        ]
        under_way.sort(reverse=True)
        while tokens_left:
            newcomer = self._newcomer() if admits else None
            if newcomer is not None and (not under_way or newcomer < under_way[-1]):
                job = newcomer[1]
                if not self._admit(job):
                    admits = False
                    continue
            elif under_way:
                _, job = under_way.pop()
            else:
                break
            count = min(job.num_pending, tokens_left)
            plan.grants.append((job, count))
            tokens_left -= count

    @property
    def _spare_blocks(self) -> int:
        """Each running job may need a block soon: taking the last ones would only preempt."""
        return self._spare_each * len(self.running)

    def _urgency(self, job: JobT, ahead: int = 0) -> Urgency:
        per_token_ms = self._ms_per_prompt_token
        wait_ms = (len(job.token_ids) - job.num_computed) * per_token_ms
        return self._policy(job, self._now_ms, wait_ms, ahead * per_token_ms)

    def _newcomer(self) -> tuple[Urgency, JobT] | None:
        """The most urgent job that waits and may be admitted, if there is a row for one."""
        if len(self.running) == self._limits.rows_max:
            return None
        return self._most_urgent(self.queues)

    def _most_urgent(self, queues: Iterable[TierQueue[JobT]]) -> tuple[Urgency, JobT] | None:
        found = None
        ahead = 0
        for queue in queues:
            ahead += queue.tokens_ahead
            if len(queue) and (first := queue.first(is_late=self._is_late, is_held=self._is_held)):
                job, has_turn = first
                urgency = self._urgency(job, ahead)
                if has_turn:
                    urgency = urgency._replace(state=AT_STAKE)
                if found is None or urgency < found[0]:
                    found = urgency, job
        return found

    def _is_late(self, job: JobT) -> bool:
        wait_ms = len(job.token_ids) * self._ms_per_prompt_token
        return tier_policy.is_late(job, self._now_ms, wait_ms)

    def _is_held(self, job: JobT) -> bool:
        """True when another job is about to compute a prefix that `job` needs next.

        The choices of one request arrive together, and all but the last block of their prompts
        is the same. Nobody waits for a weaker tier: that one may itself be waiting for `job`.
        """
        if not self._computing:
            return False
        shareable = self._shareable_blocks(job)
        found = len(resident(self.pool, job.chain, job.token_ids, most=shareable))
        if found == shareable:
            return False
        other = self._computing.get(job.chain.digest(found, job.token_ids))
        return other is not None and other.rank <= job.rank

    def _promote(self) -> None:
        """Move flex jobs that have given way for long enough up to standard."""
        if self._now_ms < self._promotion_due_ms:
            return
        self._promotion_due_ms = self._now_ms + PROMOTION_EVERY_MS
        for job in list(self.queues[_FLEX]):
            rank = tier_policy.promoted_rank(job, self._now_ms)
            if rank != job.rank:
                self.queues[job.rank].remove(job)
                job.rank = rank
                self.queues[rank].add(job)

    def _make_way(self, plan: Plan[JobT]) -> None:
        """Take rows and blocks from the weakest for the most urgent of those that are stronger.

        Batch gives way to everybody, flex to a promise that is at stake. Nothing is taken unless
        it is enough. One job a step: the next is at most a step away.
        """
        if not self.running or (weakest := self.running[-1].rank) < _FLEX:
            return
        found = self._most_urgent(self.queues[:weakest])
        if found is None:
            return
        urgency, job = found
        limit = _FLEX if urgency.state == AT_STAKE and job.rank <= _STANDARD else _BATCH
        blocks = self._missing(job)[1] + self._spare_blocks - self.pool.num_free
        rows = 1 + len(self.running) - self._limits.rows_max
        victims: list[JobT] = []
        for victim in reversed(self.running):
            if (blocks <= 0 and rows <= 0) or victim.rank < max(limit, job.rank + 1):
                break
            victims.append(victim)
            # A row that ends also gives back the block that was kept free for it.
            blocks -= self.pool.num_alone(victim.block_ids) + self._spare_each
            rows -= 1
        if victims and blocks <= 0 and rows <= 0:
            for victim in victims:
                self._preempt(plan, victim)

    def _make_room(self, plan: Plan[JobT], job: JobT) -> bool:
        """Give a running job one more block, preempting weaker and younger ones, at last itself.

        The youngest goes first: it has the least to recompute, and sparing the oldest guarantees
        that some job always ends. Nobody after `job` in this order has a grant in this plan yet.
        """
        while (blocks := self.pool.take(1)) is None:
            victim = self.running[-1]
            self._preempt(plan, victim)
            if victim is job:
                return False
        job.block_ids += blocks
        return True

    def _preempt(self, plan: Plan[JobT], victim: JobT) -> None:
        assert victim.rank > 0, "reserved jobs have all the blocks they will need"
        self.running.remove(victim)
        self._release(victim)
        victim.num_computed = 0
        victim.preemptions += 1
        victim.rank = tier_policy.promoted_rank(victim, self._now_ms)
        self.queues[victim.rank].add(victim)
        plan.preempted.append(victim)
        self.preemptions += 1

    def _missing(self, job: JobT) -> tuple[list[int], int]:
        """Resident blocks that `job` can share, and how many more it needs."""
        found = resident(self.pool, job.chain, job.token_ids, most=self._shareable_blocks(job))
        return found, self._blocks_for(max(len(job.token_ids), job.tokens_held)) - len(found)

    def _admit(self, job: JobT) -> bool:
        """Move a waiting job to the running ones with blocks for all it knows, or do nothing."""
        found, missing = self._missing(job)
        self.pool.share(found)
        taken = None
        if missing + self._spare_blocks <= self.pool.num_free:
            taken = self.pool.take(missing)
        if taken is None:
            self.pool.release(found)
            return False
        job.block_ids = found + taken
        job.num_computed = len(found) * self._block_tokens
        if job.num_resident is None:
            job.num_resident = job.num_computed
        queue = self.queues[job.rank]
        known = len(job.token_ids)
        queue.admitted(job, tokens=known - max(job.num_computed, min(job.computed_once, known)))
        queue.remove(job)
        insort(self.running, job, key=service_order)
        for index in range(len(found), len(job.token_ids) // self._block_tokens):
            self._computing.setdefault(job.chain.digest(index, job.token_ids), job)
        return True

    def _shareable_blocks(self, job: JobT) -> int:
        """Full blocks that may come from the cache: the last token is always computed."""
        return (len(job.token_ids) - 1) // self._block_tokens

    def _release(self, job: JobT) -> None:
        """Give back the blocks of a job that is no longer running."""
        for index in range(
            job.num_computed // self._block_tokens, len(job.token_ids) // self._block_tokens
        ):
            digest = job.chain.digest(index, job.token_ids)
            if self._computing.get(digest) is job:
                del self._computing[digest]
        self.pool.release(job.block_ids)
        job.block_ids = []

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_tokens)


def _arrival(job: Job) -> int:
    return job.arrival
