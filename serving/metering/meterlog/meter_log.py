"""The meter of one frontend: every request held before any work, settled before its final message.

What it promises:

* What was acknowledged is durable: it survives a killed process and a power cut.
* Every hold ends exactly once. One that a dead frontend left open is settled at its last
  checkpoint, at the price that was frozen when it was accepted, before the next frontend on this
  folder accepts anything; without a checkpoint it expires. So a crash never over-bills, and
  under-bills by less than one checkpoint interval a stream.
* Work that cannot be recorded is refused before it is accepted. What was accepted is settled even
  when the disk is full. When the disk fails, nothing is acknowledged any more, for good: the
  process should end, and the next one finds out what the disk has.
"""

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from headrace.serving import log
from headrace.serving.clock import Clock
from headrace.serving.config_metering import MeterConfig
from headrace.serving.domain.record import Adjustment, Grant, Opening, Refused, Settlement
from headrace.serving.domain.usage import Outcome, Usage
from headrace.serving.errors import MeterUnavailable, ServingError
from headrace.serving.metering.meterlog import events
from headrace.serving.metering.meterlog.files import Files, LocalFiles
from headrace.serving.metering.meterlog.folder import LogFolder
from headrace.serving.metering.meterlog.holds import USAGE_BYTES_MAX
from headrace.serving.metering.meterlog.journal import Effect
from headrace.serving.metering.meterlog.recovery import begin_epoch, recover
from headrace.serving.metering.meterlog.refusals import already_served, too_many, unavailable
from headrace.serving.metering.meterlog.writer import (
    PROBE_S,
    Checkpoints,
    Entry,
    Wish,
    Writer,
)
from headrace.serving.observe import Metrics

DEFAULTS = MeterConfig()

RequestKey = tuple[str, str]
"""Tenant and request id."""


@dataclass(slots=True, eq=False)
class _Request:
    """A request that the ledger does not know yet, or that is open."""

    key: RequestKey
    num_bytes: int
    """What its hold takes in a Carry."""
    hold: int = 0
    """0 until its Reserve is durable."""
    is_ending: bool = False
    """Its end is on its way to the disk, or there."""


@dataclass(slots=True, eq=False)
class _Event(Entry):
    """An entry with somebody who awaits its number."""

    request: _Request | None = None
    done: "asyncio.Future[int] | None" = None


class MeterLog:
    """The `Meter` of one frontend process. Its methods belong to one event loop."""

    def __init__(
        self,
        folder: Path,
        *,
        clock: Clock,
        epoch: str,
        was_used: Callable[[str, str], bool],
        config: MeterConfig = DEFAULTS,
        version: str = "",
        metrics: Metrics | None = None,
        on_failed: Callable[[str], None] = lambda _: None,
        probe_s: float = PROBE_S,
        files: Files | None = None,
        start: "Callable[[Writer], Callable[[], None]] | None" = None,
    ) -> None:
        """Take the folder, close what a dead frontend left open, start the writer. Blocks.

        Args:
            folder: made when missing; on a local disk, as network file systems lock unreliably.
            clock: of records and of the age of segments.
            epoch: names this life of this process; best a fresh random one at every start.
            was_used: whether a tenant's request id is known to the ledger. Called on the event
                loop for every opening, so it answers from memory or from an index.
            config: the bounds.
            version: of this build, for the record of the epoch.
            metrics: None keeps them to itself.
            on_failed: called once, on the writer's thread, when the log has failed for good.
            probe_s: how often a full disk is asked for room.
            files: None is the local file system.
            start: runs the writer and answers what waits for its end; None is a thread.

        Raises:
            ConfigRefused: another process writes this log.
            MeterLogDamaged: a record that was durable is damaged or missing.
            MeterUnavailable: the folder cannot be written.
        """
        self._folder = LogFolder(folder, files or LocalFiles())
        self._clock, self._was_used, self._config = clock, was_used, config
        self._open_bytes_max = config.segment_bytes // 4
        self._waiting = 0
        self._open_bytes = 0
        self._closed = False
        self._requests: dict[RequestKey, _Request] = {}
        self._ended: deque[tuple[int, RequestKey]] = deque()
        """Ends that are durable and that the ledger may not have yet, in order."""
        self._projected_seq = 0
        self._checkpoints = Checkpoints()
        try:
            self._unlock = self._folder.lock()
        except OSError as error:
            raise unavailable(str(error)) from error
        try:
            self.log_id = self._folder.make_log_id()
            journal = recover(self._folder, clock=clock, config=config)
            self.recovered = begin_epoch(journal, epoch=epoch, version=version, clock=clock)
            """Holds of dead frontends that were closed at this start."""
        except OSError as error:
            self._unlock()
            raise unavailable(str(error)) from error
        except BaseException:
            self._unlock()
            raise
        self._writer = Writer(
            journal=journal,
            checkpoints=self._checkpoints,
            checkpoint_s=config.checkpoint_s,
            clock=clock,
            metrics=metrics or Metrics(),
            on_failed=on_failed,
            durable_seq=journal.next_seq - 1,
            probe_s=probe_s,
        )
        self._writer.keep_spare()
        self._join = (start or _in_thread)(self._writer)

    @property
    def healthy(self) -> bool:
        """False while no work is accepted: the disk is full, or has failed, or this is closed."""
        return not (self._writer.has_failed or self._writer.is_full or self._closed)

    @property
    def has_failed(self) -> bool:
        """True once nothing can be recorded any more: this process should end."""
        return self._writer.has_failed

    @property
    def durable_seq(self) -> int:
        """The last record that is durable. Any thread may ask."""
        return self._writer.durable_seq

    def on_durable(self, call: Callable[[int], None]) -> None:
        """Call `call` with the new `durable_seq` after every batch, on the writer's thread.

        One at most; it must return at once and must not raise: it may set an event.
        """
        self._writer.on_durable = call

    def projected(self, seq: int) -> None:
        """The ledger has every record up to `seq`, so that `was_used` knows its requests.

        Any thread may say so; the requests are released by the next opening.
        """
        self._projected_seq = max(self._projected_seq, seq)

    async def open(self, opening: Opening) -> None:
        """See `Meter.open`. A caller that is cancelled meanwhile leaves a cancelled record.

        Raises:
            InvalidRequest: an id is not printable, an amount negative or too large.
            AlreadyServed, MeterUnavailable: see `Meter.open`.
        """
        self._check_accepting()
        key = (opening.tenant_id, opening.request_id)
        if key in self._requests or self._was_used(*key):
            raise already_served(opening.request_id)
        payload = events.reserve(opening, unix_ms=self._clock.unix_ms())
        request = _Request(key, len(payload) + USAGE_BYTES_MAX)
        if self._open_bytes + request.num_bytes > self._open_bytes_max:
            raise too_many(
                f"{self._open_bytes:,} bytes of requests are open.",
                why="A segment of the meter log carries at most a quarter of its size on.",
                fix="Retry with jitter. Operator: raise meter.segment_bytes, or add a frontend.",
            )
        event = _Event(payload, Effect.BEGINS, request=request)
        done = self._put(event)
        self._requests[key] = request
        self._open_bytes += request.num_bytes
        try:
            await done
        except asyncio.CancelledError:
            # Either the event is still on its way, and `_finished` will see the cancelled future;
            # or it was stored in the moment of the cancellation, and its hold is ours to end.
            if not done.cancelled() and done.exception() is None:
                self._abandon(request)
            raise

    def checkpoint(self, *, tenant_id: str, request_id: str, usage: Usage) -> None:
        """See `Meter.checkpoint`. 0.5 us: it may be called for every chunk.

        Raises:
            AmountOutOfRange: the usage passes 64 bits.
        """
        request = self._requests.get((tenant_id, request_id))
        if request is None or request.is_ending:
            return
        events.check_usage(usage)
        if self._checkpoints.note(request.hold, usage) >= self._config.checkpoint_tokens:
            self._writer.hurry()

    async def settle(self, settlement: Settlement) -> None:
        """See `Meter.settle`. Not bounded by the queue: it ends work that was accepted.

        Raises:
            InvalidRequest: an amount is negative or too large.
            MeterUnavailable: there is no hold for it, or see `Meter.settle`.
        """
        key = (settlement.tenant_id, settlement.request_id)
        request = self._requests.get(key)
        if request is None and self._was_used(*key):
            return  # Settled so long ago that only the ledger knows.
        if request is None or not request.hold:
            raise unavailable(f"request {settlement.request_id!r} has no hold")
        if request.is_ending:
            # The first one wins. The queue keeps its order: after this, that one is durable.
            await self.flush()
            return
        payload = events.settle(settlement, hold=request.hold, unix_ms=self._clock.unix_ms())
        await self._end(request, payload)

    async def refuse(self, refused: Refused) -> None:
        """See `Meter.refuse`.

        Raises:
            InvalidRequest: an id is not printable.
            MeterUnavailable: see `Meter.refuse`.
        """
        self._check_accepting()
        await self._put(_Event(events.refuse(refused, unix_ms=self._clock.unix_ms())))

    async def adjust(self, adjustment: Adjustment) -> int:
        """Record a correction; answers its sequence number once it is durable.

        The ledger applies an `adjustment_id` once, however often it is recorded.

        Raises:
            InvalidRequest: a text is not printable, or the amount passes 64 bits.
            MeterUnavailable: it cannot be recorded.
        """
        self._check_accepting()
        return await self._put(_Event(events.adjust(adjustment, unix_ms=self._clock.unix_ms())))

    async def grant(self, granted: Grant) -> int:
        """Record credit, or a slice of a budget; answers its number once it is durable.

        Raises: as `adjust`.
        """
        self._check_accepting()
        return await self._put(_Event(events.grant(granted, unix_ms=self._clock.unix_ms())))

    async def flush(self) -> None:
        """Return once every checkpoint noted so far is durable.

        Raises:
            MeterUnavailable: the log has failed, or is closed.
        """
        await self._put(_Event(b"", wish=Wish.FLUSH))

    def close(self) -> None:
        """Write what is queued, then stop. Blocks for at most a few batches; idempotent.

        Holds that are still open then are closed by the next start.
        """
        if not self._closed:
            self._closed = True
            self._writer.stop()
            self._join()
            self._unlock()

    def _check_accepting(self) -> None:
        """Whether new work may be recorded.

        Raises:
            MeterUnavailable: it may not, or not now.
        """
        writer = self._writer
        if writer.has_failed:
            raise unavailable(writer.why)
        if writer.is_full:
            raise unavailable("disk full: there is no room for another segment")
        if self._waiting >= self._config.queue_max:
            raise too_many(
                f"{self._waiting:,} usage events are waiting for the disk.",
                why=f"The queue holds {self._config.queue_max:,}; beyond it one would only wait.",
                fix="Retry with jitter. Operator: see headrace_meter_write_seconds.",
            )
        while self._ended and self._ended[0][0] <= self._projected_seq:
            self._requests.pop(self._ended.popleft()[1], None)
        if len(self._requests) >= self._config.unprojected_max:
            raise too_many(
                f"The ledger lags behind by {len(self._requests):,} requests.",
                why="More cannot be remembered, and a request id is used only once.",
                fix="Retry with jitter. Operator: check the ledger's database.",
            )

    def _put(self, event: _Event) -> "asyncio.Future[int]":
        """Queue the event; the answer is its number, or why it was refused."""
        loop = asyncio.get_running_loop()
        event.done = done = loop.create_future()
        event.loop, event.finish = loop, self._finished
        self._writer.put(event)
        self._waiting += 1
        return done

    def _end(self, request: _Request, payload: bytes) -> "asyncio.Future[int]":
        done = self._put(_Event(payload, Effect.ENDS, request.hold, request=request))
        request.is_ending = True
        self._checkpoints.ended(request.hold)
        return done

    def _finished(self, event: Entry, refusal: ServingError | None) -> None:
        """The writer's answer, on the event loop."""
        assert isinstance(event, _Event)
        assert event.done is not None
        self._waiting -= 1
        request = event.request
        if request is not None and event.effect is Effect.BEGINS:
            self._began(request, event, refusal)
        elif request is not None and refusal is None:
            self._open_bytes -= request.num_bytes
            self._ended.append((event.seq, request.key))
        if event.done.done():
            return
        if refusal is None:
            event.done.set_result(event.seq)
        else:
            event.done.set_exception(refusal)

    def _began(self, request: _Request, event: _Event, refusal: ServingError | None) -> None:
        assert event.done is not None
        if refusal is not None:
            del self._requests[request.key]
            self._open_bytes -= request.num_bytes
            return
        request.hold = event.seq
        self._checkpoints.began(event.seq)
        if event.done.cancelled():
            self._abandon(request)

    def _abandon(self, request: _Request) -> None:
        """Its caller went away before it learned of its hold, so nothing was delivered."""
        now = self._clock.unix_ms()
        settlement = Settlement(
            tenant_id=request.key[0],
            request_id=request.key[1],
            usage=Usage(),
            outcome=Outcome.CANCELLED,
            charge_femto=0,
            version="",
            first_token_unix_ms=None,
            settled_unix_ms=now,
            replicas_tried=0,
        )
        try:
            done = self._end(request, events.settle(settlement, hold=request.hold, unix_ms=now))
        except MeterUnavailable as error:
            # The log was closed in this moment; the next start expires the hold, uncharged.
            log.refused(error, during="stopping")
        else:
            done.add_done_callback(_heard)


def _in_thread(writer: Writer) -> Callable[[], None]:
    thread = threading.Thread(target=writer.run, name="meter-log", daemon=True)
    thread.start()
    return thread.join


def _heard(done: "asyncio.Future[int]") -> None:
    """Nobody awaits it: the log has said itself why it failed."""
    if not done.cancelled():
        done.exception()
