"""Everything that follows one frontend's log: the local ledger, the shared one, and the sink.

Each has a thread, a reader and a connection of its own, so that none waits for another: a
PostgreSQL that is gone delays neither the local ledger nor the events.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from headrace.serving.clock import Clock
from headrace.serving.config import read_secret
from headrace.serving.config_metering import LedgerConfig
from headrace.serving.metering.ledger.ledger import Ledger
from headrace.serving.metering.ledger.projector import Follower, Lag, Projector
from headrace.serving.metering.ledger.replay import open_postgres
from headrace.serving.metering.ledger.sink import HttpReceiver, Sink
from headrace.serving.metering.ledger.source import Source
from headrace.serving.metering.ledger.sqlite_database import SqliteDatabase
from headrace.serving.metering.ledger.turns import BackgroundTurns

LOCAL, SHARED = "local", "postgres"


class Followers:
    """Made before the log is opened, started after it. Belongs to one event loop."""

    def __init__(self, path: Path, config: LedgerConfig, *, clock: Clock) -> None:
        """Open the local ledger. Blocks.

        Args:
            path: of the local ledger; made when missing.
            config: whether there is a shared ledger, and a sink.
            clock: for lags.

        Raises:
            ConfigRefused: a secret file cannot be read, or a ledger of a newer version.
            LedgerUnavailable: the local ledger cannot be opened.
        """
        self._path = path
        self._clock = clock
        self._known = self._local()
        self._projectors: list[Projector] = []
        self._sinks: list[BackgroundTurns] = []
        self._opened: list[Ledger] = [self._known]
        self._dsn: str | None = None
        if config.postgres_dsn_file is not None:
            self._dsn = read_secret(config.postgres_dsn_file, key="ledger.postgres_dsn_file")
        token: str | None = None
        if config.sink_token_file is not None:
            token = read_secret(config.sink_token_file, key="ledger.sink_token_file")
        self._receiver = HttpReceiver(config.sink_url, token=token) if config.sink_url else None
        self._known.prepare()

    def was_used(self, tenant_id: str, request_id: str) -> bool:
        """Whether the local ledger knows the request. 10 us; on the event loop only.

        Raises:
            LedgerUnavailable: the file cannot be read.
        """
        return self._known.was_used(tenant_id=tenant_id, request_id=request_id)

    def catch_up(self, source: Source) -> int:
        """Bring the local ledger up to the log; answers its mark. Blocks; before `start`.

        Raises:
            LedgerUnavailable, MeterUnavailable, MeterLogDamaged, AmountOutOfRange: see `Follower`.
        """
        return Follower(source, self._known, clock=self._clock).catch_up()

    def start(
        self,
        open_source: Callable[[], Source],
        *,
        tip: Callable[[], int],
        on_applied: Callable[[int], None] = lambda _: None,
        on_lag: Callable[[str, Lag], None] = lambda _, __: None,
    ) -> None:
        """Begin to follow.

        Args:
            open_source: makes a reader of the log; each follower has one of its own.
            tip: the last record that is durable.
            on_applied: told how far the local ledger is.
            on_lag: told how far each ledger is behind, by LOCAL or SHARED.
        """
        local = self._open(self._local())
        targets = [(LOCAL, local, on_applied)]
        if self._dsn is not None:
            shared = self._open(Ledger(open_postgres(self._dsn)))
            targets.append((SHARED, shared, _nobody))
        for name, ledger, applied in targets:
            follower = Follower(
                open_source(),
                ledger,
                clock=self._clock,
                tip=tip,
                on_lag=_naming(on_lag, name),
                on_applied=applied,
            )
            self._projectors.append(Projector(follower, name=f"ledger {name}"))
        if self._receiver is not None:
            sink = Sink(self._open(self._local()), open_source().log_id, self._receiver)
            self._sinks.append(BackgroundTurns(sink.turn, name="sink"))
        for each in (*self._projectors, *self._sinks):
            each.start()

    def wake(self) -> None:
        """Records have become durable. Any thread may call."""
        for each in self._projectors:
            each.wake()

    def stop(self) -> None:
        """End after the batches that are being written. Blocks; idempotent."""
        followers: Sequence[Projector | BackgroundTurns] = (*self._projectors, *self._sinks)
        for each in followers:
            each.stop()
        for ledger in self._opened:
            ledger.close()

    def _local(self) -> Ledger:
        return Ledger(SqliteDatabase(self._path))

    def _open(self, ledger: Ledger) -> Ledger:
        self._opened.append(ledger)
        return ledger


def _nobody(seq: int) -> None:
    """Nobody needs to know."""


def _naming(on_lag: Callable[[str, Lag], None], name: str) -> Callable[[Lag], None]:
    return lambda lag: on_lag(name, lag)
