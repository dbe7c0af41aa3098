"""The records of version 1 stay, and come into the ledger exactly once."""

import asyncio
from pathlib import Path

import pytest

from headrace.serving.domain.record import Opening, Settlement
from headrace.serving.domain.usage import Outcome, Usage
from headrace.serving.metering.ledger.former import import_former
from headrace.serving.metering.ledger.ledger import Ledger
from headrace.serving.metering.ledger.reader import LedgerReader
from headrace.serving.metering.ledger.sqlite_database import SqliteDatabase
from headrace.serving.metering.usage_store import UsageStore
from headrace.serving.testing.clock import ManualClock
from headrace.serving.testing.memory_log import NOVEMBER, PRICE, USED


class Old:
    """A frontend of the release before, on the same file."""

    def __init__(self, path: Path) -> None:
        self.clock = ManualClock(NOVEMBER)
        self.store = UsageStore(path, clock=self.clock, epoch="old")

    def accepts(self, request_id: str) -> None:
        opening = Opening(
            tenant_id="acme",
            request_id=request_id,
            key_id="k1",
            model="m",
            version="v1",
            price=PRICE,
            accepted_unix_ms=self.clock.unix_ms(),
        )
        asyncio.run(self.store.open(opening))

    def ends(self, request_id: str, usage: Usage = USED, outcome: Outcome = Outcome.OK) -> None:
        settlement = Settlement(
            tenant_id="acme",
            request_id=request_id,
            usage=usage,
            outcome=outcome,
            charge_femto=PRICE.charge_femto(usage) if outcome is Outcome.OK else 0,
            version="v1",
            first_token_unix_ms=None,
            settled_unix_ms=self.clock.unix_ms(),
        )
        asyncio.run(self.store.settle(settlement))

    def delivers(self, request_id: str, usage: Usage) -> None:
        async def checkpoint() -> None:
            self.store.checkpoint(tenant_id="acme", request_id=request_id, usage=usage)
            await self.store.flush()

        asyncio.run(checkpoint())

    def dies(self) -> None:
        """What others see of a kill: its lock is free."""
        self.store._lock.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


@pytest.fixture
def old(path):
    frontend = Old(path)
    yield frontend
    frontend.store.close()


@pytest.fixture
def ledger(path):
    ledger = Ledger(SqliteDatabase(path))
    yield ledger
    ledger.close()


def takes_over(path: Path, ledger: Ledger) -> dict[str, tuple[str, int]]:
    import_former(path, ledger, now_unix_ms=lambda: NOVEMBER)
    return {
        each.request_id: (each.outcome.value, each.charge_nano)
        for each in LedgerReader(ledger).records()
    }


def test_settled_records_are_taken_over_once(old, path, ledger):
    for name, outcome in (("r1", Outcome.OK), ("r2", Outcome.FAILED)):
        old.accepts(name)
        old.ends(name, outcome=outcome)

    for _ in range(2):
        assert takes_over(path, ledger) == {"r1": ("ok", 16_400), "r2": ("failed", 0)}

    (balance,) = LedgerReader(ledger).balances()
    assert (balance.month, balance.requests) == (202611, 2)
    assert balance.charge_femto == 16_400 * 10**6
    assert ledger.database.rows("SELECT unit, sum(quantity) FROM quantity GROUP BY unit") == [
        ("cache_read_tokens", 8),
        ("completion_tokens", 10),
        ("prompt_tokens", 12),
    ]


def test_the_release_before_goes_on_with_the_same_file(old, path, ledger):
    """An upgrade that is taken back has lost nothing, and the next one takes the rest."""
    old.accepts("r1")
    old.ends("r1")
    takes_over(path, ledger)

    old.accepts("r2")
    old.ends("r2")

    assert [each.request_id for each in old.store.records()] == ["r2", "r1"]
    assert set(takes_over(path, ledger)) == {"r1", "r2"}


def test_what_a_live_frontend_runs_is_waited_for(old, path, ledger):
    old.accepts("running")
    old.accepts("r2")
    old.ends("r2")

    assert takes_over(path, ledger) == {}

    old.ends("running")
    assert takes_over(path, ledger) == {"running": ("ok", 16_400), "r2": ("ok", 16_400)}


def test_what_a_dead_frontend_left_open_is_settled_at_its_last_checkpoint(old, path, ledger):
    """2 completion tokens at 2,000 nano and 10 of the prompt at 1,000."""
    old.accepts("cut")
    old.delivers("cut", Usage(prompt_tokens=10, completion_tokens=2))
    old.dies()

    assert takes_over(path, ledger) == {"cut": ("recovered", 14_000)}


def test_a_file_without_former_records_is_left_alone(path, ledger):
    assert takes_over(path, ledger) == {}
