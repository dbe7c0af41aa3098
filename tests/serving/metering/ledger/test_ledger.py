"""What every ledger promises, in SQLite and in PostgreSQL alike."""

import itertools
import random

import pytest

from headrace.serving.domain.tier import Tier, Verdict
from headrace.serving.domain.usage import Outcome, Price, Usage
from headrace.serving.errors import (
    AmountOutOfRange,
    ConfigRefused,
    LedgerUnavailable,
    MeterLogDamaged,
)
from headrace.serving.metering.ledger.ledger import Ledger
from headrace.serving.metering.ledger.postgres_database import PostgresDatabase
from headrace.serving.metering.ledger.reader import LedgerReader, Which
from headrace.serving.metering.ledger.sqlite_database import SqliteDatabase
from headrace.serving.testing.memory_log import NOVEMBER, PRICE, USED, MemoryLog
from headrace.v1 import meterlog_pb2 as pb
from headrace.v1 import usage_pb2

NANO = 10**6


def content(ledger: Ledger) -> list[list[tuple]]:
    """Everything that a ledger says, to compare."""
    tables = ("log", "price", "request", "quantity", "adjustment", "credit", "balance")
    return [sorted(ledger.database.rows(f"SELECT * FROM {table}"), key=str) for table in tables]


def busy_log() -> MemoryLog:
    """Every kind of record, some requests at once."""
    log = MemoryLog()
    log.append(epoch=pb.Epoch(epoch="e1", version="1"))
    whole, stopped, broken, early = (log.reserves(name) for name in ("ok", "cut", "bad", "early"))
    log.delivers(whole, Usage(prompt_tokens=10, completion_tokens=2))
    log.delivers(stopped)
    log.settles(whole)
    log.settles(stopped, outcome=Outcome.RECOVERED)
    log.settles(broken, outcome=Outcome.FAILED)
    log.voids(early)
    log.expires(log.reserves("dead", tenant_id="zeta"))
    log.refuses("full#1")
    log.adjusts("a1", -5 * NANO)
    log.grants("g1", 7 * NANO)
    log.grants("slice", 9 * NANO, budget_id="b1")
    log.delivers(log.reserves("running"), Usage(prompt_tokens=10, completion_tokens=1))
    return log


def test_every_request_becomes_a_row_whatever_its_end(ledger, reader):
    log = busy_log()

    ledger.apply(log.log_id, log.records)

    rows = {each.request_id: each for each in reader.records()}
    ends = {name: (row.outcome.value, row.charge_nano) for name, row in rows.items()}
    assert ends == {
        "ok": ("ok", 16_400),
        "cut": ("recovered", 16_400),
        "bad": ("failed", 0),
        "early": ("cancelled", 0),
        "dead": ("expired", 0),
        "full#1": ("rejected", 0),
        "running": ("open", 0),
    }
    assert rows["bad"].waived_femto == 16_400 * NANO
    assert rows["running"].usage == Usage(prompt_tokens=10, completion_tokens=1)
    assert (rows["ok"].project_id, rows["ok"].version, rows["ok"].usage) == ("search", "v2", USED)
    assert (rows["ok"].currency, rows["ok"].price_version) == ("USD", "book-7")
    assert (rows["ok"].hold_femto, rows["early"].version) == (10**12, "v1")


def test_balances_add_up_by_tenant_project_and_month(ledger, reader, log):
    """16,400 nano in November, twice that in December."""
    log.serves("n1")
    log.unix_ms += 30 * 86_400_000
    log.serves("d1")
    log.serves("d2")
    log.adjusts("a1", -400 * NANO)
    log.grants("g1", 1_000 * NANO)

    ledger.apply(log.log_id, log.records)

    seen = {
        (each.project_id, each.month): (
            each.requests,
            each.charge_femto // NANO,
            each.adjusted_femto // NANO,
            each.credit_femto // NANO,
        )
        for each in reader.balances(tenant_id="acme")
    }
    assert seen == {
        ("search", 202611): (1, 16_400, 0, 0),
        ("search", 202612): (2, 32_800, -400, 0),
        ("", 202612): (0, 0, 0, 1_000),
    }


def test_a_slice_of_a_budget_is_no_credit(ledger, reader, log):
    log.grants("slice", 9 * NANO, budget_id="b1")

    ledger.apply(log.log_id, log.records)

    assert reader.balances() == []


def test_a_receipt_comes_back_as_it_was_given(ledger, reader, log):
    wire = usage_pb2.Receipt(
        tier_asked=usage_pb2.TIER_RESERVED,
        tier_served=usage_pb2.TIER_STANDARD,
        ttft_us=120_000,
        itl_p99_us=30_000,
        verdict="missed",
        missed=["ttft", "itl"],
    )
    log.settles(log.reserves("r1", tier="reserved"), receipt=wire)

    ledger.apply(log.log_id, log.records)

    (record,) = reader.records(Which(tier=Tier.RESERVED))
    assert record.receipt is not None
    assert record.receipt.tier_served is Tier.STANDARD
    assert (record.receipt.ttft_us, record.receipt.itl_p50_us) == (120_000, None)
    assert (record.receipt.verdict, record.receipt.missed) == (Verdict.MISSED, ("ttft", "itl"))


def test_work_that_is_not_text_is_counted_in_its_own_units(ledger, log):
    rates = {**PRICE.rates, "video_ms/720p/24fps/audio": 5 * 10**9}
    hold = log.reserves("v1", price=Price(version="book-8", rates=rates))
    log.settles(hold, Usage(), quantities={"video_ms/720p/24fps/audio": 4_000})

    ledger.apply(log.log_id, log.records)

    rows = ledger.database.rows("SELECT unit, quantity FROM quantity")
    assert rows == [("video_ms/720p/24fps/audio", 4_000)]
    assert ledger.database.rows("SELECT charge_femto FROM request") == [(2 * 10**13,)]


def test_whatever_is_delivered_twice_late_or_in_pieces_changes_nothing(database, tmp_path):
    """The same ledger from one batch, and from any pieces in any order that leaves no hole."""
    log, chance = busy_log(), random.Random(7)
    ledger = Ledger(database)
    while (mark := ledger.high_water(log.log_id)) < log.last_seq:
        start = chance.randint(0, mark)
        ledger.apply(log.log_id, log.after(start, chance.randint(1, 5)))
    once = content(ledger)

    ledger.apply(log.log_id, log.records)
    ledger.apply(log.log_id, log.records[3:9])

    assert content(ledger) == once
    assert ledger.high_water(log.log_id) == log.last_seq


def test_a_batch_beyond_a_hole_is_refused_until_the_hole_is_filled(ledger, log):
    log.serves("r1")
    log.serves("r2")
    ledger.apply(log.log_id, log.records[:1])

    with pytest.raises(MeterLogDamaged, match=r"goes on at record 3; the ledger has it up to 1"):
        ledger.apply(log.log_id, log.records[2:])

    assert ledger.apply(log.log_id, log.records[1:]) == 4


def test_the_logs_of_many_frontends_meet_in_one_ledger(ledger, reader):
    """Numbers of records mean something only within their log."""
    logs = [MemoryLog(f"log-{i}") for i in range(3)]
    for log in logs:
        log.serves(f"of {log.log_id}")

    for log, half in itertools.product(logs, (slice(0, 1), slice(1, 2))):
        ledger.apply(log.log_id, log.records[half])

    assert {each.request_id for each in reader.records()} == {f"of log-{i}" for i in range(3)}
    (balance,) = reader.balances()
    assert (balance.requests, balance.charge_femto) == (3, 3 * 16_400 * NANO)


def test_one_correction_in_two_logs_is_applied_once(ledger, reader):
    for log in (MemoryLog("log-1"), MemoryLog("log-2")):
        log.adjusts("a1", -5 * NANO)
        log.grants("g1", 7 * NANO)
        ledger.apply(log.log_id, log.records)

    assert [each.adjusted_femto for each in reader.balances()] == [0, -5 * NANO]
    assert [each.credit_femto for each in reader.balances()] == [7 * NANO, 0]


def test_two_tenants_may_choose_the_same_request_id(ledger, reader, log):
    log.serves("r1", tenant_id="acme")
    log.serves("r1", tenant_id="zeta")

    ledger.apply(log.log_id, log.records)

    assert ledger.was_used(tenant_id="zeta", request_id="r1")
    assert not ledger.was_used(tenant_id="zeta", request_id="r2")
    assert {each.tenant_id for each in reader.records(Which(request_id="r1"))} == {"acme", "zeta"}


def test_nobody_ends_another_tenants_request(ledger, reader, log):
    """Whoever replays an id cannot have somebody else pay, or go free."""
    hold = log.reserves("r1", tenant_id="acme")
    log.reserved[hold].tenant_id = "zeta"
    log.settles(hold)
    log.records[0].event.reserve.tenant_id = "acme"

    with pytest.raises(MeterLogDamaged, match="its hold is of 'r1' of 'acme'"):
        ledger.apply(log.log_id, log.records)

    assert [(each.tenant_id, each.outcome) for each in reader.records()] == [("acme", "open")]
    assert ledger.high_water(log.log_id) == 1


BAD_SETTLEMENTS = {
    "a negative charge": ({"charge_femto": -1}, AmountOutOfRange),
    "negative tokens": ({"usage": usage_pb2.Usage(completion_tokens=-1)}, AmountOutOfRange),
    "a negative quantity": ({"quantities": {"image_pixels": -1}}, AmountOutOfRange),
    "an unknown unit": ({"quantities": {"hugs": 1}}, MeterLogDamaged),
    "text counted twice": ({"quantities": {"prompt_tokens": 1}}, MeterLogDamaged),
    "more cached than prompt": ({"usage": usage_pb2.Usage(cached_tokens=11)}, MeterLogDamaged),
    "no such outcome": ({"outcome": "fine"}, MeterLogDamaged),
    "an end that is none": ({"outcome": "open"}, MeterLogDamaged),
    "no such hold": ({"reserve": 99}, MeterLogDamaged),
    "a time without a month": ({"settled_unix_ms": 1 << 62}, MeterLogDamaged),
}


@pytest.mark.parametrize("fields", BAD_SETTLEMENTS)
def test_a_record_that_cannot_be_right_is_refused_and_what_precedes_it_is_kept(
    ledger, reader, log, fields
):
    changes, refusal = BAD_SETTLEMENTS[fields]
    log.serves("before")
    hold = log.reserves("r1")
    log.settles(hold)
    log.serves("after")
    settle = log.records[3].event.settle
    settle.MergeFrom(pb.Settle(**changes))

    with pytest.raises(refusal):
        ledger.apply(log.log_id, log.records)

    assert {each.request_id: each.outcome.value for each in reader.records()} == {
        "before": "ok",
        "r1": "open",
    }


def test_a_request_ends_once(ledger, log):
    hold = log.reserves("r1")
    log.settles(hold)
    log.settles(hold)

    with pytest.raises(MeterLogDamaged, match="had ended before, as ok"):
        ledger.apply(log.log_id, log.records)


def test_sums_stay_exact_beyond_64_bits(ledger, reader, log):
    """SQLite's own sum would overflow, and a float would lose cents."""
    most = (1 << 63) - 1
    huge = Usage(prompt_tokens=most)
    for name in ("r1", "r2", "r3"):
        log.settles(log.reserves(name), huge, charge_femto=most)
    log.adjusts("a1", -most)
    log.adjusts("a2", -most)

    ledger.apply(log.log_id, log.records)

    (totals,) = reader.totals()
    (balance,) = reader.balances()
    assert totals.charge_femto == balance.charge_femto == 27_670_116_110_564_327_421
    assert totals.usage.prompt_tokens == 27_670_116_110_564_327_421
    assert balance.adjusted_femto == -18_446_744_073_709_551_614


def test_requests_can_be_asked_for_by_what_they_are(ledger, reader, log):
    log.serves("r0", tenant_id="acme", project_id="search", model="small", tier="flex")
    log.serves("r1", tenant_id="acme", project_id="chat", model="large", tier="priority")
    log.serves("r2", tenant_id="zeta", project_id="chat", model="small", tier="flex")
    ledger.apply(log.log_id, log.records)

    def ids(**which) -> list[str]:
        found = [each.request_id for each in reader.records(Which(**which))]
        assert [each.request_id for each in reader.stream(Which(**which))] == found[::-1]
        return found

    assert ids() == ["r2", "r1", "r0"]
    assert ids(tenant_id="acme", project_id="chat") == ["r1"]
    assert ids(model="small", key_id="k1") == ["r2", "r0"]
    assert ids(tier=Tier.FLEX) == ["r2", "r0"]
    assert ids(since_unix_ms=NOVEMBER + 2000, until_unix_ms=NOVEMBER + 4000) == ["r1"]
    assert ids(month=202612) == []
    assert [totals.requests for totals in reader.totals(Which(tenant_id="acme"))] == [2]


def test_a_newer_ledger_is_used_if_it_says_that_it_may_be(database, log):
    """An upgrade that only adds can be taken back by going back to the release before."""
    Ledger(database).prepare()
    with database.transaction() as execute:
        execute("UPDATE ledger_schema SET version = 3, compatible_with = 2", ())
    log.serves("r1")
    assert Ledger(database).apply(log.log_id, log.records) == 2

    with database.transaction() as execute:
        execute("UPDATE ledger_schema SET version = 4, compatible_with = 3", ())
    with pytest.raises(ConfigRefused, match="has format 4; this Headrace knows 2"):
        Ledger(database).high_water(log.log_id)


def test_a_file_that_is_no_database_is_refused_with_a_reason(tmp_path):
    path = tmp_path / "ledger.db"
    path.write_bytes(b"not a database, " * 100)

    with pytest.raises(LedgerUnavailable, match="headrace meterlog replay"):
        LedgerReader(Ledger(SqliteDatabase(path))).records()


def test_no_secret_of_a_connection_string_is_shown():
    database = PostgresDatabase("postgresql://olga:s3cret@db.example:5433/ledger")

    assert "s3cret" not in repr(database)
    assert database.name == "postgresql db.example 5433 ledger"
    with pytest.raises(ConfigRefused) as refusal:
        PostgresDatabase("passwort=s3cret")
    assert "s3cret" not in str(refusal.value)
