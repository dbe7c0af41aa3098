"""A frontend's books: the prices, its meter log, and what follows the log into the ledgers.

The local ledger has caught up before the first request is accepted, so that it knows every request
id. Everything else follows in the background for as long as it takes: a database that is gone stops
nothing here.
"""

import contextlib
import threading
from collections.abc import Callable

from headrace.serving import log
from headrace.serving.clock import Clock
from headrace.serving.config import Config
from headrace.serving.domain.record import Adjustment, Grant, UsageRecord
from headrace.serving.domain.tier import Tier
from headrace.serving.domain.units import TEXT_UNITS
from headrace.serving.domain.usage import Price
from headrace.serving.errors import ConfigRefused
from headrace.serving.metering import price_book
from headrace.serving.metering.corrections import Corrections
from headrace.serving.metering.ledger.booked import Booked, booked
from headrace.serving.metering.ledger.followers import LOCAL, SHARED, Followers
from headrace.serving.metering.ledger.ledger import Ledger
from headrace.serving.metering.ledger.projector import Follower
from headrace.serving.metering.ledger.reader import LedgerReader, Which
from headrace.serving.metering.ledger.spent import spent_femto
from headrace.serving.metering.ledger.sqlite_database import SqliteDatabase
from headrace.serving.metering.meterlog.meter_log import MeterLog
from headrace.serving.metering.meterlog.reader import LogReader
from headrace.serving.metering.price_shelf import PriceShelf
from headrace.serving.observe import Metrics
from headrace.serving.observe_ledger import lag_gauges


class Books:
    """Opened and closed off the event loop; in between, everything belongs to it."""

    def __init__(
        self,
        config: Config,
        *,
        clock: Clock,
        metrics: Metrics,
        epoch: str,
        version: str = "",
        on_failed: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Open everything, settle what a dead frontend left open, begin to follow. Blocks.

        Args:
            config: says where the books are.
            clock: of records and price books.
            metrics: of this frontend.
            epoch: names this life of this frontend.
            version: of this build.
            on_failed: called on another thread once nothing can be recorded any more: the process
                should end.

        Raises:
            ConfigRefused: a price book, a secret or the ledger cannot be used, or another process
                writes this log.
            MeterLogDamaged: a record that was durable is damaged or missing.
            MeterUnavailable, LedgerUnavailable: the log or the local ledger cannot be written.
        """
        self._clock = clock
        self._prices = PriceShelf(config.prices_dir, price_book.embedded(config.prices))
        gauges = lag_gauges(metrics)
        tell_lag = {name: gauges(name) for name in (LOCAL, SHARED)}
        with contextlib.ExitStack() as stack:
            followers = Followers(config.ledger_path, config.ledger, clock=clock)
            stack.callback(followers.stop)
            self.meter = MeterLog(
                config.meterlog_dir,
                config=config.meter,
                clock=clock,
                epoch=epoch,
                version=version,
                was_used=followers.was_used,
                metrics=metrics,
                on_failed=on_failed,
            )
            stack.callback(self.meter.close)
            self.meter.projected(followers.catch_up(self._reader(config)))
            followers.start(
                lambda: self._reader(config),
                tip=lambda: self.meter.durable_seq,
                on_applied=self.meter.projected,
                on_lag=lambda name, lag: tell_lag[name](lag),
            )
            self.meter.on_durable(lambda _: followers.wake())
            self._ledger = ledger = Ledger(SqliteDatabase(config.ledger_path))
            stack.callback(ledger.close)
            self._finding = threading.Lock()
            self._found_by = Follower(self._reader(config), ledger, clock=clock)
            self._lookups = LedgerReader(ledger)
            self.corrections = Corrections(
                self.meter, find=self.find_correction, currency=lambda: self.currency, clock=clock
            )
            """What people write: checked, and each id once."""
            self._stack = stack.pop_all()

    def price(self, model: str, tier: Tier = Tier.STANDARD) -> Price:
        """The rates that a text request accepted now keeps.

        Raises:
            UnknownUnit: the book in force has none for this model.
        """
        unix_ms = self._clock.unix_ms()
        return self._prices.price(model, tier, unix_ms=unix_ms, needs=TEXT_UNITS)

    def find(self, tenant_id: str, request_id: str) -> UsageRecord | None:
        """One request, as of everything that is durable; None only when there is none. Blocks.

        Raises:
            MeterUnavailable, LedgerUnavailable: the books cannot be read.
        """
        with self._finding:
            self._found_by.catch_up()
            which = Which(tenant_id=tenant_id, request_id=request_id)
            records = self._lookups.records(which, limit=1)
        return records[0] if records else None

    def find_correction(self, correction: Adjustment | Grant) -> Booked | None:
        """What is durable under its id; see `booked`. Blocks.

        Raises:
            MeterUnavailable, LedgerUnavailable: the books cannot be read.
        """
        with self._finding:
            self._found_by.catch_up()
            return booked(self._ledger, correction)

    @property
    def currency(self) -> str:
        """Of the price book in force."""
        return self._prices.at(self._clock.unix_ms()).currency

    def spent_femto(self, *, epoch: str, limit_name: str, period: str) -> int | None:
        """What a life of this frontend charged against a budget; see `spent.spent_femto`. Blocks.

        Raises:
            MeterUnavailable, LedgerUnavailable: the books cannot be read.
        """
        with self._finding:
            self._found_by.catch_up()
            return spent_femto(
                self._ledger,
                log_id=self.meter.log_id,
                epoch=epoch,
                limit_name=limit_name,
                period=period,
            )

    async def adjust(self, adjustment: Adjustment) -> None:
        """Make a correction durable, once for each id.

        Raises:
            MeterUnavailable: it cannot be written; ask again.
        """
        await self.meter.adjust(adjustment)

    def refresh_prices(self) -> None:
        """Take in price books that were published since. Call it about once a second."""
        try:
            self._prices.refresh()
        except ConfigRefused as refusal:
            log.refused(refusal, during="reading price books")

    def close(self) -> None:
        """Write what is queued, then stop. Blocks; idempotent. Ledgers that lag catch up later."""
        # A look-up whose caller is gone goes on in its thread until its end.
        with self._finding:
            self._stack.close()

    def _reader(self, config: Config) -> LogReader:
        return LogReader(config.meterlog_dir, durable_seq=lambda: self.meter.durable_seq)
