"""Follows one log into one ledger, as fast as the ledger takes it.

It keeps nothing but the high-water mark: while a ledger is gone the log goes on without it, and
what was missed is read when it is back. So memory is bounded whatever the outage, and catching up
is the same as going on.
"""

from collections.abc import Callable
from dataclasses import dataclass

from headrace.serving import log
from headrace.serving.clock import Clock
from headrace.serving.errors import LedgerUnavailable, MeterUnavailable, ServingError
from headrace.serving.metering.ledger.ledger import Ledger
from headrace.serving.metering.ledger.source import Source
from headrace.serving.metering.ledger.turns import BackgroundTurns, Backoff

BATCH_RECORDS = 2_000
"""Records of one transaction: some 50 ms, and 1 MB here."""
POLL_S = 0.25
"""How often a log is looked at that nobody announces."""
BACKOFF_FIRST_S = 0.25
BACKOFF_LONGEST_S = 30.0
"""A database that is back is noticed within half a minute."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lag:
    """How far a ledger is behind its log."""

    records: int
    """Durable in the log and not in the ledger."""
    seconds: float
    """Since the ledger last had everything; 0 when it does."""


class Follower:
    """The core: one turn after another, each of a bounded time. For one thread at a time."""

    def __init__(
        self,
        source: Source,
        ledger: Ledger,
        *,
        clock: Clock,
        tip: Callable[[], int] | None = None,
        on_lag: Callable[[Lag], None] = lambda _: None,
        on_applied: Callable[[int], None] = lambda _: None,
        batch_records: int = BATCH_RECORDS,
    ) -> None:
        """Reads and writes nothing yet.

        Args:
            source: the log; this follower's alone.
            ledger: likewise.
            clock: for the lag.
            tip: the last record that is durable, if somebody here knows: the log's writer. Without
                it the lag in records counts at most one batch.
            on_lag: told after every turn.
            on_applied: told the last record that is surely in the ledger, whenever it moves: the
                log's writer need not remember the requests up to it.
            batch_records: most of one transaction.
        """
        self._source = source
        self._ledger = ledger
        self._clock = clock
        self._tip = tip
        self._on_lag = on_lag
        self._on_applied = on_applied
        self._batch_records = batch_records
        self._backoff = Backoff(BACKOFF_FIRST_S, BACKOFF_LONGEST_S)
        self._current_ms = clock.monotonic_ms()
        """When the ledger last had everything."""
        self.seq = 0
        """The last record that is surely in the ledger."""
        self._asks = True
        """Whether the ledger must say where it stands: at first, and after a batch that failed."""
        self.refusal: ServingError | None = None
        """Why it stands still: a gap or damage, which no waiting mends."""

    @property
    def is_healthy(self) -> bool:
        return self.refusal is None and self._backoff.failures == 0

    def turn(self) -> float | None:
        """Apply one batch; the seconds to wait before the next turn, None once it stands still."""
        try:
            count = self._step()
        except (LedgerUnavailable, MeterUnavailable) as error:
            if self._backoff.failures == 0:
                log.ledger_behind(ledger=self._ledger.name, why=error.what)
            self._report(at_least=1)
            return self._backoff.failed()
        except ServingError as error:
            log.refused(error, during=f"projection into {self._ledger.name}")
            self.refusal = error
            self._report(at_least=1)
            return None
        if self._backoff.failures:
            log.ledger_reached(ledger=self._ledger.name)
            self._backoff.succeeded()
        if count == self._batch_records:
            self._report(at_least=1)
            return 0.0
        self._current_ms = self._clock.monotonic_ms()
        self._report(at_least=0)
        return POLL_S

    def catch_up(self) -> int:
        """Apply everything that is durable in the log; answers the high-water mark.

        Raises:
            LedgerUnavailable, MeterUnavailable: try again later.
            MeterLogDamaged, AmountOutOfRange: a record that cannot be applied.
        """
        while self._step() == self._batch_records:
            pass
        return self.seq

    def _step(self) -> int:
        log_id = self._source.log_id
        if self._asks:
            self._moved(self._ledger.high_water(log_id))
        self._asks = True
        batch = self._source.after(self.seq, self._batch_records)
        if batch:
            self._moved(self._ledger.apply(log_id, batch))
        self._asks = False
        return len(batch)

    def _moved(self, seq: int) -> None:
        self.seq = seq
        self._on_applied(seq)

    def _report(self, *, at_least: int) -> None:
        records = at_least
        if self._tip is not None:
            records = max(at_least, self._tip() - self.seq)
        behind_s = (self._clock.monotonic_ms() - self._current_ms) / 1000 if records else 0.0
        self._on_lag(Lag(records=records, seconds=behind_s))


class Projector:
    """A follower on a thread of its own, so that no event loop waits for a database."""

    def __init__(self, follower: Follower, *, name: str = "ledger") -> None:
        self._follower = follower
        self._turns = BackgroundTurns(follower.turn, name=name)

    @property
    def is_healthy(self) -> bool:
        """False while the ledger is behind for a reason: see the log."""
        return self._follower.is_healthy and self._turns.is_alive

    @property
    def seq(self) -> int:
        """The last record that is surely in the ledger; what follows it, the log's writer knows."""
        return self._follower.seq

    def start(self) -> None:
        self._turns.start()

    def wake(self) -> None:
        """Records have become durable. Any thread may call."""
        self._turns.wake()

    def stop(self) -> None:
        """End after the batch that is being written. Idempotent."""
        self._turns.stop()
