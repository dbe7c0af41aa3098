"""A frontend's followers: local ledger, shared ledger and sink, each on its own."""

import threading

import pytest

from headrace.serving.config_metering import LedgerConfig
from headrace.serving.errors import ConfigRefused
from headrace.serving.metering.ledger.followers import Followers
from headrace.serving.metering.ledger.ledger import Ledger
from headrace.serving.metering.ledger.postgres_database import PostgresDatabase
from headrace.serving.testing.clock import ManualClock
from headrace.serving.testing.memory_log import MemoryLog


class Watch:
    """Waits for what followers say."""

    def __init__(self) -> None:
        self.marks: dict[str, int] = {}
        self._told = threading.Condition()

    def on_lag(self, name: str, lag) -> None:
        with self._told:
            self.marks[name] = lag.records
            self._told.notify_all()

    def sees(self, **marks: int) -> bool:
        with self._told:
            return self._told.wait_for(lambda: self.marks == marks, timeout=20)


def test_local_and_shared_ledger_follow_one_log(tmp_path, postgres):
    dsn, dsn_file = postgres.new_database(), tmp_path / "dsn"
    dsn_file.write_text(dsn + "\n")
    log, watch, applied = MemoryLog(), Watch(), []
    followers = Followers(
        tmp_path / "ledger.db", LedgerConfig(postgres_dsn_file=dsn_file), clock=ManualClock()
    )
    log.serves("r1")
    assert followers.catch_up(log) == 2
    log.serves("r2")

    followers.start(
        lambda: log, tip=lambda: log.last_seq, on_applied=applied.append, on_lag=watch.on_lag
    )
    followers.wake()

    assert watch.sees(local=0, postgres=0)
    assert followers.was_used("acme", "r2")
    assert not followers.was_used("zeta", "r2")
    followers.stop()
    assert applied[-1] == 4
    shared = Ledger(PostgresDatabase(dsn))
    assert shared.was_used(tenant_id="acme", request_id="r2")
    shared.close()


def test_a_shared_ledger_that_is_gone_delays_nothing_else(tmp_path):
    dsn_file = tmp_path / "dsn"
    dsn_file.write_text(f"host={tmp_path} user=nobody dbname=none")
    log, watch = MemoryLog(), Watch()
    log.serves("r1")
    followers = Followers(
        tmp_path / "ledger.db", LedgerConfig(postgres_dsn_file=dsn_file), clock=ManualClock()
    )

    followers.start(lambda: log, tip=lambda: log.last_seq, on_lag=watch.on_lag)

    assert watch.sees(local=0, postgres=2)
    assert followers.was_used("acme", "r1")
    followers.stop()


def test_a_missing_secret_is_refused_at_the_start(tmp_path):
    with pytest.raises(ConfigRefused, match="cannot be read"):
        Followers(
            tmp_path / "ledger.db",
            LedgerConfig(postgres_dsn_file=tmp_path / "none"),
            clock=ManualClock(),
        )
