"""One request, from accepted to settled. Knows no transport and no cluster.

    reserve of the caller's limits -> wait for a replica -> open the record -> submit -> chunks …
    -> settle -> Settled

Every exit settles exactly once: the last token, a client that hung up, a deadline, a fault. A lost
replica is not an exit: its answers go on elsewhere, from the tokens that had arrived, and what is
computed again is never charged.
"""

import asyncio
import secrets
from collections.abc import AsyncGenerator, Coroutine

from headrace.serving import log
from headrace.serving.admission.quota import Quota
from headrace.serving.admission.quota_hold import Hold
from headrace.serving.clock import Clock
from headrace.serving.domain.generate import Chunk, Generate, Settled
from headrace.serving.domain.record import Opening, Refused, Settlement
from headrace.serving.domain.usage import Outcome, Usage, nano_of
from headrace.serving.domain.verdict import Measured
from headrace.serving.endings import Refusal, exhausted, outcome_of
from headrace.serving.errors import (
    AlreadyServed,
    DeadlineExceeded,
    Draining,
    EngineFault,
    MeterUnavailable,
    Overloaded,
    ServingError,
)
from headrace.serving.metering import outcomes
from headrace.serving.metering.meter import Meter
from headrace.serving.observe import Metrics
from headrace.serving.ports import Fleet, Tiers
from headrace.serving.receipts import receipt_of
from headrace.serving.request_run import Run, is_late
from headrace.serving.tracing import Span, SpanEnd

ATTEMPTS_MAX = 3
"""Replicas one request may use. A request that kills three in a row is likely the cause."""


class Pipeline:
    """Runs requests. One for each frontend; owned by its event loop."""

    def __init__(
        self,
        *,
        fleet: Fleet,
        meter: Meter,
        metrics: Metrics,
        clock: Clock,
        tiers: Tiers | None = None,
        quota: Quota | None = None,
    ) -> None:
        """Without `tiers` no capacity is held for anyone; without a `quota` nobody has limits."""
        self._quota = quota or Quota(clock=clock)
        self._fleet = fleet
        self._tiers = tiers
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
            LimitExceeded, QuotaUnavailable: a limit of the caller's, before any work. A hard
                budget that is spent later is no error: the answers finish with BUDGET.
            DeadlineExceeded: what was delivered is charged.
            EngineFault: every replica tried was lost, or the engine refused; not charged.
        """
        run = await self._begin_or_refuse(request, span)
        ending, error = Outcome.FAILED, None
        try:
            run.start()
            while not run.is_finished:
                for chunk in await self._next_chunks(run):
                    yield chunk
                    self._delivered(run, chunk)
            ending = _whole(run)
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
            run.start()
            while not run.is_finished:
                for chunk in await self._next_chunks(run):
                    self._time(run, chunk)
                    chunks.append(chunk)
            for chunk in chunks:
                run.tally.delivered(chunk)
            ending = _whole(run)
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

    async def refuse(self, refusal: Refusal) -> None:
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
            await self.refuse(self._refusal_of(request, ending, error))
            # Of a record that is known, or that could not be written, that is not certain.
            error.left_no_record = not isinstance(error, AlreadyServed | MeterUnavailable)
            raise

    async def _begin(self, request: Generate, span: Span | None) -> Run:
        """Everything that can refuse comes before the record is opened, but the record itself."""
        if self._tiers is None:
            return await self._open(request, span)
        entry = self._tiers.enter(request)
        try:
            run = await self._open(entry.request, span)
        except BaseException:
            entry.leave()
            raise
        run.on_stop(entry.leave)
        return run

    async def _open(self, request: Generate, span: Span | None) -> Run:
        hold: Hold | None = None
        try:
            hold = await self._quota.admit(request)
            placement = await self._fleet.place(request)
        except BaseException as error:
            if hold is not None:
                hold.release()
            if isinstance(error, asyncio.CancelledError):
                ending = self._ending_of_leaver(request)
                if span is not None:
                    span.end(SpanEnd(outcome=ending, usage=Usage()))
                self._keep(self._write_refusal(self._refusal_of(request, ending)))
            raise
        opening = Opening(
            tenant_id=request.caller.tenant_id,
            request_id=request.request_id,
            project_id=request.caller.project_id,
            key_id=request.caller.key_id,
            model=request.model,
            version=placement.replica.version,
            price=request.price,
            accepted_unix_ms=request.accepted_unix_ms,
            tier=request.terms.tier_asked,
            hold_femto=request.hold_femto,
            idempotency_digest=request.idempotency_digest,
        )
        run = Run(
            request,
            placement,
            hold=hold,
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
        except BaseException:
            hold.release()
            raise
        return run

    async def _next_chunks(self, run: Run) -> list[Chunk]:
        """What arrived, in order of the answers; survives lost replicas."""
        inbox = run.inbox
        arrived = await inbox.take()
        if arrived:
            chunks = (run.chunk(index, arrived[index]) for index in sorted(arrived))
            return await run.covered([chunk for chunk in chunks if chunk is not None])
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
        end: ServingError = exhausted(run.replicas_tried, departure.why)
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
        now_ms = self._time(run, chunk)
        if run.delivered_ms is not None:
            run.metrics.inter_token((now_ms - run.delivered_ms) / 1000)
        run.delivered_ms = now_ms
        run.tally.delivered(chunk)
        self._meter.checkpoint(
            tenant_id=run.request.caller.tenant_id,
            request_id=run.request.request_id,
            usage=chunk.usage,
        )

    def _time(self, run: Run, chunk: Chunk) -> float:
        """Note when `chunk` came to the gateway's edge, which is now."""
        now_ms = self._clock.monotonic_ms()
        is_first = run.ttft_ms is None
        run.stopwatch.chunk(chunk.index, now_ms)
        if is_first and run.ttft_ms is not None:
            run.first_token_unix_ms = self._clock.unix_ms()
            run.metrics.first_token(run.ttft_ms / 1000)
            if run.span is not None:
                run.span.first_token(run.ttft_ms / 1000)
        return now_ms

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
        if ending is Outcome.BUDGET:
            self._quota.over_budget(run.hold)
        task = self._keep(self._write_settlement(run, ending, error))
        if ending in (Outcome.OK, Outcome.BUDGET):
            return await asyncio.shield(task)
        await asyncio.wait({task})
        return 0

    def _refusal_of(
        self, request: Generate, ending: Outcome, error: ServingError | None = None
    ) -> Refusal:
        elapsed_ms = self._clock.monotonic_ms() - request.accepted_ms
        measured = Measured(elapsed_us=round(elapsed_ms * 1000))
        return Refusal(
            caller=request.caller,
            request_id=request.request_id,
            model=request.model,
            price=request.price,
            ending=ending,
            tier=request.terms.tier_asked,
            receipt=receipt_of(request.terms, measured, ending, error),
        )

    async def _write_refusal(self, refusal: Refusal) -> int:
        await self._meter.refuse(
            Refused(
                tenant_id=refusal.caller.tenant_id,
                project_id=refusal.caller.project_id,
                request_id=f"{refusal.request_id}#{secrets.token_hex(8)}",
                key_id=refusal.caller.key_id,
                model=refusal.model,
                price=refusal.price,
                outcome=refusal.ending,
                refused_unix_ms=self._clock.unix_ms(),
                tier=refusal.tier,
                receipt=refusal.receipt,
            )
        )
        return 0

    async def _settle_after(self, opened: "asyncio.Future[None]", run: Run, ending: Outcome) -> int:
        if run.span is not None:
            run.span.end(SpanEnd(outcome=ending, usage=Usage()))
        try:
            await opened
        except BaseException:
            run.hold.release()
            raise
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

    async def _write_settlement(
        self, run: Run, ending: Outcome, error: ServingError | None = None
    ) -> int:
        request, usage = run.request, run.tally.usage
        measured = run.stopwatch.measured(self._clock.monotonic_ms())
        run.receipt = receipt_of(request.terms, measured, ending, error)
        charge_femto = outcomes.charge_femto(request.price, usage, ending)
        charge_nano = nano_of(charge_femto)
        settlement = Settlement(
            tenant_id=request.caller.tenant_id,
            request_id=request.request_id,
            usage=usage,
            outcome=ending,
            charge_femto=charge_femto,
            version=run.placement.replica.version,
            first_token_unix_ms=run.first_token_unix_ms,
            settled_unix_ms=self._clock.unix_ms(),
            replicas_tried=run.replicas_tried,
            receipt=run.receipt,
        )
        try:
            await self._meter.settle(settlement)
        except BaseException:
            # The log's next writer settles what the disk has: the last checkpoint, as recovered,
            # however this ended. A budget that paid less could be spent twice.
            recovered_femto = outcomes.charge_femto(request.price, usage, Outcome.RECOVERED)
            run.hold.settle(usage=usage, outcome=Outcome.RECOVERED, charge_femto=recovered_femto)
            raise
        run.hold.settle(usage=usage, outcome=ending, charge_femto=charge_femto)
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


_MOVABLE = (EngineFault, Overloaded, Draining)
"""What another replica might do better."""


def _whole(run: Run) -> Outcome:
    """How a request ended whose answers are all out: by themselves, or where the money did."""
    return Outcome.BUDGET if run.is_over_budget else Outcome.OK
