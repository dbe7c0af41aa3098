"""One request, from accepted to settled. Knows no transport and no cluster.

    wait for a replica -> open the record -> submit -> chunks … -> settle -> Settled

Every exit settles exactly once: the last token, a client that hung up, a deadline, a fault. A lost
replica is not an exit: its answers go on elsewhere, from the tokens that had arrived, and what is
computed again is never charged.
"""

import asyncio
import secrets
from collections.abc import AsyncGenerator, Coroutine, Mapping
from dataclasses import dataclass

from headrace.serving import log
from headrace.serving.clock import Clock
from headrace.serving.domain.generate import Chunk, Generate, Settled
from headrace.serving.domain.record import Caller, Opening, Settlement
from headrace.serving.domain.usage import Outcome, Price, Usage, nano_of
from headrace.serving.errors import (
    DeadlineExceeded,
    Draining,
    EngineFault,
    Overloaded,
    ServingError,
)
from headrace.serving.metering.meter import Meter
from headrace.serving.observe import Metrics
from headrace.serving.ports import Fleet
from headrace.serving.request_run import Run, is_late
from headrace.serving.tracing import Span, SpanEnd

ATTEMPTS_MAX = 3
"""Replicas one request may use. A request that kills three in a row is likely the cause."""

CHARGED: Mapping[Outcome, bool] = {
    Outcome.OK: True,
    Outcome.BUDGET: True,
    # What was delivered. Before the first token that is nothing, the prompt included.
    Outcome.CANCELLED: True,
    Outcome.DEADLINE: True,
    Outcome.RECOVERED: True,
    # Faults of ours are free, even after part of the answer was delivered.
    Outcome.FAILED: False,
    Outcome.REJECTED: False,
    Outcome.EXPIRED: False,
}
"""The charge policy: whether the delivered usage is charged, by how the request ended."""


class Pipeline:
    """Runs requests. One for each frontend; owned by its event loop."""

    def __init__(self, *, fleet: Fleet, meter: Meter, metrics: Metrics, clock: Clock) -> None:
        self._fleet = fleet
        self._meter = meter
        self._metrics = metrics
        self._clock = clock
        self._settling: set[asyncio.Task[int]] = set()

    async def generate(
        self, request: Generate, *, span: Span | None = None
    ) -> AsyncGenerator[Chunk | Settled]:
        """Stream the answers; the last event is Settled, once the record is durable.

        `span` is ended here, however the request ends.

        A chunk counts as delivered when the caller comes back for the next event; the one in
        flight when the caller goes away is free. Close the generator (`aclosing`) to cancel.

        Raises:
            AlreadyServed, MeterUnavailable, ModelNotFound, Overloaded: before any work.
            DeadlineExceeded: what was delivered is charged.
            EngineFault: every replica tried was lost, or the engine refused; not charged.
        """
        run = await self._begin_or_refuse(request, span)
        ending, error = Outcome.FAILED, None
        try:
            while not run.is_finished:
                for chunk in await self._next_chunks(run):
                    yield chunk
                    self._delivered(run, chunk)
            ending = Outcome.OK
        except (GeneratorExit, asyncio.CancelledError):
            ending = self._ending_of_leaver(request)
            raise
        except ServingError as reason:
            ending, error = outcome_of(reason), reason
            raise
        finally:
            run.stop()
            charge_nano = await self._settle(run, ending, error)
        yield run.settled(charge_nano)

    async def answer(
        self, request: Generate, *, span: Span | None = None
    ) -> tuple[list[Chunk], Settled]:
        """The same as one message: nothing is delivered, or charged, before all of it is here.

        Raises: as `generate`.
        """
        run = await self._begin_or_refuse(request, span)
        ending, error = Outcome.FAILED, None
        chunks: list[Chunk] = []
        try:
            while not run.is_finished:
                chunks += await self._next_chunks(run)
                if chunks and run.ttft_ms is None:
                    self._begun_answering(run)
            for chunk in chunks:
                run.tally.delivered(chunk)
            ending = Outcome.OK
        except asyncio.CancelledError:
            ending = self._ending_of_leaver(request)
            raise
        except ServingError as reason:
            ending, error = outcome_of(reason), reason
            raise
        finally:
            run.stop()
            charge_nano = await self._settle(run, ending, error)
        return chunks, run.settled(charge_nano)

    async def refuse(self, refusal: "Refusal") -> None:
        """Leave a record of a request that never ran; charges nothing.

        Waits until it is durable, or until the caller is gone: then it is written all the same. A
        meter that cannot write is logged and otherwise ignored, since nothing was used.
        """
        await asyncio.wait({self._keep(self._write_refusal(refusal))})

    async def wait_settled(self) -> None:
        """Wait for settlements whose callers are gone."""
        while self._settling:
            await asyncio.wait(self._settling)

    async def _begin_or_refuse(self, request: Generate, span: Span | None) -> Run:
        try:
            return await self._begin(request, span)
        except ServingError as error:
            ending = outcome_of(error)
            if span is not None:
                span.end(SpanEnd(outcome=ending, usage=Usage(), error=error))
            await self.refuse(refusal_of(request, ending))
            raise

    async def _begin(self, request: Generate, span: Span | None) -> Run:
        """Everything that can refuse comes before the record is opened, but the record itself."""
        try:
            placement = await self._fleet.place(request)
        except asyncio.CancelledError:
            ending = self._ending_of_leaver(request)
            if span is not None:
                span.end(SpanEnd(outcome=ending, usage=Usage()))
            self._keep(self._write_refusal(refusal_of(request, ending)))
            raise
        opening = Opening(
            tenant_id=request.caller.tenant_id,
            request_id=request.request_id,
            key_id=request.caller.key_id,
            model=request.model,
            version=placement.replica.version,
            price=request.price,
            accepted_unix_ms=request.accepted_unix_ms,
            tier=request.tier,
            idempotency_digest=request.idempotency_digest,
        )
        run = Run(
            request,
            placement,
            clock=self._clock,
            metrics=self._metrics.model(request.model),
            span=span,
        )
        opened = asyncio.ensure_future(self._meter.open(opening))
        try:
            await asyncio.shield(opened)
        except asyncio.CancelledError:
            # The record may exist by the time the caller is gone, so it is closed behind it.
            self._keep(self._settle_after(opened, run, self._ending_of_leaver(request)))
            raise
        run.start()
        return run

    async def _next_chunks(self, run: Run) -> list[Chunk]:
        """What arrived, in order of the answers; survives lost replicas."""
        inbox = run.inbox
        arrived = await inbox.take()
        if arrived:
            chunks = (run.chunk(index, arrived[index]) for index in sorted(arrived))
            return [chunk for chunk in chunks if chunk is not None]
        if inbox.has_expired:
            raise DeadlineExceeded(
                "The deadline passed before the answer was complete.",
                why=f"{run.tally.usage.completion_tokens} tokens had been delivered by then.",
                fix="Allow more time, or ask for fewer tokens.",
            )
        await self._fail_over(run)
        return []

    async def _fail_over(self, run: Run) -> None:
        """Go on elsewhere, from what has arrived. Called with an empty inbox: see Inbox.take."""
        departure = run.leave_replica()
        refusal = departure.refusal
        if refusal is not None and not isinstance(refusal, _MOVABLE):
            raise refusal
        # A replica that is full says it better than we can, unless part of the answer is out.
        end: ServingError = _exhausted(run.replicas_tried, departure.why)
        if isinstance(refusal, Overloaded | Draining) and run.delivered_ms is None:
            end = refusal
        if run.replicas_tried >= ATTEMPTS_MAX:
            raise end
        try:
            run.placement = await self._fleet.place(run.request, without=run.left)
        except Overloaded as none_left:
            raise end from none_left
        resumed = run.submit()
        run.replicas_tried += 1
        run.metrics.failed_over()
        log.failed_over(
            request_id=run.request.request_id,
            from_replica=departure.replica_id,
            to_replica=run.placement.replica.replica_id,
            resumed_tokens=resumed,
        )

    def _delivered(self, run: Run, chunk: Chunk) -> None:
        """The caller has `chunk`: count it, time it, and let the meter know."""
        now_ms = self._clock.monotonic_ms()
        if run.delivered_ms is None:
            self._begun_answering(run)
        else:
            run.metrics.inter_token((now_ms - run.delivered_ms) / 1000)
        run.delivered_ms = now_ms
        run.tally.delivered(chunk)
        self._meter.checkpoint(
            tenant_id=run.request.caller.tenant_id,
            request_id=run.request.request_id,
            usage=chunk.usage,
        )

    def _begun_answering(self, run: Run) -> None:
        run.first_token_unix_ms = self._clock.unix_ms()
        run.ttft_ms = self._clock.monotonic_ms() - run.request.accepted_ms
        run.metrics.first_token(run.ttft_ms / 1000)
        if run.span is not None:
            run.span.first_token(run.ttft_ms / 1000)

    def _ending_of_leaver(self, request: Generate) -> Outcome:
        """How a request ended whose caller is gone."""
        was_late = is_late(request.deadline_ms, now_ms=self._clock.monotonic_ms())
        return Outcome.DEADLINE if was_late else Outcome.CANCELLED

    async def _settle(self, run: Run, ending: Outcome, error: ServingError | None) -> int:
        """Close the record, whatever happens to the caller's task meanwhile.

        Only a whole answer fails when its record cannot be written: its final message must not
        go out. The other endings have told the caller already; the meter settles them later.
        """
        if run.span is not None:
            run.span.end(
                SpanEnd(
                    outcome=ending,
                    usage=run.tally.usage,
                    finish_reasons=[run.finishes[index].value for index in sorted(run.finishes)],
                    version=run.placement.replica.version,
                    replicas_tried=run.replicas_tried,
                    error=error,
                )
            )
        task = self._keep(self._write_settlement(run, ending))
        if ending is Outcome.OK:
            return await asyncio.shield(task)
        await asyncio.wait({task})
        return 0

    async def _write_refusal(self, refusal: "Refusal") -> int:
        now_ms = self._clock.unix_ms()
        record_id = f"{refusal.request_id}#{secrets.token_hex(8)}"
        await self._meter.open(
            Opening(
                tenant_id=refusal.caller.tenant_id,
                request_id=record_id,
                key_id=refusal.caller.key_id,
                model=refusal.model,
                version="",
                price=refusal.price,
                accepted_unix_ms=now_ms,
            )
        )
        await self._meter.settle(
            Settlement(
                tenant_id=refusal.caller.tenant_id,
                request_id=record_id,
                usage=Usage(),
                outcome=refusal.ending,
                charge_femto=0,
                version="",
                first_token_unix_ms=None,
                settled_unix_ms=now_ms,
                replicas_tried=0,
            )
        )
        return 0

    async def _settle_after(self, opened: "asyncio.Future[None]", run: Run, ending: Outcome) -> int:
        try:
            await opened
        except ServingError:
            return 0
        if run.span is not None:
            run.span.end(SpanEnd(outcome=ending, usage=Usage()))
        return await self._write_settlement(run, ending)

    def _keep(self, work: Coroutine[None, None, int]) -> asyncio.Task[int]:
        """Run `work` to its end even if nobody waits for it."""
        task = asyncio.get_running_loop().create_task(work)
        self._settling.add(task)
        task.add_done_callback(self._settled)
        return task

    def _settled(self, task: asyncio.Task[int]) -> None:
        self._settling.discard(task)
        if not task.cancelled() and (error := task.exception()):
            if isinstance(error, ServingError):
                log.refused(error, during="settle")
            else:
                log.crashed(during="settle", error=error)

    async def _write_settlement(self, run: Run, ending: Outcome) -> int:
        request, usage = run.request, run.tally.usage
        charge_femto = request.price.charge_femto(usage) if CHARGED[ending] else 0
        charge_nano = nano_of(charge_femto)
        await self._meter.settle(
            Settlement(
                tenant_id=request.caller.tenant_id,
                request_id=request.request_id,
                usage=usage,
                outcome=ending,
                charge_femto=charge_femto,
                version=run.placement.replica.version,
                first_token_unix_ms=run.first_token_unix_ms,
                settled_unix_ms=self._clock.unix_ms(),
                replicas_tried=run.replicas_tried,
            )
        )
        run.metrics.settled(ending, usage)
        log.request_settled(
            request_id=request.request_id,
            tenant_id=request.caller.tenant_id,
            key_id=request.caller.key_id,
            model=request.model,
            outcome=ending,
            usage=usage,
            charge_nano=charge_nano,
            ttft_ms=run.ttft_ms,
            duration_ms=self._clock.monotonic_ms() - request.accepted_ms,
            replicas_tried=run.replicas_tried,
            replica_id=run.placement.replica.replica_id,
            picked=run.placement.why,
        )
        return charge_nano


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A request that ended before it was opened.

    Its record's id is the request_id with a suffix that no caller can send: the request_id itself
    stays unused, so that the retry a refusal asks for is not taken for a replay.
    """

    caller: Caller
    request_id: str
    """As far as it was valid; empty otherwise."""
    model: str
    price: Price
    ending: Outcome


def refusal_of(request: Generate, ending: Outcome) -> Refusal:
    return Refusal(
        caller=request.caller,
        request_id=request.request_id,
        model=request.model,
        price=request.price,
        ending=ending,
    )


_MOVABLE = (EngineFault, Overloaded, Draining)
"""What another replica might do better."""


def outcome_of(error: ServingError) -> Outcome:
    """The label of a request that ended with `error`."""
    match error:
        case DeadlineExceeded():
            return Outcome.DEADLINE
        case EngineFault():
            return Outcome.FAILED
        case _ if type(error) is ServingError:
            return Outcome.FAILED
        case _:
            return Outcome.REJECTED


def _exhausted(tried: int, why: str) -> EngineFault:
    return EngineFault(
        f"The request was lost by {tried} replica{'s' if tried > 1 else ''}.",
        why=f"The last one: {why}." if why else "None is left to go on with it.",
        fix="Send it again with a new request_id; this one was not charged.",
    )
