"""What the usage records promise while all goes well, and at their bounds."""

import asyncio
import sqlite3
import threading
from contextlib import closing

import pytest

from headrace.serving.domain.usage import Outcome
from headrace.serving.errors import AlreadyServed, ConfigRefused, MeterUnavailable
from headrace.serving.metering.usage_reader import UsageReader, Which
from headrace.serving.observe import Metrics


def test_a_request_leaves_one_record_with_its_tokens_and_its_charge(start, run):
    """6 fresh, 4 cached and 5 completion tokens: 6 * 1000 + 4 * 100 + 5 * 2000 = 16,400 nano."""
    frontend = start("life-1")

    async def story():
        await frontend.accepts("r1")
        await frontend.ends("r1", tokens=5)

    run(story())

    record = frontend.record("r1")
    assert (record.outcome, record.charge_nano, record.currency) == (Outcome.OK, 16_400, "USD")
    assert (record.model, record.version, record.price_version) == ("m", "v2", "book-7")
    assert (record.usage.prompt_tokens, record.usage.cached_tokens) == (10, 4)


def test_an_accepted_request_shows_as_open_until_it_ends(start, run):
    frontend = start("life-1")

    run(frontend.accepts("r1"))

    assert frontend.ledger() == {"r1": ("open", 0, 0)}


def test_a_request_id_is_served_once(start, run):
    """A client that retries after a lost answer must not pay twice."""
    frontend = start("life-1")

    async def story():
        await frontend.accepts("r1")
        with pytest.raises(AlreadyServed):
            await frontend.accepts("r1")

    run(story())


def test_ten_requests_with_one_id_at_once_yield_one_record(start, run):
    """They fall into one transaction, where an index alone would refuse all or none."""
    frontend = start("life-1")

    async def story():
        attempts = [frontend.accepts("r1") for _ in range(10)]
        return await asyncio.gather(*attempts, return_exceptions=True)

    answers = run(story())

    assert sum(answer is None for answer in answers) == 1
    assert sum(isinstance(answer, AlreadyServed) for answer in answers) == 9


def test_fresh_ids_pass_beside_a_used_one_in_the_same_transaction(start, run):
    frontend = start("life-1")

    async def story():
        await frontend.accepts("used")
        attempts = [frontend.accepts(name) for name in ("a", "used", "b")]
        return await asyncio.gather(*attempts, return_exceptions=True)

    assert [type(answer) for answer in run(story())] == [type(None), AlreadyServed, type(None)]
    assert set(frontend.ledger()) == {"used", "a", "b"}


def test_two_tenants_may_choose_the_same_request_id(start, run):
    frontend = start("life-1")

    async def story():
        await frontend.accepts("r1", tenant_id="acme")
        await frontend.accepts("r1", tenant_id="zeta")
        await frontend.ends("r1", tokens=5, tenant_id="zeta")

    run(story())

    ends = {each.tenant_id: each.outcome for each in frontend.store.records()}
    assert ends == {"acme": Outcome.OPEN, "zeta": Outcome.OK}


def test_the_first_settlement_wins(start, run):
    """A cancellation that races with the end of the stream must not change what was charged."""
    frontend = start("life-1")

    async def story():
        await frontend.accepts("r1")
        await frontend.ends("r1", tokens=5)
        await frontend.ends("r1", tokens=9, outcome=Outcome.CANCELLED)

    run(story())

    assert frontend.ledger() == {"r1": ("ok", 5, 16_400)}


def test_a_settlement_without_a_record_is_not_acknowledged(start, run):
    frontend = start("life-1")

    with pytest.raises(MeterUnavailable):
        run(frontend.ends("never-opened"))


def test_checkpoints_are_written_together_and_a_late_one_is_ignored(start, run):
    frontend = start("life-1")

    async def story():
        await frontend.accepts("r1")
        await frontend.accepts("r2")
        frontend.delivers("r1", 1)
        frontend.delivers("r1", 7)
        await frontend.ends("r2", tokens=5)
        frontend.delivers("r2", 99)
        await frontend.store.flush()

    run(story())

    assert frontend.ledger() == {"r1": ("open", 7, 0), "r2": ("ok", 5, 16_400)}


def test_a_stream_that_runs_ahead_is_written_before_the_interval_is_over(start, run):
    """The published bound is 64 tokens or one second, whichever comes first."""
    frontend = start("life-1", checkpoint_tokens=64, checkpoint_s=3600.0)

    async def story():
        await frontend.accepts("r1")
        await frontend.store.flush()
        frontend.delivers("r1", 63)
        frontend.delivers("r1", 64)
        # Events are taken in order, so once this one is answered the checkpoint was, too.
        await frontend.accepts("r2")

    run(story())

    assert frontend.ledger()["r1"] == ("open", 64, 0)


def test_a_caller_who_hangs_up_while_waiting_leaves_a_cancelled_record(start, run, tricky):
    """Nobody else would ever close it."""
    gate, reached = threading.Event(), threading.Event()

    def before(statement: str) -> None:
        if "INSERT INTO usage" in statement:
            reached.set()
            gate.wait(10)

    frontend = start("life-1", connect=tricky(before))

    async def story():
        waiting = asyncio.create_task(frontend.accepts("r1"))
        await asyncio.to_thread(reached.wait, 10)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        gate.set()
        await frontend.store.flush()
        await frontend.store.flush()

    run(story())

    assert frontend.ledger() == {"r1": ("cancelled", 0, 0)}


def test_a_full_queue_refuses_the_next_request_and_keeps_the_others(start, run, tricky):
    """Dropping one would be unmetered work; waiting without a bound would be no answer."""
    gate = threading.Event()

    def before(statement: str) -> None:
        if "INSERT INTO usage" in statement:
            gate.wait(10)

    frontend = start("life-1", queue_max=3, connect=tricky(before))

    async def story():
        waiting = [asyncio.create_task(frontend.accepts(f"r{i}")) for i in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(MeterUnavailable) as refusal:
            await frontend.accepts("one-too-many")
        gate.set()
        await asyncio.gather(*waiting)
        return refusal.value

    assert run(story()).retry_after_ms == 250
    assert set(frontend.ledger()) == {"r0", "r1", "r2"}


def test_a_stopping_frontend_writes_what_is_queued_and_refuses_the_rest(start, run):
    frontend = start("life-1")

    async def story():
        last = [asyncio.create_task(frontend.accepts(f"r{i}")) for i in range(50)]
        await asyncio.sleep(0)
        frontend.store.close()
        await asyncio.gather(*last)
        with pytest.raises(MeterUnavailable):
            await frontend.accepts("late")

    run(story())

    assert len(frontend.ledger()) == 50
    assert not frontend.store.healthy


def test_records_can_be_asked_for_by_tenant_time_and_id(start, run, path):
    frontend = start("life-1")

    async def story():
        for i, tenant in enumerate(["acme", "zeta", "acme"]):
            frontend.clock.advance(seconds=1)
            await frontend.accepts(f"r{i}", tenant_id=tenant)

    run(story())
    reader = UsageReader(path)
    since = Which(since_unix_ms=1_700_000_002_000)

    assert [each.request_id for each in reader.records()] == ["r2", "r1", "r0"]
    assert [each.request_id for each in reader.records(limit=1)] == ["r2"]
    assert [each.request_id for each in reader.records(Which(tenant_id="acme"))] == ["r2", "r0"]
    assert [each.request_id for each in reader.records(since)] == ["r2", "r1"]
    assert [each.request_id for each in reader.records(Which(request_id="r1"))] == ["r1"]


def test_totals_stay_exact_beyond_64_bits(start, run):
    """SQLite's own sum would overflow, and a float would lose cents."""
    frontend = start("life-1")
    huge = (1 << 63) - 1

    async def story():
        for name in ("r1", "r2", "r3"):
            await frontend.accepts(name)
            await frontend.ends(name, tokens=5, charge_nano=huge)

    run(story())
    (totals,) = frontend.store.totals()

    assert totals.charge_nano == 27_670_116_110_564_327_421
    assert (totals.requests, totals.usage.completion_tokens) == (3, 15)


def test_no_file_means_no_records(tmp_path):
    reader = UsageReader(tmp_path / "nowhere.db")

    assert reader.records() == []
    assert reader.totals() == []


def test_a_file_that_is_no_database_is_refused_with_a_reason(path):
    path.write_bytes(b"not a database, " * 100)

    with pytest.raises(MeterUnavailable):
        UsageReader(path).records()


def test_a_newer_file_is_left_alone(start, path):
    start("life-1").store.close()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 2")

    with pytest.raises(ConfigRefused) as refusal:
        start("life-2")

    assert "format 2" in refusal.value.what


def test_the_file_is_for_its_owner_only(start, path):
    start("life-1")

    assert path.stat().st_mode & 0o777 == 0o600


def test_the_metrics_say_what_was_written(start, run):
    metrics = Metrics()
    frontend = start("life-1", metrics=metrics)

    async def story():
        await frontend.accepts("r1")
        await frontend.ends("r1")

    run(story())

    body = metrics.render()[0].decode()
    assert 'headrace_meter_events_total{stored="yes"} 2.0' in body
    assert "headrace_meter_healthy 1.0" in body
