"""The thread that owns the file of usage records: it takes batches, stores them, then answers."""

import asyncio
import os
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from headrace.serving import log
from headrace.serving.domain.record import Opening, Settlement
from headrace.serving.domain.usage import Outcome, Usage
from headrace.serving.errors import AlreadyServed, ConfigRefused, MeterUnavailable, ServingError
from headrace.serving.metering import usage_schema as schema
from headrace.serving.metering.usage_schema import RequestKey
from headrace.serving.observe import Metrics

BATCH_MAX = 1024
"""Events of one transaction: about 10 ms, so that nobody waits longer for a neighbour."""
PROBE_S = 1.0
"""How often a file that cannot be written is tried again."""


@dataclass(slots=True, eq=False)
class Event:
    """Something for the writer: an opening, a settlement, or a request to flush or to stop."""

    opening: Opening | None = None
    settlement: Settlement | None = None
    row: Sequence[str | int | None] = ()
    """Of the opening or settlement; made by the caller, so that a defect there stays there."""
    stops: bool = False
    loop: asyncio.AbstractEventLoop | None = None
    finish: Callable[[ServingError | None], None] | None = None
    """Called on `loop` once the event is stored, or refused."""

    @property
    def flushes(self) -> bool:
        return self.opening is None and self.settlement is None


class Checkpoints:
    """The latest usage of every open request. Shared by event loop and writer, under a lock."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._written: dict[RequestKey, int] = {}
        """Completion tokens in the file, of every open request."""
        self._dirty: dict[RequestKey, Usage] = {}

    def began(self, key: RequestKey) -> None:
        with self._lock:
            self._written[key] = 0

    def note(self, key: RequestKey, usage: Usage) -> int:
        """Remember a checkpoint; answers by how many tokens the file lags behind.

        A request that is not open (settled meanwhile) has nothing left to note.
        """
        with self._lock:
            written = self._written.get(key)
            if written is None:
                return 0
            self._dirty[key] = usage
            return usage.completion_tokens - written

    def ended(self, key: RequestKey) -> None:
        with self._lock:
            self._written.pop(key, None)
            self._dirty.pop(key, None)

    def take(self) -> dict[RequestKey, Usage]:
        """Every checkpoint that is not written; the caller writes them or gives them back."""
        with self._lock:
            taken, self._dirty = self._dirty, {}
            for key, usage in taken.items():
                self._written[key] = usage.completion_tokens
            return taken

    def give_back(self, taken: Mapping[RequestKey, Usage]) -> None:
        with self._lock:
            for key, usage in taken.items():
                if key in self._written:
                    self._dirty.setdefault(key, usage)


@dataclass(slots=True, eq=False, kw_only=True)
class Writer:
    """One turn after another until it is told to stop. Only `put` and `hurry` are for others."""

    path: Path
    connection: sqlite3.Connection
    connect: schema.Connect
    checkpoints: Checkpoints
    checkpoint_s: float
    metrics: Metrics
    probe_s: float = PROBE_S
    events: "queue.SimpleQueue[Event]" = field(default_factory=lambda: queue.SimpleQueue[Event]())
    healthy: bool = True
    """Written here, read by the event loop."""
    _late: dict[RequestKey, Settlement] = field(default_factory=dict[RequestKey, Settlement])
    """Settlements that could not be written: at most one for each open request."""
    _why: str = ""
    _identity: tuple[int, int] = (0, 0)
    _flushed_s: float = 0.0
    _probed_s: float = 0.0
    _hurries: bool = False
    _over: bool = False
    _gate: threading.Lock = field(default_factory=threading.Lock)
    """Between a last event and the end of the thread that would answer it."""

    def put(self, event: Event) -> None:
        """Queue an event; it will be answered.

        Raises:
            MeterUnavailable: the writer has stopped.
        """
        with self._gate:
            if self._over:
                raise unavailable(self._why or "this frontend is stopping")
            self.events.put(event)

    def hurry(self) -> None:
        """Ask for the checkpoints to be written now rather than at the next interval."""
        if not self._hurries:
            self._hurries = True
            self.events.put(Event())

    def stop(self) -> None:
        """Store what was put so far, then end; what is put later is refused."""
        with self._gate:
            self._over = True
            self.events.put(Event(stops=True))

    def run(self) -> None:
        self._identity = _identity(self.path)
        try:
            while self._turn():
                pass
        except BaseException as error:
            # A defect of ours: whoever waits must hear of it, and nothing more is accepted.
            self._set_healthy(healthy=False)
            self._why = "the writer stopped"
            log.crashed(during="usage store", error=error)
        finally:
            with self._gate:
                self._over = True
            self._refuse(self._queued(first=None))
            self.connection.close()

    def _turn(self) -> bool:
        """Wait for events or for the checkpoint interval; False once a stop was taken."""
        try:
            pause_s = self.checkpoint_s if self.healthy else min(self.checkpoint_s, self.probe_s)
            batch = self._queued(first=self.events.get(timeout=pause_s))
        except queue.Empty:
            batch = []
        stops = any(event.stops for event in batch)
        try:
            if not self.healthy and (stops or time.monotonic() - self._probed_s >= self.probe_s):
                self._probe()
            if self.healthy:
                self._store(batch)
            else:
                self._refuse(batch)
        except BaseException:
            self._refuse(batch)
            raise
        return not stops

    def _queued(self, first: Event | None) -> list[Event]:
        """What waits, up to one batch; everything when there is no `first`."""
        batch = [first] if first else []
        while first is None or len(batch) < BATCH_MAX:
            try:
                batch.append(self.events.get_nowait())
            except queue.Empty:
                break
        self.metrics.meter_queue(self.events.qsize())
        return batch

    def _store(self, batch: Sequence[Event]) -> None:
        now = time.monotonic()
        asked = any(event.flushes for event in batch)
        due = now - self._flushed_s >= self.checkpoint_s
        taken: dict[RequestKey, Usage] = {}
        if asked or due:
            self._hurries = False
            taken = self.checkpoints.take()
            self._flushed_s = now
        openings = [event for event in batch if event.opening]
        settlements = [event for event in batch if event.settlement]
        refusals: dict[Event, ServingError] = {}
        if openings or settlements or taken:
            try:
                refusals = self._write(openings, taken, settlements)
            except (sqlite3.Error, OSError) as error:
                self.checkpoints.give_back(taken)
                self._why = str(error)
                self._set_healthy(healthy=False)
                self._probed_s = now
                log.meter_unhealthy(why=self._why)
                self._refuse(batch)
                return
            events = len(openings) + len(settlements) + len(taken)
            self.metrics.meter_wrote(seconds=time.monotonic() - now, events=events)
        _answer(batch, refusals)

    def _write(
        self,
        openings: Sequence[Event],
        taken: Mapping[RequestKey, Usage],
        settlements: Sequence[Event],
    ) -> dict[Event, ServingError]:
        """One transaction for everything; answers which events it refused."""
        if _identity(self.path) != self._identity:
            raise FileNotFoundError(f"{self.path} was replaced or removed")
        refusals: dict[Event, ServingError] = {}
        with schema.transaction(self.connection) as execute:
            if openings:
                batch = schema.as_batch([event.row for event in openings])
                cursor = execute(schema.INSERT_OPENINGS, (batch,))
                if cursor.rowcount != len(openings):
                    refusals |= self._used_before(openings, cursor)
            if taken:
                rows = [schema.usage_row(key, usage) for key, usage in taken.items()]
                execute(schema.UPDATE_CHECKPOINTS, (schema.as_batch(rows),))
            if settlements:
                batch = schema.as_batch([event.row for event in settlements])
                cursor = execute(schema.UPDATE_SETTLEMENTS, (batch,))
                if cursor.rowcount != len(settlements):
                    refusals |= self._never_opened(settlements)
        return refusals

    def _used_before(
        self, openings: Sequence[Event], cursor: sqlite3.Cursor
    ) -> dict[Event, ServingError]:
        """The openings that the insert passed over: their key has a row that is not of this batch.

        The rows of one insert have consecutive numbers, the last one being `lastrowid`.
        """
        new_after = (cursor.lastrowid or 0) - cursor.rowcount
        seen: set[RequestKey] = set()
        refusals: dict[Event, ServingError] = {}
        for event in openings:
            assert event.opening
            key = (event.opening.tenant_id, event.opening.request_id)
            (seq,) = self.connection.execute(schema.SELECT_SEQ, key).fetchone()
            if key in seen or cursor.rowcount == 0 or seq <= new_after:
                refusals[event] = _already_served(key[1])
            seen.add(key)
        return refusals

    def _never_opened(self, settlements: Sequence[Event]) -> dict[Event, ServingError]:
        """Settlements without a record.

        The others that changed nothing had been settled before: the first one wins, and a second
        is no error.
        """
        refusals: dict[Event, ServingError] = {}
        for event in settlements:
            assert event.settlement
            key = (event.settlement.tenant_id, event.settlement.request_id)
            if self.connection.execute(schema.SELECT_SEQ, key).fetchone() is None:
                refusals[event] = unavailable(f"request {key[1]!r} has no record")
        return refusals

    def _probe(self) -> None:
        """Open the file anew, and settle what is late, as the write that proves it works."""
        self._probed_s = time.monotonic()
        try:
            self.connection.close()
            self.connection = self.connect(self.path)
            with schema.transaction(self.connection) as execute:
                execute(schema.WRITE_PROBE, ())
                rows = [schema.settlement_row(late) for late in self._late.values()]
                execute(schema.UPDATE_SETTLEMENTS, (schema.as_batch(rows),))
        except (sqlite3.Error, OSError, ConfigRefused) as error:
            self._why = str(error)
            return
        self._identity = _identity(self.path)
        log.meter_healthy(settled_late=len(self._late))
        self._late.clear()
        self._set_healthy(healthy=True)

    def _refuse(self, batch: Sequence[Event]) -> None:
        """Nothing of this batch is stored. Its settlements wait for better times, uncharged."""
        for event in batch:
            if (end := event.settlement) is not None:
                uncharged = replace(end, outcome=Outcome.FAILED, charge_femto=0)
                self._late[end.tenant_id, end.request_id] = uncharged
        self.metrics.meter_refused(events=sum(event.finish is not None for event in batch))
        _answer(batch, {event: unavailable(self._why) for event in batch})

    def _set_healthy(self, *, healthy: bool) -> None:
        self.healthy = healthy
        self.metrics.meter_healthy(healthy=healthy)


def unavailable(why: str) -> MeterUnavailable:
    return MeterUnavailable(
        f"Usage cannot be recorded: {why}.",
        why="Work that is not recorded is not accepted.",
        fix="Retry with jitter. Operator: check the disk under HEADRACE_HOME.",
        retry_after_ms=1000,
    )


def _already_served(request_id: str) -> AlreadyServed:
    return AlreadyServed(
        f"The request_id {request_id!r} was used before.",
        why="A request_id is run and charged at most once.",
        fix="See what it used with `headrace usage --request-id`, or send a fresh request_id.",
        field="request_id",
    )


def _answer(batch: Sequence[Event], refusals: Mapping[Event, ServingError]) -> None:
    """Tell each loop in one call what became of its events."""
    by_loop: dict[asyncio.AbstractEventLoop, list[Event]] = {}
    for event in batch:
        if event.loop is not None:
            by_loop.setdefault(event.loop, []).append(event)
    for loop, events in by_loop.items():
        answers = [(event, refusals.get(event)) for event in events]
        try:
            loop.call_soon_threadsafe(_finish_all, answers)
        except RuntimeError:
            # The loop is closed, so nobody waits any more; what is stored stays stored.
            if not loop.is_closed():
                raise


def _finish_all(answers: Sequence[tuple[Event, ServingError | None]]) -> None:
    for event, refusal in answers:
        if event.finish:
            event.finish(refusal)


def _identity(path: Path) -> tuple[int, int]:
    """Which file the name stands for. Writes to a removed file would succeed, and be lost."""
    status = os.stat(path)
    return status.st_dev, status.st_ino
