"""What the meter log promises while all goes well, and at its bounds."""

import asyncio
import threading
from pathlib import Path

import pytest

from headrace.serving.clock import SystemClock
from headrace.serving.config_metering import MeterConfig
from headrace.serving.domain.record import Adjustment, Grant
from headrace.serving.domain.tier import Receipt, Tier, Verdict
from headrace.serving.domain.usage import Outcome, Usage
from headrace.serving.errors import (
    AlreadyServed,
    AmountOutOfRange,
    ConfigRefused,
    InvalidRequest,
    MeterUnavailable,
)
from headrace.serving.metering.meterlog.files import LocalFiles
from headrace.serving.metering.meterlog.meter_log import MeterLog
from headrace.serving.metering.meterlog.reader import LogReader
from headrace.serving.metering.meterlog.verify import verify
from headrace.serving.observe import Metrics

FOLDER = Path("/log")


def test_a_request_leaves_a_hold_its_checkpoints_and_one_settlement(start, run, disk, told):
    """6 fresh, 4 cached and 5 completion tokens: 6 * 1000 + 4 * 100 + 5 * 2000 = 16,400 nano."""
    frontend = start()

    async def story():
        await frontend.accepts("r1")
        frontend.delivers("r1", 3)
        await frontend.flushes()
        await frontend.ends("r1", tokens=5)

    run(story())

    assert told(disk) == {"r1": [("reserve", 0, 0), ("checkpoint", 3, 0), ("ok", 5, 16_400)]}


def test_a_reserve_holds_what_the_ledger_needs_to_charge(start, run, disk, read):
    frontend = start()

    run(
        frontend.accepts(
            "r1", project_id="search", tier=Tier.FLEX, hold_femto=7, idempotency_digest=b"d" * 32
        )
    )

    reserve = read(disk)[-1].event.reserve
    assert (reserve.tenant_id, reserve.project_id, reserve.key_id) == ("acme", "search", "k1")
    assert (reserve.tier, reserve.hold_femto, reserve.idempotency_digest) == ("flex", 7, b"d" * 32)
    assert (reserve.price.currency, reserve.price.version) == ("USD", "book-7")
    assert reserve.price.rates["cache_read_tokens"] == 100_000_000


def test_a_settlement_keeps_its_receipt(start, run, disk, read):
    frontend = start()
    receipt = Receipt(
        tier_asked=Tier.RESERVED,
        tier_served=Tier.STANDARD,
        ttft_us=41_000,
        itl_p99_us=9_000,
        verdict=Verdict.MISSED,
        missed=("ttft",),
    )

    async def story():
        await frontend.accepts("r1")
        await frontend.ends("r1", receipt=receipt)

    run(story())

    kept = read(disk)[-1].event.settle.receipt
    assert (kept.tier_asked, kept.tier_served, kept.ttft_us, kept.itl_p50_us) == (1, 3, 41_000, 0)
    assert (kept.verdict, list(kept.missed)) == ("missed", ["ttft"])


def test_a_request_that_used_nothing_is_voided(start, run, disk, told):
    frontend = start()

    async def story():
        await frontend.accepts("r1")
        await frontend.ends("r1", tokens=0, outcome=Outcome.CANCELLED)

    run(story())

    assert told(disk) == {"r1": [("reserve", 0, 0), ("void", 0, 0)]}


def test_a_refusal_is_one_record_and_leaves_the_id_free(start, run, disk, told):
    frontend = start()

    async def story():
        await frontend.refuses("r1#a")
        await frontend.accepts("r1")

    run(story())

    assert told(disk) == {"r1#a": [("refuse", 0, 0)], "r1": [("reserve", 0, 0)]}


def test_corrections_and_grants_are_recorded_with_their_numbers(start, run, disk, read):
    frontend = start()
    back = Adjustment(
        adjustment_id="a1",
        tenant_id="acme",
        amount_femto=-(10**12),
        currency="USD",
        reason="outage",
        actor="ops@example.com",
    )
    credit = Grant(
        grant_id="g1", tenant_id="acme", amount_femto=5, currency="USD", actor="ops@example.com"
    )

    async def story():
        first = await frontend.until_done(frontend.log.adjust(back))
        return first, await frontend.until_done(frontend.log.grant(credit))

    first, second = run(story())

    assert second == first + 1 == frontend.log.durable_seq
    adjust, grant = (record.event for record in read(disk)[-2:])
    assert (adjust.adjust.amount_femto, adjust.adjust.reason) == (-(10**12), "outage")
    assert (grant.grant.amount_femto, grant.grant.expires_unix_ms) == (5, 0)


def test_a_request_id_is_served_once(start, run):
    """A client that retries after a lost answer must not pay twice."""
    frontend = start()

    async def story():
        attempts = [frontend.log.open(frontend.opening("r1")) for _ in range(10)]
        return await frontend.until_done(asyncio.gather(*attempts, return_exceptions=True))

    async def again():
        await frontend.accepts("r1")

    answers = run(story())
    assert sum(answer is None for answer in answers) == 1
    assert sum(isinstance(answer, AlreadyServed) for answer in answers) == 9
    with pytest.raises(AlreadyServed):
        run(again())


def test_an_id_that_the_ledger_knows_is_not_served_again(start, run):
    frontend = start(was_used=lambda tenant, request: (tenant, request) == ("acme", "old"))

    async def story():
        with pytest.raises(AlreadyServed):
            await frontend.accepts("old")
        await frontend.accepts("old", tenant_id="zeta")
        await frontend.ends("old")  # Of acme: the ledger has its settlement, which won.

    run(story())


def test_what_the_ledger_took_over_is_forgotten_here(start, run):
    """The memory of used ids is bounded, and the ledger answers for what it has."""
    frontend = start(unprojected_max=2)

    async def story():
        for name in ("r1", "r2"):
            await frontend.accepts(name)
            await frontend.ends(name)
        with pytest.raises(MeterUnavailable) as refusal:
            await frontend.accepts("r3")
        frontend.log.projected(frontend.log.durable_seq)
        await frontend.accepts("r3")
        return refusal.value

    assert "ledger" in run(story()).what


def test_the_first_settlement_wins(start, run, disk, told):
    """A cancellation that races with the end of the stream must not change what was charged."""
    frontend = start()

    async def story():
        await frontend.accepts("r1")
        ends = [
            frontend.log.settle(frontend.ending("r1", 5)),
            frontend.log.settle(frontend.ending("r1", 9, outcome=Outcome.CANCELLED)),
        ]
        await frontend.until_done(asyncio.gather(*ends))
        await frontend.ends("r1", tokens=9)

    run(story())

    assert told(disk) == {"r1": [("reserve", 0, 0), ("ok", 5, 16_400)]}


def test_a_settlement_without_a_hold_is_not_acknowledged(start, run):
    with pytest.raises(MeterUnavailable):
        run(start().ends("never-opened"))


def test_a_stream_that_runs_ahead_is_noted_before_the_interval_is_over(start, run, disk, told):
    """The published bound is 64 tokens or one second, whichever comes first."""
    frontend = start(checkpoint_tokens=64)

    async def story():
        await frontend.accepts("r1")
        await frontend.flushes()
        frontend.delivers("r1", 63)
        frontend.turn()
        assert told(disk)["r1"] == [("reserve", 0, 0)]
        frontend.delivers("r1", 64)
        frontend.turn()

    run(story())

    assert told(disk)["r1"] == [("reserve", 0, 0), ("checkpoint", 64, 0)]


def test_a_slow_stream_is_noted_once_the_interval_is_over(start, run, disk, told):
    frontend = start(checkpoint_s=1.0)

    async def story():
        await frontend.accepts("r1")
        frontend.delivers("r1", 1)
        frontend.clock.advance(ms=999)
        frontend.turn()
        assert told(disk)["r1"] == [("reserve", 0, 0)]
        frontend.clock.advance(ms=1)
        frontend.turn()

    run(story())

    assert told(disk)["r1"] == [("reserve", 0, 0), ("checkpoint", 1, 0)]


def test_the_writer_sleeps_no_longer_than_until_checkpoints_are_due(start, run):
    """Whatever wakes it in between must not put them off."""
    frontend = start(checkpoint_s=1.0)
    run(frontend.flushes())
    frontend.clock.advance(ms=750)
    run(frontend.accepts("r1"))

    assert frontend.writer.pause_s == pytest.approx(0.25)


def test_a_checkpoint_after_the_end_is_ignored(start, run, disk, told):
    frontend = start()

    async def story():
        await frontend.accepts("r1")
        frontend.delivers("r1", 4)
        await frontend.ends("r1")
        frontend.delivers("r1", 99)
        frontend.delivers("unknown", 1)
        await frontend.flushes()

    run(story())

    assert told(disk) == {"r1": [("reserve", 0, 0), ("ok", 5, 16_400)]}


@pytest.mark.parametrize("turns", [0, 1])
def test_a_caller_who_hangs_up_while_waiting_leaves_a_cancelled_record(
    turns, start, run, disk, told, read
):
    """Nobody else would ever close it. Before the write, and in the moment after it."""
    frontend = start()

    async def story():
        waiting = asyncio.create_task(frontend.log.open(frontend.opening("r1")))
        await asyncio.sleep(0)
        for _ in range(turns):
            frontend.turn()
            await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await frontend.flushes()
        await frontend.flushes()

    run(story())

    assert told(disk)["r1"] == [("reserve", 0, 0), ("void", 0, 0)]
    assert read(disk)[-1].event.void.outcome == "cancelled"


def test_a_full_queue_refuses_the_next_request_and_keeps_the_others(start, run, disk, told):
    """Dropping one would be unmetered work; waiting without a bound would be no answer."""
    frontend = start(queue_max=3)

    async def story():
        await frontend.accepts("open")
        waiting = [
            asyncio.create_task(frontend.log.open(frontend.opening(f"r{i}"))) for i in range(3)
        ]
        await asyncio.sleep(0)
        with pytest.raises(MeterUnavailable) as refusal:
            await frontend.log.open(frontend.opening("one-too-many"))
        await frontend.ends("open")
        await asyncio.gather(*waiting)
        return refusal.value

    assert run(story()).retry_after_ms == 250
    assert set(told(disk)) == {"open", "r0", "r1", "r2"}


def test_more_open_requests_than_a_segment_can_carry_on_are_refused(start, run, disk):
    """A quarter of 64 KiB: 16 KiB of holds. Without the bound a new segment could not begin."""
    frontend = start()

    async def story():
        openings = [frontend.log.open(frontend.opening(f"r{i}")) for i in range(200)]
        gathered = asyncio.gather(*openings, return_exceptions=True)
        answers = await frontend.until_done(gathered)
        await frontend.ends("r0")
        await frontend.accepts("one-more")
        return [answer for answer in answers if answer is not None]

    refusals = run(story())
    assert all(isinstance(refusal, MeterUnavailable) for refusal in refusals)
    assert "meter.segment_bytes" in refusals[0].fix
    assert 40 < len(verify(FOLDER, files=disk).open) < 100


def test_everything_that_waits_shares_one_write(start, run, disk):
    """Group commit: a hundred requests, one fdatasync."""
    frontend = start(segment_bytes=1 << 20)

    async def story():
        before = disk.operations
        openings = [frontend.log.open(frontend.opening(f"r{i}")) for i in range(100)]
        await frontend.until_done(asyncio.gather(*openings))
        return disk.operations - before

    assert run(story()) == 2  # One write, one sync.


def test_a_stopping_frontend_writes_what_is_queued_and_refuses_the_rest(start, run, disk, told):
    frontend = start()

    async def story():
        last = [asyncio.create_task(frontend.log.open(frontend.opening(f"r{i}"))) for i in (1, 2)]
        await asyncio.sleep(0)
        frontend.log.close()
        await asyncio.gather(*last)
        with pytest.raises(MeterUnavailable):
            await frontend.log.open(frontend.opening("late"))

    run(story())

    assert set(told(disk)) == {"r1", "r2"}
    assert not frontend.log.healthy
    assert not frontend.failures


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        pytest.param({"hold_femto": -1}, AmountOutOfRange, id="a negative hold"),
        pytest.param({"hold_femto": 1 << 63}, AmountOutOfRange, id="a hold beyond 64 bits"),
        pytest.param({"key_id": "k\n1"}, InvalidRequest, id="a key id with a line break"),
        pytest.param({"model": "m\udc80"}, InvalidRequest, id="a model that is no text"),
        pytest.param({"model": "m" * 70_000}, InvalidRequest, id="more than a record takes"),
    ],
)
def test_what_cannot_be_recorded_is_refused_before_anything_is_written(
    fields, error, start, run, disk
):
    frontend = start()
    before = disk.operations

    with pytest.raises(error):
        run(frontend.accepts("r1", **fields))

    assert disk.operations == before
    assert frontend.log.healthy


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"charge_femto": -1}, id="a negative charge"),
        pytest.param({"charge_femto": 1 << 63}, id="a charge beyond 64 bits"),
        pytest.param({"usage": Usage(completion_tokens=1 << 63)}, id="more tokens than 64 bits"),
    ],
)
def test_a_settlement_that_overflows_is_refused_and_the_hold_stays(fields, start, run, disk, told):
    frontend = start()

    async def story():
        await frontend.accepts("r1")
        with pytest.raises(AmountOutOfRange):
            await frontend.ends("r1", **fields)
        await frontend.ends("r1")

    run(story())

    assert told(disk)["r1"][-1] == ("ok", 5, 16_400)


def test_whoever_waits_for_new_records_is_told(start, run):
    frontend = start()
    heard: list[int] = []
    frontend.log.on_durable(heard.append)

    async def story():
        await frontend.accepts("r1")
        await frontend.ends("r1")

    run(story())

    last = frontend.log.durable_seq
    assert heard == [last - 1, last]


def test_the_metrics_say_what_was_written(start, run):
    metrics = Metrics()
    frontend = start(metrics=metrics)

    async def story():
        await frontend.accepts("r1")
        frontend.clock.advance(seconds=7)
        await frontend.ends("r1")

    run(story())

    body = metrics.render()[0].decode()
    assert 'headrace_meter_events_total{stored="yes"} 2.0' in body
    assert "headrace_meter_healthy 1.0" in body
    assert "headrace_meter_sync_seconds_count 2.0" in body
    assert "headrace_meter_segment_age_seconds 7.0" in body


def real_log(folder: Path, **options) -> MeterLog:
    return MeterLog(folder, clock=SystemClock(), epoch="e", was_used=lambda *_: False, **options)


def test_on_a_real_disk_with_its_thread(tmp_path, start, run, disk):
    """The same through the kernel: 500 requests, over several segments."""
    folder = tmp_path / "home" / "log"
    scribe = start()
    log = real_log(folder, config=MeterConfig(segment_bytes=64 << 10))
    new = threading.Event()
    log.on_durable(lambda _: new.set())

    async def one(name: str):
        await log.open(scribe.opening(name))
        await log.settle(scribe.ending(name, 5))

    async def story():
        for first in range(0, 500, 25):
            await asyncio.gather(*(one(f"r{i}") for i in range(first, first + 25)))

    run(story())
    log.close()

    assert new.is_set()
    verified = verify(folder)
    assert (verified.open, verified.torn_bytes) == ([], 0)
    assert verified.segments > 1
    assert len(LogReader(folder).after(0)) == verified.records == verified.last_seq
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}


def test_two_writers_of_one_log_are_refused(tmp_path):
    first = real_log(tmp_path)

    with pytest.raises(ConfigRefused) as refusal:
        real_log(tmp_path)

    assert "in use" in refusal.value.what
    first.close()
    real_log(tmp_path).close()


def test_a_disk_without_room_for_a_first_segment_is_refused(tmp_path):
    class Full(LocalFiles):
        def create(self, path, size):
            if path.name == "spare":
                raise OSError(28, "No space left on device")
            return super().create(path, size)

    with pytest.raises(MeterUnavailable):
        real_log(tmp_path, files=Full())
    real_log(tmp_path).close()
