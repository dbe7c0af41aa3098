"""What following a log promises when databases go, processes die and records are damaged."""

import itertools
import random
import sqlite3
import threading
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from headrace.serving.errors import LedgerUnavailable, MeterLogDamaged
from headrace.serving.metering.ledger import sqlite_database
from headrace.serving.metering.ledger.ledger import Ledger
from headrace.serving.metering.ledger.postgres_database import PostgresDatabase
from headrace.serving.metering.ledger.projector import BACKOFF_LONGEST_S, Follower, Lag, Projector
from headrace.serving.metering.ledger.reader import LedgerReader
from headrace.serving.metering.ledger.sqlite_database import SqliteDatabase
from headrace.serving.observe import Metrics
from headrace.serving.observe_ledger import lag_gauges
from headrace.serving.testing.clock import ManualClock
from headrace.serving.testing.memory_log import MemoryLog

CHARGE = 16_400 * 10**6


class TrickyConnection:
    """A real connection with a hook that runs before each statement and may raise."""

    def __init__(self, path: Path, before) -> None:
        self._real = sqlite_database.connect(path)
        self._before = before

    def execute(self, statement: str, values=()):
        self._before(statement)
        return self._real.execute(statement, values)

    @property
    def in_transaction(self) -> bool:
        return self._real.in_transaction

    def close(self) -> None:
        self._real.close()


class Killed(BaseException):
    """The process ends here: nothing after it runs, not even a ROLLBACK."""


class Story:
    """One follower in virtual time, with everything it said about its lag."""

    def __init__(self, log: MemoryLog, ledger: Ledger, **options) -> None:
        self.clock = ManualClock()
        self.lags: list[Lag] = []
        self.log = log
        self.follower = Follower(
            log,
            ledger,
            clock=self.clock,
            tip=lambda: log.last_seq,
            on_lag=self.lags.append,
            **options,
        )

    def goes_on(self, seconds: float) -> int:
        """Turns as its thread would take them; answers how many."""
        until_ms, turns = self.clock.now_ms + seconds * 1000, 0
        while self.clock.now_ms < until_ms:
            pause_s = self.follower.turn()
            assert pause_s is not None
            self.clock.advance(seconds=max(pause_s, 0.001))
            turns += 1
        return turns


def test_postgres_may_be_gone_for_an_hour(postgres, log):
    """The log goes on; nothing is kept in memory, and the ledger has every request afterwards."""
    ledger = Ledger(PostgresDatabase(postgres.new_database()))
    story = Story(log, ledger, batch_records=10)
    log.serves("before")
    story.goes_on(1)
    postgres.stop()

    turns = 0
    for minute in range(60):
        log.serves(f"r{minute}")
        turns += story.goes_on(60)
    during = story.lags[-1]
    postgres.start()
    story.goes_on(BACKOFF_LONGEST_S + 10)

    assert during.records == 120
    assert 3500 < during.seconds < 3700
    assert turns < 200
    assert story.lags[-1] == Lag(records=0, seconds=0.0)
    assert ledger.high_water(log.log_id) == log.last_seq
    (balance,) = LedgerReader(ledger).balances()
    assert (balance.requests, balance.charge_femto) == (61, 61 * CHARGE)
    ledger.close()


def test_a_connection_that_is_cut_is_made_again(postgres, log):
    """A restart of the server, a failover, an idle connection that a firewall forgot."""
    ledger = Ledger(PostgresDatabase(postgres.new_database()))
    log.serves("before")
    ledger.apply(log.log_id, log.records)
    postgres.stop()
    postgres.start()
    log.serves("after")

    with pytest.raises(LedgerUnavailable, match="does not answer"):
        ledger.apply(log.log_id, log.records)
    assert ledger.apply(log.log_id, log.records) == 4
    ledger.close()


class DyingDatabase:
    """A real database whose process dies before statement n of its transactions."""

    def __init__(self, database, dies_at: int) -> None:
        self._database = database
        self._left = dies_at
        self.dialect = database.dialect
        self.name = database.name
        self.rows = database.rows
        self.close = database.close

    @contextmanager
    def transaction(self):
        with self._database.transaction() as execute:

            def run(statement, values):
                self._left -= 1
                if self._left == 0:
                    self._database.close()  # What a server sees of a kill.
                    raise Killed
                return execute(statement, values)

            yield run


def test_a_crash_at_any_statement_neither_loses_nor_doubles(tmp_path, postgres):
    """Killed before statement n of a batch, for every n; the next process goes on."""
    log = MemoryLog()
    for name in ("r1", "r2", "r3"):
        log.serves(name)
    log.adjusts("a1", -5)
    log.grants("g1", 7)
    for kind, n in itertools.product(("sqlite", "postgres"), range(1, 12)):
        if kind == "sqlite":
            database = SqliteDatabase(tmp_path / f"{n}.db")
        else:
            database = PostgresDatabase(postgres.new_database())
        ledger = Ledger(database)
        ledger.apply(log.log_id, log.records[:3])

        with suppress(Killed, LedgerUnavailable, sqlite3.ProgrammingError):
            Ledger(DyingDatabase(database, n)).apply(log.log_id, log.records)

        assert ledger.high_water(log.log_id) == (3 if n <= 9 else 8)
        ledger.apply(log.log_id, log.records)
        balances = LedgerReader(ledger).balances()
        sums = [
            (each.requests, each.charge_femto, each.adjusted_femto, each.credit_femto)
            for each in balances
        ]
        assert sums == [(0, 0, 0, 7), (3, 3 * CHARGE, -5, 0)]
        ledger.close()


def test_an_error_at_any_statement_is_tried_again_and_leaves_the_same_ledger(tmp_path):
    """The disk errs at random; the follower goes on until everything is there, once."""
    chance = random.Random(11)

    def before(_: str) -> None:
        if chance.random() < 0.2:
            raise sqlite3.OperationalError("disk I/O error")

    log = MemoryLog()
    for i in range(40):
        log.delivers(log.serves(f"r{i}"))
    tricky = SqliteDatabase(
        tmp_path / "ledger.db", connect=lambda path: TrickyConnection(path, before)
    )
    story = Story(log, Ledger(tricky), batch_records=7)

    while story.follower.seq != log.last_seq:
        story.goes_on(1)

    (balance,) = LedgerReader(Ledger(SqliteDatabase(tmp_path / "ledger.db"))).balances()
    assert (balance.requests, balance.charge_femto) == (40, 40 * CHARGE)


def test_a_gap_stops_the_projection_and_serving_goes_on(tmp_path, log):
    """Waiting mends no damage; whoever asks is told what is wrong."""
    log.serves("r1")
    log.records[1].event.settle.charge_femto = -1
    story = Story(log, Ledger(SqliteDatabase(tmp_path / "ledger.db")))

    assert story.follower.turn() is None

    assert not story.follower.is_healthy
    assert "charge_femto -1" in str(story.follower.refusal)
    log.records[1].event.settle.charge_femto = 1
    assert story.follower.catch_up() == 2


def test_a_ledger_that_is_ahead_of_its_log_says_so(tmp_path, log):
    """A log restored from an old copy must not be taken for the whole."""

    class Shortened(MemoryLog):
        def after(self, seq: int, limit: int):
            if seq > self.last_seq:
                raise MeterLogDamaged("The log ends early.", why="It is a copy.", fix="Restore.")
            return super().after(seq, limit)

    ledger = Ledger(SqliteDatabase(tmp_path / "ledger.db"))
    log.serves("r1")
    ledger.apply(log.log_id, log.records)

    with pytest.raises(MeterLogDamaged):
        Follower(Shortened(), ledger, clock=ManualClock()).catch_up()


def test_two_who_apply_one_log_at_once_count_it_once(tmp_path, postgres):
    """A command catches up beside the frontend's own projector."""
    log = MemoryLog()
    for i in range(300):
        log.serves(f"r{i}")
    dsn = postgres.new_database()
    databases = {
        "sqlite": lambda: SqliteDatabase(tmp_path / "ledger.db"),
        "postgres": lambda: PostgresDatabase(dsn),
    }
    for make in databases.values():
        followers = [
            Follower(log, Ledger(make()), clock=ManualClock(), batch_records=20) for _ in range(4)
        ]
        threads = [threading.Thread(target=follower.catch_up) for follower in followers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        ledger = Ledger(make())
        (balance,) = LedgerReader(ledger).balances()
        assert (balance.requests, balance.charge_femto) == (300, 300 * CHARGE)
        for follower in followers:
            follower._ledger.close()
        ledger.close()


def test_many_frontends_write_one_ledger_at_once(postgres):
    """Their balances are the same rows; a deadlock would be tried again and is not there."""
    dsn = postgres.new_database()
    logs = [MemoryLog(f"log-{i}") for i in range(4)]
    for log in logs:
        for i in range(100):
            log.serves(f"{log.log_id}-{i}", tenant_id=f"t{i % 7}")
    ledgers = [Ledger(PostgresDatabase(dsn)) for _ in logs]
    followers = [
        Follower(log, ledger, clock=ManualClock(), batch_records=25)
        for log, ledger in zip(logs, ledgers, strict=True)
    ]

    threads = [threading.Thread(target=follower.catch_up) for follower in followers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    (totals,) = LedgerReader(ledgers[0]).totals()
    balances = LedgerReader(ledgers[0]).balances()
    assert (totals.requests, totals.charge_femto) == (400, 400 * CHARGE)
    assert sum(each.charge_femto for each in balances) == 400 * CHARGE
    for ledger in ledgers:
        ledger.close()


def test_the_thread_projects_what_it_is_told_of_and_shows_its_lag(tmp_path, log):
    metrics = Metrics()
    tell, seen = lag_gauges(metrics)("local"), threading.Event()

    def on_lag(lag: Lag) -> None:
        tell(lag)
        if lag.records == 0 and log.last_seq:
            seen.set()

    follower = Follower(
        log,
        Ledger(SqliteDatabase(tmp_path / "ledger.db")),
        clock=ManualClock(),
        tip=lambda: log.last_seq,
        on_lag=on_lag,
    )
    projector = Projector(follower)
    projector.start()
    log.serves("r1")
    projector.wake()

    assert seen.wait(10)
    assert projector.is_healthy
    projector.stop()
    assert projector.seq == 2
    assert 'headrace_ledger_lag_records{ledger="local"} 0.0' in metrics.render()[0].decode()
