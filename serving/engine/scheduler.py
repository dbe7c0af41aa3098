"""Which tokens the next step runs.

There is no prefill phase and no decode phase. A job has pending tokens, a step grants some of
them, and a long prompt is a job that needs several grants.

The order of a step: first one token for every job that decodes, oldest first, so that a stream
that has begun never waits for a prompt; then prompts that are under way, oldest first; then
prompts from the queue, in order of arrival. While anything decodes, all prompts together get at
most `prefill_tokens_max` tokens of a step: that bounds the pause a long prompt puts between two
tokens of everybody else.

Blocks for all known tokens are taken when a job is admitted, so only decoding can run out of
them. Then the youngest job loses its blocks and computes its tokens again later; the oldest never
does, so some job always ends.
"""

from bisect import insort
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from headrace.serving.engine.base import Limits
from headrace.serving.engine.block_pool import BlockPool
from headrace.serving.engine.prefix_cache import PrefixChain, resident


class Job:
    """A sequence between its arrival and its last token."""

    __slots__ = (
        "arrival",
        "block_ids",
        "chain",
        "computed_once",
        "key",
        "num_computed",
        "num_resident",
        "token_ids",
    )

    def __init__(
        self,
        key: Hashable,
        token_ids: list[int],
        chain: PrefixChain,
        *,
        computed_once: int = 0,
    ) -> None:
        """Describe a sequence.

        Args:
            key: the caller's name for it.
            token_ids: the tokens known so far; the job owns the list and appends to it.
            chain: the digests of its blocks.
            computed_once: leading tokens that a lost replica has already computed.
        """
        self.key = key
        self.token_ids = token_ids
        self.chain = chain
        self.num_computed = 0
        """Tokens whose KV is in the cache. A step moves this towards len(token_ids)."""
        self.computed_once = computed_once
        """Leading tokens that were computed before, so that doing it again is recomputation."""
        self.block_ids: list[int] = []
        self.num_resident: int | None = None
        """Tokens found in the cache at the first admission; None before it."""
        self.arrival = 0

    @property
    def num_pending(self) -> int:
        return len(self.token_ids) - self.num_computed


JobT = TypeVar("JobT", bound=Job)


@dataclass(slots=True)
class Plan(Generic[JobT]):
    """One step: who runs how many tokens, and who lost their blocks to make room."""

    grants: list[tuple[JobT, int]]
    preempted: list[JobT]


class Scheduler(Generic[JobT]):
    """Continuous batching over a fixed pool of KV blocks. Owned by the engine's thread."""

    def __init__(self, limits: Limits, *, prefill_tokens_max: int | None = None) -> None:
        """Schedule for an engine.

        Args:
            limits: the engine's.
            prefill_tokens_max: most prompt tokens of a step in which something decodes; all that
                the batch has room for, by default.
        """
        # Every running job must be able to decode in every step.
        assert limits.batch_tokens_max >= limits.rows_max
        self._limits = limits
        self._block_tokens = limits.kv_block_tokens
        self._prefill_tokens_max = prefill_tokens_max or limits.batch_tokens_max
        self.pool = BlockPool(limits.kv_blocks)
        self.sequence_tokens_max = min(
            limits.sequence_tokens_max, self.pool.num_blocks * limits.kv_block_tokens
        )
        """The longest sequence that fits an otherwise empty engine."""
        self.running: list[JobT] = []
        """Jobs that have blocks, by arrival."""
        self.waiting: list[JobT] = []
        """Jobs that have none, by arrival."""
        self._computing: dict[bytes, JobT] = {}
        """Blocks that a running job's prompt is about to fill."""
        self._arrivals = 0
        self.recomputed_tokens = 0
        """Tokens computed more than once, since the start."""
        self.preemptions = 0
        """Jobs that lost their blocks, since the start: a pool too small for its rows."""

    def add(self, job: JobT) -> None:
        """Queue `job`, which is owned by the scheduler until `remove`."""
        assert job.token_ids
        assert len(job.token_ids) <= self.sequence_tokens_max
        self._arrivals += 1
        job.arrival = self._arrivals
        self.waiting.append(job)

    def plan(self) -> Plan[JobT]:
        """Choose the next step. Empty only when there is nothing to do."""
        plan = Plan[JobT]([], [])
        self._plan_decoding(plan)
        tokens_left = self._limits.batch_tokens_max - len(plan.grants)
        if plan.grants:
            tokens_left = min(tokens_left, self._prefill_tokens_max)
        for job in self.running:
            if not tokens_left:
                return plan
            if job.num_pending > 1:
                tokens_left -= self._grant(plan, job, tokens_left)
        # Blocks freed by preemption belong to the victims, not to newcomers.
        if tokens_left and not plan.preempted:
            for job in self._admissible():
                if not tokens_left or not self._admit(job):
                    break
                tokens_left -= self._grant(plan, job, tokens_left)
        assert plan.grants or not (self.running or self.waiting), "work is left but none planned"
        return plan

    def advance(self, job: JobT, num_tokens: int) -> None:
        """Record that a grant ran."""
        first, end = job.num_computed, job.num_computed + num_tokens
        assert end <= len(job.token_ids)
        job.num_computed = end
        if first < job.computed_once:
            self.recomputed_tokens += min(end, job.computed_once) - first
        if end > job.computed_once:
            job.computed_once = end
        size = self._block_tokens
        for index in range(first // size, end // size):
            digest = job.chain.digest(index, job.token_ids)
            self.pool.label(job.block_ids[index], digest)
            if self._computing.get(digest) is job:
                del self._computing[digest]

    def remove(self, job: JobT) -> None:
        """Forget `job`, waiting or running, and take its blocks back. Full ones stay cached."""
        if job.block_ids:
            self.running.remove(job)
            self._release(job)
        else:
            self.waiting.remove(job)

    @property
    def pending_tokens(self) -> int:
        """Prompt tokens not yet computed, of running and waiting jobs."""
        return sum(
            pending
            for job in (*self.running, *self.waiting)
            if (pending := len(job.token_ids) - job.num_computed) > 1
        )

    def check(self) -> None:
        """Assert every invariant of jobs and blocks; for tests."""
        assert len(self.running) <= self._limits.rows_max
        for jobs in (self.running, self.waiting):
            arrivals = [job.arrival for job in jobs]
            assert arrivals == sorted(set(arrivals)), "jobs are out of order or doubled"
        assert not any(job.block_ids or job.num_computed for job in self.waiting)
        for job in self.running:
            assert len(job.block_ids) >= self._blocks_for(job.num_computed)
            assert len(job.block_ids) <= self._blocks_for(len(job.token_ids))
        assert set(self._computing.values()) <= set(self.running), "a ghost computes a prefix"
        self.pool.check(job.block_ids for job in self.running)

    def _plan_decoding(self, plan: Plan[JobT]) -> None:
        size = self._block_tokens
        running = self.running
        index = 0
        while index < len(running):
            job = running[index]
            index += 1
            computed = job.num_computed
            if len(job.token_ids) - computed != 1:
                continue
            if computed == len(job.block_ids) * size and not self._make_room(plan, job):
                return
            plan.grants.append((job, 1))

    def _make_room(self, plan: Plan[JobT], job: JobT) -> bool:
        """Give a running job one more block, preempting younger ones, at last itself.

        The youngest goes first: it has the least to recompute, and sparing the oldest guarantees
        that some job always ends. Nobody younger than `job` has a grant in this plan yet.
        """
        while (blocks := self.pool.take(1)) is None:
            victim = self.running.pop()
            self._release(victim)
            victim.num_computed = 0
            insort(self.waiting, victim, key=_arrival)
            plan.preempted.append(victim)
            self.preemptions += 1
            if victim is job:
                return False
        job.block_ids += blocks
        return True

    def _grant(self, plan: Plan[JobT], job: JobT, tokens_left: int) -> int:
        num_tokens = min(job.num_pending, tokens_left)
        plan.grants.append((job, num_tokens))
        return num_tokens

    def _admissible(self) -> Iterator[JobT]:
        """Waiting jobs by arrival, less those whose prefix is being computed for them."""
        for job in tuple(self.waiting):
            if len(self.running) == self._limits.rows_max:
                return
            if not self._holds(job):
                yield job

    def _holds(self, job: JobT) -> bool:
        """True when another job is about to compute a prefix that `job` needs next.

        The choices of one request arrive together, and all but the last block of their prompts
        is the same. The wait ends with the step: there is budget to admit anyone only when every
        running prompt, and every one admitted before, completes in this step.
        """
        if not self._computing:
            return False
        shareable = self._shareable_blocks(job)
        found = len(resident(self.pool, job.chain, job.token_ids, most=shareable))
        if found == shareable:
            return False
        return job.chain.digest(found, job.token_ids) in self._computing

    def _admit(self, job: JobT) -> bool:
        """Move a waiting job to the running ones with blocks for all it knows, or do nothing."""
        found = resident(self.pool, job.chain, job.token_ids, most=self._shareable_blocks(job))
        self.pool.share(found)
        missing = self._blocks_for(len(job.token_ids)) - len(found)
        # Each running job may need a block soon: admitting into the last ones would only preempt.
        spare = len(self.running)
        taken = None
        if missing + spare <= self.pool.num_free:
            taken = self.pool.take(missing)
        if taken is None:
            self.pool.release(found)
            return False
        job.block_ids = found + taken
        job.num_computed = len(found) * self._block_tokens
        if job.num_resident is None:
            job.num_resident = job.num_computed
        self.waiting.remove(job)
        insort(self.running, job, key=_arrival)
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
