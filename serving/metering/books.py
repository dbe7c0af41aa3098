"""A frontend's books: its meter log, the ledgers the log is projected to, and the prices.

    pipeline -> MeterLog -> Projector -> ledger.db           this home
                         -> Projector -> PostgreSQL        all frontends, if configured
                ledger.db -> Sink     -> CloudEvents receiver if configured

The local ledger caught up before the first request is accepted, so that it knows every request id.
The others follow in the background for as long as it takes: a database that is gone stops nothing.
"""

import contextlib
import uuid
from collections.abc import Callable
from pathlib import Path

from headrace.serving import log
from headrace.serving.clock import Clock
from headrace.serving.config import Config
from headrace.serving.domain.tier import Tier
from headrace.serving.domain.usage import Price
from headrace.serving.errors import ConfigRefused
from headrace.serving.metering import price_book
from headrace.serving.metering.ledger.former import import_former
from headrace.serving.metering.ledger.ledger import Ledger
from headrace.serving.metering.ledger.projector import Follower, Projector
from headrace.serving.metering.ledger.replay import open_postgres
from headrace.serving.metering.ledger.sink import HttpReceiver, Sink
from headrace.serving.metering.ledger.sqlite_database import SqliteDatabase
from headrace.serving.metering.ledger.turns import BackgroundTurns
from headrace.serving.metering.meterlog.meter_log import MeterLog
from headrace.serving.metering.meterlog.reader import LogReader
from headrace.serving.metering.price_shelf import PriceShelf
from headrace.serving.observe import Metrics
from headrace.serving.secret_file import read_secret

LOCAL, SHARED = "local", "shared"


class Books:
    """Opened and closed off the event loop; in between, `meter` and `price` belong to it."""

    def __init__(
        self,
        config: Config,
        *,
        clock: Clock,
        metrics: Metrics,
        version: str = "",
        on_failed: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Open everything, settle what a dead frontend left open, begin to project. Blocks.

        Args:
            config: says where the books are.
            clock: of records and price books.
            metrics: of this frontend.
            version: of this build.
            on_failed: called on another thread once nothing can be recorded any more: the process
                should end.

        Raises:
            ConfigRefused: a price book, a secret or the ledger cannot be used, or another process
                writes this log.
            MeterLogDamaged: a record that was durable is damaged or missing.
            MeterUnavailable: the log's folder cannot be written.
            LedgerUnavailable: ledger.db cannot be written.
        """
        self._config = config
        self._clock = clock
        self._metrics = metrics
        self._prices = PriceShelf(config.prices_dir, price_book.embedded(config.prices))
        with contextlib.ExitStack() as stack:
            # The event loop's own connection: it looks up one id for every opening.
            known = Ledger(SqliteDatabase(config.ledger_path))
            stack.callback(known.close)
            known.prepare()
            import_former(config.ledger_path, known, now_unix_ms=clock.unix_ms)
            meter = config.meter
            self.meter = MeterLog(
                config.meterlog_dir,
                clock=clock,
                epoch=uuid.uuid4().hex,
                version=version,
                was_used=lambda tenant_id, request_id: known.was_used(
                    tenant_id=tenant_id, request_id=request_id
                ),
                metrics=metrics,
                on_failed=on_failed,
                queue_max=meter.queue_max,
                checkpoint_tokens=meter.checkpoint_tokens,
                checkpoint_s=meter.checkpoint_s,
                segment_bytes=meter.segment_bytes,
                seal_s=meter.seal_s,
            )
            stack.callback(self.meter.close)
            self._projectors = [self._local_projector(stack)]
            if config.ledger.postgres_dsn_file is not None:
                self._projectors.append(
                    self._shared_projector(stack, config.ledger.postgres_dsn_file)
                )
            for projector in self._projectors:
                projector.start()
                stack.callback(projector.stop)
            self.meter.on_durable(self._durable)
            if config.ledger.sink_url is not None:
                self._start_sink(stack, config.ledger.sink_url)
            self._stack = stack.pop_all()

    def price(self, model: str, tier: Tier = Tier.STANDARD) -> Price:
        """The rates that a request accepted now keeps.

        Raises:
            UnknownUnit: the book in force has none for this model.
        """
        return self._prices.price(model, tier, unix_ms=self._clock.unix_ms())

    def refresh_prices(self) -> None:
        """Take in price books that were published since. Call it about once a second."""
        try:
            self._prices.refresh()
        except ConfigRefused as refusal:
            log.refused(refusal, during="reading price books")

    def close(self) -> None:
        """Write what is queued, then stop. Blocks; idempotent. Ledgers that lag catch up later."""
        self._stack.close()

    def _durable(self, _: int) -> None:
        for projector in self._projectors:
            projector.wake()

    def _local_projector(self, stack: contextlib.ExitStack) -> Projector:
        ledger = Ledger(SqliteDatabase(self._config.ledger_path))
        stack.callback(ledger.close)
        follower = self._follower(LOCAL, ledger, on_applied=self.meter.projected)
        follower.catch_up()
        return Projector(follower, name="ledger")

    def _shared_projector(self, stack: contextlib.ExitStack, dsn_file: Path) -> Projector:
        dsn = read_secret(dsn_file, key="ledger.postgres_dsn_file")
        ledger = Ledger(open_postgres(dsn))
        stack.callback(ledger.close)
        return Projector(self._follower(SHARED, ledger), name="shared ledger")

    def _follower(
        self, name: str, ledger: Ledger, *, on_applied: Callable[[int], None] = lambda _: None
    ) -> Follower:
        meter = self.meter
        return Follower(
            LogReader(self._config.meterlog_dir, durable_seq=lambda: meter.durable_seq),
            ledger,
            clock=self._clock,
            tip=lambda: meter.durable_seq,
            on_lag=lambda lag: self._metrics.ledger_lags(
                name, records=lag.records, seconds=lag.seconds
            ),
            on_applied=on_applied,
        )

    def _start_sink(self, stack: contextlib.ExitStack, url: str) -> None:
        token_file = self._config.ledger.sink_token_file
        token = None
        if token_file is not None:
            token = read_secret(token_file, key="ledger.sink_token_file")
        ledger = Ledger(SqliteDatabase(self._config.ledger_path))
        stack.callback(ledger.close)
        sink = Sink(ledger, self.meter.log_id, HttpReceiver(url, token=token))
        turns = BackgroundTurns(sink.turn, name="usage sink")
        turns.start()
        stack.callback(turns.stop)
