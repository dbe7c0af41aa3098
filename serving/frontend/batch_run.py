"""One batch while this frontend runs it: lines out, results in, until there is one for each.

A line runs under a request_id that follows from batch and line. One that was used before tells that
a process died between settling the line and committing its result: that result is lost, so its
charge is given back and the line runs again under its next id. So a line is charged once, and has
one result, whatever dies in between.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Protocol, TypeVar

from headrace.serving import log
from headrace.serving.clock import Clock
from headrace.serving.domain.batch import (
    ATTEMPTS_MAX,
    BatchState,
    LineResult,
    LineStatus,
    request_id_of,
)
from headrace.serving.domain.generate import Generate, Settled
from headrace.serving.domain.record import Caller
from headrace.serving.domain.tier import Tier
from headrace.serving.errors import (
    AlreadyServed,
    Code,
    DeadlineExceeded,
    EngineFault,
    LimitExceeded,
    ServingError,
)
from headrace.serving.frontend import batch_results, convert
from headrace.serving.jobs import batch_files
from headrace.serving.jobs.batch_store import BatchStore, Lease, LeaseLost
from headrace.serving.metering.give_back import GivenBack
from headrace.serving.pipeline import Pipeline
from headrace.v1 import batch_pb2
from headrace.v1 import inference_pb2 as pb

RENEW_S = 1.0
"""How often the lease is renewed, and a cancellation by another frontend noticed."""
GROUP_MAX = 1_000
"""Results of one commit: a megabyte or so."""
READ_AHEAD = 16
"""Lines in memory that wait for room: 16 MB at most."""
BEGIN_AHEAD = 256
"""Lines that are noted as begun at once: one fsync for so many."""
BACKOFF_MS_MAX = 30_000
FAULTS_MAX = 3
"""Times a line may lose all its replicas; then it is likely the cause."""

T = TypeVar("T")


class Prepare(Protocol):
    """`InferenceService.prepare`."""

    async def __call__(
        self,
        message: pb.GenerateRequest,
        by: Caller,
        *,
        request_id: str,
        deadline_ms: float | None,
        tier: Tier,
    ) -> Generate: ...


class Room(Protocol):
    """Where lines take their places: no more at once than nobody else wants."""

    async def enter(self, model: str) -> int:
        """Wait for a place; its number is what `leave` takes."""
        ...

    def leave(self, place: int) -> None: ...


GiveBackLine = Callable[[str, str], Awaitable[GivenBack]]
"""Tenant and request id; what cannot be given back now is remembered."""


class _Window(Exception):
    """The batch's time was over under a line."""


@dataclass(slots=True, eq=False)
class _Line:
    """A line that was started and has no result yet."""

    number: int
    content: batch_pb2.BatchLine
    place: int | None
    """In the room; None while it waits for better times."""


class BatchRun:
    """Runs one leased batch. `run` is one task; the rest belongs to its event loop."""

    def __init__(
        self,
        lease: Lease,
        *,
        store: BatchStore,
        pipeline: Pipeline,
        prepare: Prepare,
        room: Room,
        give_back: GiveBackLine,
        on_progress: Callable[[], Awaitable[None]],
        clock: Clock,
    ) -> None:
        self.batch = batch = lease.batch
        self._done = lease.done
        self._begun = lease.begun
        self._store = store
        self._pipeline = pipeline
        self._prepare = prepare
        self._room = room
        self._give_back = give_back
        self._on_progress = on_progress
        self._clock = clock
        self._by = Caller(batch.tenant_id, batch.key_id, project_id=batch.project_id)
        self._results: list[LineResult] = []
        self._news = asyncio.Event()
        self._can_write = asyncio.Event()
        self._can_write.set()
        self._lines: set[asyncio.Task[None]] = set()
        self._entering = asyncio.Lock()
        """One line after the other looks for room: in the order in which they came."""
        self._num_waiting = 0
        self._none_waits = asyncio.Event()
        self._none_waits.set()
        self._not_before_ms = 0.0
        self._backoff_ms = 0.0

    def notice(self) -> None:
        """Look at once what became of the batch."""
        self._news.set()

    async def run(self) -> None:
        """Until the batch has ended, or is another frontend's. Cancelled, it is left QUEUED."""
        feeding = asyncio.get_running_loop().create_task(self._feed())
        try:
            try:
                state, why = await self._until_over(feeding)
            finally:
                await self._stop(feeding)
            while self._results:
                await self._commit()
            await self._fill_up(state)
            await self._move(state, why)
        except LeaseLost:
            pass  # Whoever has it goes on from what is committed.
        except asyncio.CancelledError:
            with suppress(LeaseLost):
                while self._results:
                    await self._commit()
                await self._move(BatchState.QUEUED)
            raise

    async def _until_over(self, feeding: "asyncio.Task[None]") -> tuple[BatchState, str]:
        """Commit what comes and renew the lease; which state the batch is to enter, and why."""
        while True:
            self._news.clear()
            try:
                await self._commit()
                self._can_write.set()
            except ServingError as error:
                # Results stay here until they can be written; until then no more are made.
                self._can_write.clear()
                log.refused(error, during="committing results of a batch")
            if self.batch.state is BatchState.CANCELLING:
                return BatchState.CANCELLED, ""
            if self._clock.unix_ms() >= self.batch.expires_unix_ms:
                return BatchState.EXPIRED, ""
            if feeding.done() and not self._lines and not self._results:
                if isinstance(error := feeding.exception(), batch_files.Damaged):
                    return BatchState.FAILED, str(error)
                if error is not None:
                    raise error
                if self.batch.counts.done == self.batch.counts.lines:
                    return BatchState.COMPLETED, ""
            with suppress(TimeoutError):
                async with asyncio.timeout(RENEW_S):
                    await self._news.wait()

    async def _feed(self) -> None:
        """Start every line that has no result, as there is room for it.

        None is started while one that was waits for better times. So no more wait than had places
        at once, and one.
        """
        try:
            async for number, line in self._requests():
                if number > self._begun:
                    self._begun = number + BEGIN_AHEAD - 1
                    await self._patiently(
                        lambda: self._store.begin(self.batch.batch_id, up_to=self._begun)
                    )
                await self._can_write.wait()
                await self._none_waits.wait()
                place = await self._enter(line.request.model)
                started = _Line(number, line, place)
                task = asyncio.get_running_loop().create_task(self._run_line(started))
                self._lines.add(task)
                task.add_done_callback(lambda task, started=started: self._left(task, started))
        finally:
            self._news.set()

    async def _patiently(self, work: Callable[[], None]) -> None:
        while True:
            try:
                return await asyncio.to_thread(work)
            except ServingError as error:
                log.refused(error, during="running a batch")
                await asyncio.sleep(RENEW_S)

    def _left(self, task: "asyncio.Task[None]", line: _Line) -> None:
        self._lines.discard(task)
        self._leave(line)
        self._news.set()
        if not task.cancelled():
            assert task.exception() is None, "a line's defects become its result"

    async def _stop(self, feeding: "asyncio.Task[None]") -> None:
        """Stop feeding and every line, within one engine step; nothing of them is charged."""
        for task in (feeding, *self._lines):
            task.cancel()
        await asyncio.gather(feeding, *self._lines, return_exceptions=True)

    async def _requests(self) -> AsyncIterator[tuple[int, batch_pb2.BatchLine]]:
        """Lines without a result, from 1; a few are read at a time, off the event loop.

        Raises:
            Damaged: the file is not what was written.
        """
        batch = self.batch
        folder = self._store.folder_of(batch.batch_id)
        found = batch_files.requests(folder, lines=batch.counts.lines, without=self._done)
        while group := await asyncio.to_thread(lambda: list(islice(found, READ_AHEAD))):
            for number, payload in group:
                yield number, batch_pb2.BatchLine.FromString(payload)

    async def _run_line(self, started: _Line) -> None:
        number, line = started.number, started.content
        try:
            result = await self._result_of(started)
        except _Window:
            return  # `_fill_up` says so of every line that has no result.
        except Exception as defect:  # The task's root: the others go on, and this one is free.
            log.crashed(during="a line of a batch", error=defect)
            await self._give_back_all(number)
            result = self._ended(number, line, LineStatus.FAILED, _defect())
        self._results.append(result)
        self._news.set()

    async def _result_of(self, started: _Line) -> LineResult:
        number, line = started.number, started.content
        attempt, faults = 1, 0
        while True:
            request_id = request_id_of(self.batch.batch_id, line=number, attempt=attempt)
            try:
                response, settled = await self._answer(line.request, request_id)
            except DeadlineExceeded as refusal:
                raise _Window from refusal
            except ServingError as refusal:
                if isinstance(refusal, AlreadyServed):
                    await self._give_back(self.batch.tenant_id, request_id)
                    attempt += 1
                elif isinstance(refusal, EngineFault):
                    attempt += 1
                    faults += 1
                can_go_on = attempt <= ATTEMPTS_MAX and faults < FAULTS_MAX and _may_help(refusal)
                if not can_go_on:
                    error = _lost() if isinstance(refusal, AlreadyServed) else refusal
                    return self._ended(number, line, LineStatus.FAILED, error)
                if not isinstance(refusal, AlreadyServed):
                    self._back_off(refusal)
                    await self._wait_outside(started)
            else:
                self._backoff_ms = 0
                return batch_results.succeeded(number, line.custom_id, response, settled)

    async def _answer(
        self, request: pb.GenerateRequest, request_id: str
    ) -> tuple[pb.GenerateResponse, Settled]:
        left_ms = self.batch.expires_unix_ms - self._clock.unix_ms()
        accepted = await self._prepare(
            request,
            self._by,
            request_id=request_id,
            deadline_ms=self._clock.monotonic_ms() + left_ms,
            tier=Tier.BATCH,
        )
        chunks, settled = await self._pipeline.answer(accepted)
        return convert.response_to_wire(request_id, accepted.n, chunks, settled), settled

    async def _wait_outside(self, line: _Line) -> None:
        """Leave the place to other batches' lines until it is worth another try."""
        self._leave(line)
        self._num_waiting += 1
        self._none_waits.clear()
        try:
            line.place = await self._enter(line.content.request.model)
        finally:
            self._num_waiting -= 1
            if not self._num_waiting:
                self._none_waits.set()

    async def _enter(self, model: str) -> int:
        async with self._entering:
            await self._hold_back()
            return await self._room.enter(model)

    def _leave(self, line: _Line) -> None:
        if line.place is not None:
            self._room.leave(line.place)
            line.place = None

    async def _hold_back(self) -> None:
        while (wait_ms := self._not_before_ms - self._clock.monotonic_ms()) > 0:  # noqa: ASYNC110
            await asyncio.sleep(wait_ms / 1000)

    def _back_off(self, refusal: ServingError) -> None:
        """All of the batch waits: at least as long as asked, and twice as long each time."""
        now_ms = self._clock.monotonic_ms()
        if now_ms >= self._not_before_ms:  # Else another line was told the same a moment ago.
            asked_ms = float(refusal.retry_after_ms or 500)
            self._backoff_ms = min(BACKOFF_MS_MAX, max(asked_ms, 2 * self._backoff_ms))
            self._not_before_ms = now_ms + self._backoff_ms

    async def _commit(self) -> None:
        """Make a group of results durable, and see what became of the batch."""
        group = self._results[:GROUP_MAX]
        now_unix_ms, batch_id = self._clock.unix_ms(), self.batch.batch_id
        if group:
            await asyncio.to_thread(self._store.commit, batch_id, group, now_unix_ms=now_unix_ms)
            del self._results[: len(group)]
            for result in group:
                self._done.add(result.line)
            await self._on_progress()
        self.batch = await asyncio.to_thread(self._store.renew, batch_id, now_unix_ms=now_unix_ms)

    async def _fill_up(self, state: BatchState) -> None:
        """Give each line that has none a result that says why. What it was charged is given back.

        A line that had been settled when it was stopped, or when its process died, counts as not
        done: its result is lost.
        """
        if state is BatchState.CANCELLED:
            status, error = LineStatus.CANCELLED, None
        elif state is BatchState.EXPIRED:
            status, error = LineStatus.EXPIRED, _expired()
        else:
            return
        async for number, line in self._requests():
            if number <= self._begun:
                await self._give_back_all(number)
            self._results.append(self._ended(number, line, status, error))
            if len(self._results) == GROUP_MAX:
                await self._commit()
        await self._commit()

    async def _give_back_all(self, number: int) -> None:
        """Whatever attempt of the line was charged."""
        for attempt in range(1, ATTEMPTS_MAX + 1):
            request_id = request_id_of(self.batch.batch_id, line=number, attempt=attempt)
            done = await self._give_back(self.batch.tenant_id, request_id)
            if done is GivenBack.NEVER_RAN:
                break

    def _ended(
        self,
        number: int,
        line: batch_pb2.BatchLine,
        status: LineStatus,
        error: ServingError | None,
    ) -> LineResult:
        return batch_results.ended(
            number,
            line.custom_id,
            request_id=request_id_of(self.batch.batch_id, line=number),
            status=status,
            error=error,
        )

    async def _move(self, state: BatchState, why: str = "") -> None:
        self.batch = await asyncio.to_thread(
            self._store.move,
            self.batch.batch_id,
            state,
            now_unix_ms=self._clock.unix_ms(),
            why=why,
        )
        await self._on_progress()
        log.batch_moved(
            batch_id=self.batch.batch_id,
            tenant_id=self.batch.tenant_id,
            state=state.value,
            lines=self.batch.counts.lines,
            done=self.batch.counts.done,
            why=why or None,
        )


def _may_help(refusal: ServingError) -> bool:
    """Whether the line may succeed if it is tried again.

    What is away comes back. A limit says when to come again; a line that it can never fit into, or
    whose budget is spent, is told no time.
    """
    if isinstance(refusal, LimitExceeded):
        return refusal.retry_after_ms is not None
    return isinstance(refusal, AlreadyServed | EngineFault) or refusal.code is Code.UNAVAILABLE


def _expired() -> ServingError:
    return DeadlineExceeded(
        "The batch's window was over before the line had an answer.",
        why="Batches run on capacity that nobody else wants, within batch.window_h.",
        fix="Submit the lines that are left again.",
    )


def _lost() -> ServingError:
    return EngineFault(
        f"The line was run {ATTEMPTS_MAX} times, and its result was lost each time.",
        why="Each time the frontend died before it was written; nothing is charged.",
        fix="Submit the line again.",
    )


def _defect() -> ServingError:
    return ServingError(
        "An internal error ended the line.",
        why="It was logged; nothing is charged.",
        fix="Tell the operator; submit the line again.",
    )
