"""Reconciliation finds what is wrong, to the femto, and says where."""

import pytest

from headrace.serving.domain.usage import Outcome, Price, Usage
from headrace.serving.metering.ledger import sqlite_database
from headrace.serving.metering.ledger.audit import Transcript, audit
from headrace.serving.metering.ledger.ledger import Ledger
from headrace.serving.metering.ledger.reader import LedgerReader
from headrace.serving.metering.ledger.reconcile import reconcile
from headrace.serving.metering.ledger.replay import replay
from headrace.serving.metering.ledger.sqlite_database import SqliteDatabase
from headrace.serving.testing.memory_log import PRICE, USED, MemoryLog


def a_month(log: MemoryLog) -> MemoryLog:
    """Requests of two tenants with every end, corrections, and one that still runs."""
    for i in range(30):
        hold = log.reserves(f"r{i}", tenant_id=("acme", "zeta")[i % 2], project_id=f"p{i % 3}")
        log.delivers(hold)
        match i % 5:
            case 0 | 1:
                log.settles(hold)
            case 2:
                log.settles(hold, Usage(), outcome=Outcome.CANCELLED)
            case 3:
                log.settles(hold, outcome=Outcome.FAILED)
            case _:
                log.voids(hold)
    log.refuses("full#1")
    log.adjusts("a1", -5)
    log.grants("g1", 7)
    log.reserves("running")
    return log


@pytest.fixture
def books(ledger: Ledger, log: MemoryLog):
    """A month in the log and in the ledger."""
    a_month(log)
    ledger.apply(log.log_id, log.records)
    return log, ledger


def spoil(ledger: Ledger, statement: str) -> None:
    with ledger.database.transaction() as execute:
        execute(statement, ())


def test_books_that_agree_have_a_difference_of_exactly_zero(books):
    """12 requests of 16,400 nano; a cancelled one had nothing delivered."""
    log, ledger = books

    findings = reconcile([log], ledger)

    assert findings.differences == []
    assert (findings.requests, findings.open_requests) == (31, 1)
    assert (findings.charge_femto, findings.difference_femto) == (12 * 16_400 * 10**6, 0)


SPOILS = {
    "a charge of one femto more": (
        "UPDATE request SET charge_femto = charge_femto + 1 WHERE request_id = 'r0'",
        "'r0' has charge_femto 16400000000 by the log and 16400000001 by the ledger",
        3,
    ),
    "a request that is gone": (
        "DELETE FROM request WHERE request_id = 'r1'",
        "made a request that the ledger has not",
        6,
    ),
    "a request that nobody made": (
        "UPDATE request SET seq = 2 WHERE request_id = 'r1'",
        "Request 'r1' of zeta is in the ledger; record 2",
        5,
    ),
    "another tenant": (
        "UPDATE request SET tenant_id = 'eve' WHERE request_id = 'r5'",
        "'r5' has tenant_id 'zeta' by the log and 'eve' by the ledger",
        11,
    ),
    "a quantity": (
        "UPDATE quantity SET quantity = 6 WHERE unit = 'completion_tokens' AND seq = 1",
        "'completion_tokens': 5} by the log and",
        2,
    ),
    "a balance": (
        "UPDATE balance SET charge_femto = charge_femto + 1 WHERE project_id = 'p0'",
        "The balance of ('acme', 'p0', 'USD', 202611)",
        2,
    ),
    "a correction": (
        "UPDATE adjustment SET amount_femto = 5",
        "The adjustment 'a1' of acme is",
        2,
    ),
}


@pytest.mark.parametrize("fault", SPOILS)
def test_whatever_was_changed_in_the_ledger_is_found_and_named(books, fault):
    statement, expected, count = SPOILS[fault]
    log, ledger = books
    spoil(ledger, statement)

    findings = reconcile([log], ledger)

    assert expected in findings.differences[0].what
    assert findings.differences_found == count


def test_a_charge_that_rates_and_quantities_do_not_explain_is_found(ledger, log):
    """The log is the truth about what was charged, not about what should have been."""
    log.serves("right")
    log.settles(log.reserves("wrong"), charge_femto=16_400 * 10**6 + 1)
    log.settles(log.reserves("ours"), outcome=Outcome.FAILED, charge_femto=1)
    ledger.apply(log.log_id, log.records)

    findings = reconcile([log], ledger)

    assert [each.request_id for each in findings.differences] == ["wrong", "ours"]
    assert findings.difference_femto == 2


def test_a_request_that_two_frontends_charged_is_found(ledger):
    """Each log is right for itself; only together they charge one id twice."""
    logs = [MemoryLog("log-1"), MemoryLog("log-2")]
    for log in logs:
        log.serves("r1")
        ledger.apply(log.log_id, log.records)

    (difference,) = reconcile(logs, ledger).differences

    assert difference.what == (
        "Request 'r1' of acme was charged 2 times; correct it by an adjustment."
    )


def test_a_log_that_is_missing_is_a_difference(books):
    _, ledger = books

    findings = reconcile([], ledger)

    assert findings.differences[0].what == "The ledger has log log-1, which is not here to compare."


def test_a_log_that_is_shorter_than_the_ledger_is_a_difference(books):
    log, ledger = books
    del log.records[40:]

    findings = reconcile([log], ledger)

    assert "ends at record 40; the ledger has it up to" in findings.differences[0].what


def test_clients_ledger_and_engines_agree_to_the_token(ledger, log):
    told = []
    for i in range(5):
        log.serves(f"r{i}")
        told.append(
            Transcript(tenant_id="acme", request_id=f"r{i}", usage=USED, charge_nano=16_400)
        )
    ledger.apply(log.log_id, log.records)
    engine = Usage(prompt_tokens=50, cached_tokens=20, completion_tokens=25)

    assert audit(ledger, told, engine=engine).agree
    less = audit(ledger, told[1:], engine=engine)
    more = audit(ledger, told, engine=Usage(prompt_tokens=50, cached_tokens=20))
    assert [each.request_id for each in less.differences] == ["r0"]
    assert "The engines counted" in more.differences[0].what


def test_a_ledger_made_again_from_the_logs_says_the_same(books, tmp_path):
    log, ledger = books
    again = Ledger(SqliteDatabase(tmp_path / "again.db"))

    assert replay([log], again, before=ledger) == log.last_seq
    assert replay([log], again, before=ledger) == 0

    before, after = LedgerReader(ledger), LedgerReader(again)
    assert after.records() == before.records()
    assert after.balances() == before.balances()
    assert reconcile([log], again).agree
    again.close()


def test_prices_in_another_unit_are_charged_again_as_well(ledger, log):
    rates = {**PRICE.rates, "image_pixels": 4 * 10**6}
    hold = log.reserves("picture", price=Price(version="book-8", rates=rates))
    log.settles(hold, Usage(), quantities={"image_pixels": 1024 * 1024})
    ledger.apply(log.log_id, log.records)

    findings = reconcile([log], ledger)

    assert findings.agree, findings.differences
    assert findings.charge_femto == 1024 * 1024 * 4 * 10**6


class StepCounter:
    """A connection that counts what SQLite's machine does, in thousands of steps."""

    def __init__(self, path) -> None:
        self.thousands = 0
        self._real = sqlite_database.connect(path)
        self._real.set_progress_handler(self._step, 1000)

    def _step(self) -> int:
        self.thousands += 1
        return 0

    def __getattr__(self, name: str):
        return getattr(self._real, name)


def test_the_work_grows_with_the_log_and_not_with_its_square(tmp_path):
    """SQLite once read the whole log for every request of a batch: hours for a day's log."""
    work = {}
    for requests in (300, 1200):
        log, counters = MemoryLog(), []
        holds = [log.reserves(f"r{i}") for i in range(requests)]
        for hold in holds:
            log.settles(hold)

        def connect(path, counters=counters):
            counters.append(StepCounter(path))
            return counters[-1]

        ledger = Ledger(SqliteDatabase(tmp_path / f"{requests}.db", connect=connect))
        ledger.apply(log.log_id, log.records[:requests])
        ledger.apply(log.log_id, log.records[requests:])
        assert reconcile([log], ledger).agree
        work[requests] = sum(counter.thousands for counter in counters)
        ledger.close()

    assert work[1200] < 6 * work[300]
