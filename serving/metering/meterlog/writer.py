"""The thread that owns the write end of the log: it takes what waits, makes it durable, answers.

Alone, an event waits for one fdatasync; under load, hundreds share one (group commit). Nothing
lingers to make a batch larger.

It fails once and for good: after an error of the disk everything that waits is refused, whoever is
responsible for the process is told, and the thread ends. A full disk is no such error. It is seen
before anything is lost, as the room for the next segment is set aside beforehand.
"""

import asyncio
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from headrace.serving import log
from headrace.serving.clock import Clock
from headrace.serving.domain.usage import Usage
from headrace.serving.errors import ServingError
from headrace.serving.metering.meterlog import events
from headrace.serving.metering.meterlog.journal import Effect, Journal, Record
from headrace.serving.metering.meterlog.refusals import unavailable
from headrace.serving.observe import Metrics

BATCH_MAX = 1024
"""Events of one write: about 10 ms of work, so that nobody waits longer for a neighbour."""
PROBE_S = 1.0
"""How often a full disk is asked for the room of a segment."""


class Wish(IntEnum):
    """What an entry without a record asks for."""

    NONE = 0
    FLUSH = 1
    """Write every checkpoint that was noted."""
    STOP = 2


@dataclass(slots=True, eq=False)
class Entry(Record):
    """Something for the writer, and who is to hear what became of it."""

    wish: Wish = Wish.NONE
    loop: asyncio.AbstractEventLoop | None = None
    finish: "Callable[[Entry, ServingError | None], None] | None" = None
    """Called on `loop` once the record is durable, or refused."""


class Checkpoints:
    """The latest usage of every open hold. Shared by event loop and writer, under a lock."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._written: dict[int, int] = {}
        """Completion tokens in the log, of every open hold."""
        self._dirty: dict[int, Usage] = {}

    def began(self, hold: int) -> None:
        with self._lock:
            self._written[hold] = 0

    def note(self, hold: int, usage: Usage) -> int:
        """Remember a checkpoint; answers by how many tokens the log lags behind."""
        with self._lock:
            written = self._written.get(hold)
            if written is None:
                return 0
            self._dirty[hold] = usage
            return usage.completion_tokens - written

    def ended(self, hold: int) -> None:
        with self._lock:
            self._written.pop(hold, None)
            self._dirty.pop(hold, None)

    def take(self) -> dict[int, Usage]:
        """Every checkpoint that is not written; the caller writes them."""
        with self._lock:
            taken, self._dirty = self._dirty, {}
            for hold, usage in taken.items():
                self._written[hold] = usage.completion_tokens
            return taken


@dataclass(slots=True, eq=False, kw_only=True)
class Writer:
    """One turn after another until it is told to stop, or fails. `run` belongs to its thread."""

    journal: Journal
    checkpoints: Checkpoints
    checkpoint_s: float
    clock: Clock
    metrics: Metrics
    on_failed: Callable[[str], None]
    on_durable: Callable[[int], None] = lambda _: None
    durable_seq: int
    probe_s: float = PROBE_S
    is_full: bool = False
    """No room for the next segment. Written here, read by the event loop; so are the next two."""
    has_failed: bool = False
    why: str = ""
    _entries: "queue.SimpleQueue[Entry]" = field(default_factory=lambda: queue.SimpleQueue[Entry]())
    _flushed_ms: float = 0.0
    _probed_ms: float = 0.0
    _hurries: bool = False
    _over: bool = False
    _gate: threading.Lock = field(default_factory=threading.Lock)
    """Between a last entry and the end of the thread that would answer it."""

    @property
    def pause_s(self) -> float:
        """How long the writer may sleep: until the checkpoints are due."""
        since_s = (self.clock.monotonic_ms() - self._flushed_ms) / 1000
        return min(self.checkpoint_s, max(0.001, self.checkpoint_s - since_s))

    def put(self, entry: Entry) -> None:
        """Queue an entry; it will be answered.

        Raises:
            MeterUnavailable: the writer has stopped.
        """
        with self._gate:
            if self._over:
                raise unavailable(self.why or "this frontend is stopping")
            self._entries.put(entry)

    def hurry(self) -> None:
        """Ask for the checkpoints to be written now rather than at the next interval."""
        if not self._hurries:
            self._hurries = True
            self._entries.put(Entry(b"", wish=Wish.FLUSH))

    def stop(self) -> None:
        """Write what was put so far, then end; what is put later is refused."""
        with self._gate:
            if not self._over:
                self._over = True
                self._entries.put(Entry(b"", wish=Wish.STOP))

    def run(self) -> None:
        try:
            while self.turn(self.pause_s):
                pass
        finally:
            self.journal.close()

    def turn(self, wait_s: float) -> bool:
        """Wait for entries for at most `wait_s` and write them; False once that was the last."""
        batch = self._take(wait_s)
        waiting: Sequence[Entry] = batch
        try:
            self._write(batch)
            answer(batch, None)
            waiting = ()
            self._tend()
        except OSError as error:
            self._fail(str(error), waiting)
            return False
        except BaseException as error:
            # A defect of ours: whoever waits must hear of it, and nothing more is accepted.
            log.crashed(during="meter log", error=error)
            self._fail("the writer stopped", waiting)
            return False
        return not any(entry.wish is Wish.STOP for entry in batch)

    def keep_spare(self) -> None:
        """See that there is room for the next segment; say so when that changes."""
        try:
            self.journal.make_spare()
        except OSError as error:
            if not self.is_full:
                log.meter_log_full(why=str(error))
            self.is_full = True
        else:
            if self.is_full:
                log.meter_log_has_room()
            self.is_full = False
        self._probed_ms = self.clock.monotonic_ms()
        self.metrics.meter_healthy(healthy=not self.is_full)

    def _take(self, wait_s: float) -> list[Entry]:
        """What waits, up to one batch."""
        try:
            batch = [self._entries.get(timeout=wait_s) if wait_s else self._entries.get_nowait()]
        except queue.Empty:
            return []
        num_bytes, bytes_max = len(batch[0].payload), self.journal.batch_bytes_max
        get = self._entries.get_nowait
        try:
            while len(batch) < BATCH_MAX and num_bytes < bytes_max:
                batch.append(entry := get())
                num_bytes += len(entry.payload)
        except queue.Empty:
            pass
        self.metrics.meter_queue(self._entries.qsize())
        return batch

    def _write(self, batch: Sequence[Entry]) -> None:
        """Make the batch durable, with the checkpoints when those are due."""
        began_ms = self.clock.monotonic_ms()
        records: list[Record] = [entry for entry in batch if entry.payload]
        due = began_ms - self._flushed_ms >= self.checkpoint_s * 1000
        if due or any(entry.wish for entry in batch):
            self._hurries = False
            self._flushed_ms = began_ms
            records += self._checkpoints()
        if records:
            self.journal.append(records)
            self.metrics.meter_synced(seconds=self.journal.sync_s)
            took_s = (self.clock.monotonic_ms() - began_ms) / 1000
            self.metrics.meter_wrote(seconds=took_s, events=len(records))
            self._advance()

    def _tend(self) -> None:
        """What nobody waits for: seal an old segment, and have room for the next one."""
        journal = self.journal
        journal.seal_if_old()
        self._advance()
        probed_s = (self.clock.monotonic_ms() - self._probed_ms) / 1000
        if not journal.has_spare and (not self.is_full or probed_s >= self.probe_s):
            self.keep_spare()
        self.metrics.meter_segment_age(journal.age_s)

    def _advance(self) -> None:
        if self.journal.next_seq - 1 > self.durable_seq:
            self.durable_seq = self.journal.next_seq - 1
            self.on_durable(self.durable_seq)

    def _checkpoints(self) -> list[Record]:
        """A record for each checkpoint that was noted.

        On a full disk they leave room for the settlements of what is open, which come first.
        """
        taken = self.checkpoints.take()
        room = self.journal.room_bytes
        if self.is_full and room < 2 * self.journal.holds.num_bytes:
            return []
        now = self.clock.unix_ms()
        return [
            Record(events.checkpoint(usage, hold=hold, unix_ms=now), Effect.NOTES, hold, usage)
            for hold, usage in taken.items()
        ]

    def _fail(self, why: str, batch: Sequence[Entry]) -> None:
        """Refuse what waits and whatever comes, for good."""
        self.why = why
        self.has_failed = True
        with self._gate:
            self._over = True
        left = list(batch)
        while True:
            try:
                left.append(self._entries.get_nowait())
            except queue.Empty:
                break
        self.metrics.meter_healthy(healthy=False)
        self.metrics.meter_refused(events=sum(entry.finish is not None for entry in left))
        log.meter_unhealthy(why=why)
        answer(left, unavailable(why))
        self.on_failed(why)


def answer(batch: Sequence[Entry], refusal: ServingError | None) -> None:
    """Tell each loop in one call what became of its entries."""
    by_loop: dict[asyncio.AbstractEventLoop, list[Entry]] = {}
    for entry in batch:
        if entry.loop is not None:
            by_loop.setdefault(entry.loop, []).append(entry)
    for loop, entries in by_loop.items():
        try:
            loop.call_soon_threadsafe(_finish_all, entries, refusal)
        except RuntimeError:
            # The loop is closed, so nobody waits any more; what is stored stays stored.
            if not loop.is_closed():
                raise


def _finish_all(entries: Sequence[Entry], refusal: ServingError | None) -> None:
    for entry in entries:
        if entry.finish:
            entry.finish(entry, refusal)
