"""Usage records in one SQLite file: opened before any work, settled before the final message.

One writer thread takes what has queued up, writes it as one transaction, and only then tells the
callers (group commit): alone, a request waits for one small write; under load, hundreds share one.

What it promises:

* An acknowledged event survives a killed process. A power cut may lose the last moments, because
  the operating system, not the disk, has acknowledged; the file stays consistent.
* Every record is settled exactly once. One that a dead frontend left open is settled at its last
  checkpoint by the next one that starts, at the price that was frozen when it was accepted. So a
  crash never over-bills, and under-bills by less than one checkpoint interval a stream.
* When the file cannot be written, work is refused, never done unmetered and never forgotten: what
  could not be settled is settled as failed, without a charge, once the file can be written again.
"""

import asyncio
import sqlite3
import threading
from pathlib import Path

from headrace.serving import log
from headrace.serving.clock import Clock
from headrace.serving.domain.record import Opening, Refused, Settlement
from headrace.serving.domain.usage import Outcome, Usage
from headrace.serving.errors import MeterUnavailable, ServingError
from headrace.serving.metering import usage_schema as schema
from headrace.serving.metering.epochs import EpochLock, is_alive
from headrace.serving.metering.usage_reader import UsageReader
from headrace.serving.metering.usage_writer import PROBE_S, Checkpoints, Event, Writer, unavailable
from headrace.serving.observe import Metrics

_RECOVER_ROWS = 10_000
"""Rows settled by one transaction of a recovery: bounds its memory and its lock."""


class UsageStore(UsageReader):
    """The `Meter` of one frontend process. Its methods belong to one event loop."""

    def __init__(
        self,
        path: Path,
        *,
        clock: Clock,
        epoch: str,
        metrics: Metrics | None = None,
        queue_max: int = 4096,
        checkpoint_tokens: int = 64,
        checkpoint_s: float = 1.0,
        probe_s: float = PROBE_S,
        connect: schema.Connect = schema.connect,
    ) -> None:
        """Open the file, settle what dead frontends left open, start the writer. Blocks.

        Args:
            path: made when missing; on a local disk, as network file systems lock unreliably.
            clock: for the time of recovered settlements.
            epoch: names this life of this process; best a fresh random one at every start.
            metrics: None keeps them to itself.
            queue_max: events that may wait; further openings are refused.
            checkpoint_tokens: how far a stream may run ahead of its written checkpoint...
            checkpoint_s: ...and for how long.
            probe_s: how often a file that cannot be written is tried again.
            connect: how connections are made; tests pass one that fails on purpose.

        Raises:
            ConfigRefused: another version's file, or a live process has this epoch.
            MeterUnavailable: the file cannot be written.
        """
        super().__init__(path)
        self._epoch = epoch
        self._clock = clock
        self._queue_max = queue_max
        self._checkpoint_tokens = checkpoint_tokens
        self._waiting = 0
        self._closed = False
        self._checkpoints = Checkpoints()
        locks = path.with_name(path.name + ".epochs")
        try:
            self._lock = EpochLock(locks, epoch)
        except OSError as error:
            raise unavailable(str(error)) from error
        try:
            connection = connect(path)
            self.recovered = _recover(connection, locks, epoch, clock)
            """Records of dead frontends that were settled at this start."""
        except (sqlite3.Error, OSError) as error:
            self._lock.close()
            raise unavailable(str(error)) from error
        except BaseException:
            self._lock.close()
            raise
        self._writer = Writer(
            path=path,
            connection=connection,
            connect=connect,
            checkpoints=self._checkpoints,
            checkpoint_s=checkpoint_s,
            metrics=metrics or Metrics(),
            probe_s=probe_s,
        )
        self._thread = threading.Thread(target=self._writer.run, name="usage-store", daemon=True)
        self._thread.start()

    @property
    def healthy(self) -> bool:
        """False while usage cannot be recorded, and so no work is accepted."""
        return self._writer.healthy and not self._closed

    async def open(self, opening: Opening) -> None:
        """See `Meter.open`. A caller that is cancelled meanwhile leaves a cancelled record."""
        if not self._writer.healthy:
            raise unavailable("the last write did not succeed")
        if self._waiting >= self._queue_max:
            raise MeterUnavailable(
                f"{self._waiting:,} usage events are waiting for the disk.",
                why=f"The queue holds {self._queue_max:,}; beyond it requests would only wait.",
                fix="Retry with jitter. Operator: see headrace_meter_write_seconds.",
                retry_after_ms=250,
            )
        await self._write(Event(opening=opening, row=schema.opening_row(opening, self._epoch)))

    def checkpoint(self, *, tenant_id: str, request_id: str, usage: Usage) -> None:
        """See `Meter.checkpoint`. 0.3 us: it may be called for every chunk."""
        behind = self._checkpoints.note((tenant_id, request_id), usage)
        if behind >= self._checkpoint_tokens:
            self._writer.hurry()

    async def settle(self, settlement: Settlement) -> None:
        """See `Meter.settle`. Not bounded by the queue: it ends work that was accepted.

        After MeterUnavailable the record is closed as failed, without a charge, as soon as the
        file can be written: its caller never got the final message.
        """
        row = schema.settlement_row(settlement)
        self._checkpoints.ended((settlement.tenant_id, settlement.request_id))
        await self._write(Event(settlement=settlement, row=row))

    async def refuse(self, refused: Refused) -> None:
        """See `Meter.refuse`: here it is an opening and its settlement."""
        opening = Opening(
            tenant_id=refused.tenant_id,
            request_id=refused.request_id,
            key_id=refused.key_id,
            model=refused.model,
            version="",
            price=refused.price,
            accepted_unix_ms=refused.refused_unix_ms,
        )
        await self.open(opening)
        settlement = Settlement(
            tenant_id=refused.tenant_id,
            request_id=refused.request_id,
            usage=Usage(),
            outcome=refused.outcome,
            charge_femto=0,
            version="",
            first_token_unix_ms=None,
            settled_unix_ms=refused.refused_unix_ms,
            replicas_tried=0,
        )
        await self.settle(settlement)

    async def flush(self) -> None:
        """Return once every checkpoint noted so far is written."""
        await self._write(Event())

    def close(self) -> None:
        """Write what is queued, then stop. Blocks for at most a few transactions; idempotent."""
        if not self._closed:
            self._closed = True
            self._writer.stop()
            self._thread.join()
            self._lock.close()

    async def _write(self, event: Event) -> None:
        """Queue the event and wait until it is stored, or refused."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()

        def finish(refusal: ServingError | None) -> None:
            self._waiting -= 1
            if event.opening and refusal is None:
                self._checkpoints.began((event.opening.tenant_id, event.opening.request_id))
                if done.cancelled():
                    self._settle_abandoned(event.opening)
            if done.done():
                return
            if refusal is None:
                done.set_result(None)
            else:
                done.set_exception(refusal)

        event.loop, event.finish = loop, finish
        self._writer.put(event)
        self._waiting += 1
        try:
            await done
        except asyncio.CancelledError:
            # Either the event is still on its way, and `finish` will see the cancelled future;
            # or it was stored in the moment of the cancellation, and its record is ours to close.
            if event.opening and not done.cancelled() and done.exception() is None:
                self._settle_abandoned(event.opening)
            raise

    def _settle_abandoned(self, opening: Opening) -> None:
        """Its caller went away before it learned of its record, so nothing was delivered."""
        self._checkpoints.ended((opening.tenant_id, opening.request_id))
        settlement = Settlement(
            tenant_id=opening.tenant_id,
            request_id=opening.request_id,
            usage=Usage(),
            outcome=Outcome.CANCELLED,
            charge_femto=0,
            version=opening.version,
            first_token_unix_ms=None,
            settled_unix_ms=self._clock.unix_ms(),
            replicas_tried=0,
        )
        try:
            self._writer.put(Event(settlement=settlement, row=schema.settlement_row(settlement)))
        except MeterUnavailable:
            # The store was closed in this moment; the next start recovers the record, uncharged.
            log.refused(unavailable("an abandoned request stays open"), during="stopping")


def _recover(connection: sqlite3.Connection, locks: Path, epoch: str, clock: Clock) -> int:
    """Settle the open records of every epoch whose process is gone; answers how many.

    Our own epoch has none yet, so what stands under its name is a former life's.
    """
    found = [name for (name,) in connection.execute(schema.SELECT_OPEN_EPOCHS).fetchall()]
    dead = [name for name in found if name == epoch or not is_alive(locks, name)]
    recovered = 0
    for name in dead:
        while rows := _recover_some(connection, name, clock.unix_ms()):
            recovered += rows
    if recovered:
        log.usage_recovered(requests=recovered, epochs=len(dead))
    return recovered


def _recover_some(connection: sqlite3.Connection, epoch: str, now_unix_ms: int) -> int:
    with schema.transaction(connection) as execute:
        rows = execute(schema.SELECT_OPEN_OF, (epoch, _RECOVER_ROWS)).fetchall()
        charges = [[row[0], schema.recovered_charge(row[1:]), now_unix_ms] for row in rows]
        execute(schema.RECOVER, (schema.as_batch(charges),))
    return len(rows)
