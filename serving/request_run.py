"""A request while it runs: which answers run where, and what of them has arrived."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from headrace.serving.admission.quota_hold import Hold
from headrace.serving.clock import Clock
from headrace.serving.domain.generate import Chunk, Generate, Settled
from headrace.serving.domain.request import Delta, FinishReason, SequenceSpec
from headrace.serving.domain.tier import Promise, Receipt
from headrace.serving.domain.usage import Usage
from headrace.serving.errors import ServingError
from headrace.serving.inbox import Inbox
from headrace.serving.observe import ModelMetrics
from headrace.serving.ports import Placement
from headrace.serving.receipts import Stopwatch
from headrace.serving.tally import Tally
from headrace.serving.tracing import Span

DEADLINE_SLACK_MS = 20.0
"""The transport ends a call at the deadline by its own clock; a caller that hangs up this close
to it cannot be told from one that ran out of time."""

SEED_MODULUS = 2**64


def is_late(deadline_ms: float | None, *, now_ms: float) -> bool:
    """Whether a caller that is gone now ran out of time, rather than of patience."""
    return deadline_ms is not None and now_ms >= deadline_ms - DEADLINE_SLACK_MS


@dataclass(frozen=True, slots=True)
class Departure:
    """Why a request left a replica."""

    replica_id: str
    why: str
    refusal: ServingError | None
    """What the replica said, if it said anything."""


class Run:
    """A request while it runs. Owned by the task that generates."""

    def __init__(
        self,
        request: Generate,
        placement: Placement,
        *,
        hold: Hold,
        clock: Clock,
        metrics: ModelMetrics,
        span: Span | None,
    ) -> None:
        self.request = request
        self.hold = hold
        """What it holds of its caller's limits; settled or released by the pipeline."""
        self.is_over_budget = False
        """A hard budget has ended it."""
        self.metrics = metrics
        self.placement = placement
        self.inbox = Inbox()
        self.tally = Tally(request)
        self._covered = Usage()
        """What the caller has, or is about to get."""
        self.left: set[str] = set()
        self.replicas_tried = 1
        self.span = span
        self.finishes: dict[int, FinishReason] = {}
        """How each answer that has finished did so."""
        self._refused: ServingError | None = None
        """What the replica said when it gave a sequence up, if it said anything."""
        self.delivered_ms: float | None = None
        self.stopwatch = Stopwatch(request.accepted_ms)
        self.receipt: Receipt | None = None
        """Once the request is settled."""
        self.first_token_unix_ms: int | None = None
        self._clock = clock
        self._sequences: dict[int, int] = {}
        """Answers that run, to the replica's name for them."""
        self._arrived: list[list[int]] = [[] for _ in range(request.n)]
        """Tokens of each answer that are here: what a resumed sequence starts from."""
        self._unfinished = set(range(request.n))
        self._expiry: asyncio.TimerHandle | None = None
        self._leave: Callable[[], None] | None = None

    @property
    def is_finished(self) -> bool:
        return not self._unfinished

    @property
    def ttft_ms(self) -> float | None:
        return self.stopwatch.ttft_ms

    @property
    def num_arrived(self) -> int:
        """Tokens that replicas have sent, delivered to the caller or not."""
        return sum(map(len, self._arrived))

    def start(self) -> None:
        if (deadline_ms := self.request.deadline_ms) is not None:
            left_s = max(deadline_ms - self._clock.monotonic_ms(), 0) / 1000
            self._expiry = asyncio.get_running_loop().call_later(left_s, self.inbox.expire)
        self.submit()

    def submit(self) -> int:
        """Start every unfinished answer on the placed replica; returns the tokens resumed."""
        request, replica, terms = self.request, self.placement.replica, self.request.terms
        ttft_ms = terms.objective.ttft_ms_max
        promise = Promise(
            tier=terms.tier_served,
            tenant=terms.tenant,
            weight=terms.weight,
            due_ms=None if ttft_ms is None else request.accepted_ms + ttft_ms,
            itl_ms_max=terms.objective.itl_ms_max,
        )
        for index in sorted(self._unfinished):
            seed = (request.sampling.seed + index) % SEED_MODULUS
            sampling = request.sampling if index == 0 else replace(request.sampling, seed=seed)
            spec = SequenceSpec(
                prompt_ids=request.prompt_ids,
                sampling=sampling,
                resume_ids=tuple(self._arrived[index]),
                cache_salt=request.cache_salt,
                deadline_ms=request.deadline_ms,
                promise=promise,
            )
            self._sequences[index] = replica.submit(spec, inbox=self.inbox, index=index)
        return sum(len(self._arrived[index]) for index in self._unfinished)

    def chunk(self, index: int, delta: Delta) -> Chunk | None:
        """Take note of what arrived; an answer that its replica gave up is not finished."""
        self._arrived[index] += delta.token_ids
        finish = delta.finish
        if finish is FinishReason.STOP or finish is FinishReason.LENGTH:
            self._unfinished.discard(index)
            self.finishes[index] = finish
            self._sequences.pop(index, None)
        elif finish is not None:
            if finish is FinishReason.DEADLINE:
                self.inbox.expire()
            else:
                self._refused = _as_refusal(delta.error)
                self.inbox.lose(f"it ended an answer as {finish}")
            delta = replace(delta, finish=None, error=None)
        if not (delta.token_ids or delta.text or delta.finish or delta.cached_tokens):
            return None
        return Chunk(index, delta, self.tally.after(index, delta))

    async def covered(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        """The chunks that the caller's budgets cover, which is all of them but once.

        Where the money ends, so do the answers, at once: what is not covered is never delivered,
        and each answer that has not finished finishes with BUDGET.
        """
        for number, chunk in enumerate(chunks):
            if not (self.hold.covers(chunk.usage) or await self.hold.extend(chunk.usage)):
                return [*chunks[:number], *self._end_over_budget(chunks[number:])]
            self._covered = chunk.usage
        return list(chunks)

    def _end_over_budget(self, withheld: Sequence[Chunk]) -> list[Chunk]:
        """Stop the engine; what each answer that has not finished ends with."""
        self.abort()
        self.is_over_budget = True
        self._unfinished |= {chunk.index for chunk in withheld if chunk.delta.finish}
        ended, self._unfinished = sorted(self._unfinished), set()
        self.finishes |= dict.fromkeys(ended, FinishReason.BUDGET)
        return [Chunk(each, Delta(finish=FinishReason.BUDGET), self._covered) for each in ended]

    def leave_replica(self) -> Departure:
        """Abort what runs there and forget the replica."""
        self.abort()
        self.left.add(self.placement.replica.replica_id)
        departure = Departure(
            self.placement.replica.replica_id, self.inbox.lost or "", self._refused
        )
        self.inbox.lost = self._refused = None
        return departure

    def abort(self) -> None:
        for sequence in self._sequences.values():
            self.placement.replica.abort(sequence)
        self._sequences.clear()

    def on_stop(self, leave: Callable[[], None]) -> None:
        """Call `leave` once, when the request is over."""
        self._leave = leave

    def stop(self) -> None:
        self.abort()
        if self._leave is not None:
            self._leave()
            self._leave = None
        if self._expiry is not None:
            self._expiry.cancel()

    def settled(self, charge_nano: int) -> Settled:
        return Settled(
            usage=self.tally.usage,
            charge_nano=charge_nano,
            price=self.request.price,
            version=self.placement.replica.version,
            replicas_tried=self.replicas_tried,
            receipt=self.receipt,
        )


def _as_refusal(error: Exception | None) -> ServingError | None:
    assert error is None or isinstance(error, ServingError)
    return error
