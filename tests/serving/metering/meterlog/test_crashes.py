"""What the meter log promises when the power goes, the process dies, or the disk lies."""

import asyncio
import contextlib
import random
from pathlib import Path

import pytest

from headrace.serving.domain.usage import Outcome
from headrace.serving.errors import MeterUnavailable
from headrace.serving.metering.meterlog.reader import LogReader
from headrace.serving.metering.meterlog.verify import verify
from headrace.serving.testing.sim_disk import Fault, SimDisk, Survival

FOLDER = Path("/log")
OK5 = ("ok", 5, 16_400)


class Acknowledged:
    """What a frontend said was durable, before it died."""

    def __init__(self) -> None:
        self.opened: set[str] = set()
        self.settled: set[str] = set()
        self.refused: set[str] = set()

    def holds_in(self, told: dict[str, list[tuple[str, int, int]]]) -> None:
        """Nothing that was said is lost, nothing is charged twice or beyond what was delivered."""
        for name in self.opened:
            ends = [entry for entry in told[name] if entry[0] not in ("reserve", "checkpoint")]
            assert len(ends) == 1, (name, told[name])
            assert ends[0] in (OK5, ("recovered", 3, 12_400), ("expire", 0, 0)), (name, ends)
        for name in self.settled:
            assert told[name][-1] == OK5, (name, told[name])
        for name in self.refused:
            assert told[name] == [("refuse", 0, 0)]


async def scripted_life(frontend, said: Acknowledged) -> None:
    """Requests of every kind, through a sealed segment and back; ends early with the power."""

    async def serve(name: str) -> None:
        await frontend.accepts(name)
        said.opened.add(name)
        frontend.delivers(name, 3)
        await frontend.flushes()
        await frontend.ends(name)
        said.settled.add(name)

    with contextlib.suppress(MeterUnavailable):
        await serve("r0")
        await frontend.accepts("stays-open")
        said.opened.add("stays-open")
        await frontend.refuses("no#1")
        said.refused.add("no#1")
        await asyncio.gather(*(serve(f"r{i}") for i in range(1, 4)))
        frontend.clock.advance(seconds=3600)
        frontend.turn()
        frontend.turn()
        await serve("r4")


def test_power_cut_after_any_operation(start, told):
    """Every operation of a scripted life, and after each everything that a disk may have kept."""
    cut_at, lives = 0, 0
    while True:
        for survival in Survival:
            disk, said = SimDisk(), Acknowledged()
            disk.cut_at = cut_at
            try:
                asyncio.run(scripted_life(start(disk), said))
            except MeterUnavailable:
                assert not said.opened
            was_cut = disk.operations >= cut_at
            left = disk.after_power_cut(random.Random(cut_at), survival)
            start(left, epoch="after").log.close()
            said.holds_in(told(left))
            lives += 1
        if not was_cut:
            break
        cut_at += 1
    assert cut_at > 40
    assert said.settled == {"r0", "r1", "r2", "r3", "r4"}


def test_power_cut_after_any_operation_of_a_recovery(start, told, read):
    """Closing what a dead frontend left may itself be cut off, and then done again."""
    crashed = SimDisk()
    said = Acknowledged()
    asyncio.run(scripted_life(start(crashed), said))
    cut_at = 0
    while True:
        disk = crashed.after_power_cut(random.Random(1), Survival.NOTHING)
        disk.cut_at = cut_at
        with contextlib.suppress(MeterUnavailable):
            start(disk, epoch="recovers").log.close()
        was_cut = disk.operations >= cut_at
        left = disk.after_power_cut(random.Random(cut_at), Survival.SECTORS)
        start(left, epoch="again").log.close()
        said.holds_in(told(left))
        if not was_cut:
            break
        cut_at += 1
    assert cut_at > 3
    kinds = [record.event.WhichOneof("kind") for record in read(left)]
    assert kinds.count("expire") == 1


def test_a_crash_settles_at_the_last_checkpoint_and_at_the_frozen_price(start, run, disk, told):
    """6 fresh, 4 cached and 7 completion tokens: 6 * 1000 + 4 * 100 + 7 * 2000 = 20,400 nano."""
    crashed = start()

    async def story():
        await crashed.accepts("streaming")
        await crashed.accepts("waiting")
        crashed.delivers("streaming", 7)
        await crashed.flushes()
        crashed.delivers("streaming", 9)

    run(story())
    after = start(disk.after_kill(), epoch="next")

    assert after.log.recovered == 2
    assert told(disk) == {
        "streaming": [("reserve", 0, 0), ("checkpoint", 7, 0), ("recovered", 7, 20_400)],
        "waiting": [("reserve", 0, 0), ("expire", 0, 0)],
    }


def test_a_recovery_happens_once(start, run, disk):
    crashed = start()
    run(crashed.accepts("r1"))

    second = start(disk.after_kill(), epoch="b")
    third = start(disk.after_kill(), epoch="c")

    assert (second.log.recovered, third.log.recovered) == (1, 0)


def test_open_holds_outlive_the_segment_they_began_in(start, run, disk, told):
    """Recovery reads the last segment only, which carries on what was open, checkpoint and all."""
    crashed = start()

    async def story():
        await crashed.accepts("long")
        crashed.delivers("long", 3)
        await crashed.flushes()
        for _ in range(3):
            await crashed.accepts(f"r{crashed.clock.unix_ms()}")
            crashed.clock.advance(seconds=3600)
            crashed.turn()

    run(story())
    reads: list[str] = []
    left = disk.after_power_cut(random.Random(1), Survival.NOTHING)
    real_read = left.read
    left.read = lambda path, **how: (reads.append(path.name), real_read(path, **how))[1]
    start(left, epoch="next")

    assert set(reads) == {"log_id", "00000003.seg", "00000004.seg"}
    assert verify(FOLDER, files=left).sealed == 3
    assert told(left)["long"][-1] == ("recovered", 3, 12_400)


def test_open_holds_outlive_a_configuration_with_smaller_segments(start, run, disk, told):
    """Killed just after a Seal, with more open than a quarter of the new size."""
    crashed = start()

    async def story():
        for i in range(40):
            await crashed.accepts(f"r{i}")
        crashed.clock.advance(seconds=3600)
        disk.cut_at = disk.operations + 2
        crashed.turn()

    run(story())
    after = start(disk.after_kill(), epoch="next", segment_bytes=16 << 10)

    assert verify(FOLDER, files=disk).sealed == 1
    assert after.log.recovered == 40
    assert told(disk)["r7"] == [("reserve", 0, 0), ("expire", 0, 0)]


@pytest.mark.parametrize("fault", list(Fault), ids=lambda fault: fault.name)
def test_an_error_at_any_operation_stops_the_log_for_good(fault, start, told):
    """No write is tried again and nothing unconfirmed is acknowledged; the next start recovers.

    But setting room aside is no write to the log: without it, new work is refused for a while.
    """
    at = 0
    while True:
        disk, said = SimDisk(), Acknowledged()
        disk.faults = {at: fault}
        done: list[str] = []
        disk.before = lambda operation, _, done=done: done.append(operation)
        try:
            frontend = start(disk)
            asyncio.run(scripted_life(frontend, said))
        except MeterUnavailable:
            assert not said.opened
        else:
            if disk.operations > at and done[at] != "create" and len(said.settled) < 5:
                assert frontend.log.has_failed
                assert not frontend.log.healthy
                assert len(frontend.failures) == 1
                with pytest.raises(MeterUnavailable):
                    asyncio.run(frontend.accepts("later"))
        reached = disk.operations > at
        for left in (disk.after_power_cut(random.Random(at)), disk.after_kill()):
            start(left, epoch="after").log.close()
            # What the recovery relied on is durable, whatever the kernel showed it.
            cut = left.after_power_cut(random.Random(at), Survival.NOTHING)
            said.holds_in(told(left))
            start(cut, epoch="last").log.close()
            said.holds_in(told(cut))
        if not reached:
            break
        at += 1
    assert at > 40


def test_what_a_failed_sync_left_in_memory_is_not_believed(start, run, told):
    """The kernel shows the next process what the disk never got; it is written again first."""
    disk, said = SimDisk(), Acknowledged()
    frontend = start(disk)
    run(frontend.accepts("r1"))
    disk.faults = {disk.operations + 1: Fault.EIO}
    with pytest.raises(MeterUnavailable):
        run(frontend.ends("r1"))
    start(disk.after_kill(), epoch="next").log.close()
    assert told(disk)["r1"][-1] == OK5

    left = disk.after_power_cut(random.Random(1), Survival.NOTHING)

    start(left, epoch="last").log.close()
    assert told(left)["r1"] == told(disk)["r1"]
    said.holds_in(told(left))


def test_everybody_who_waits_hears_of_a_failure(start, run, disk):
    """A caller that waits for ever would be worse than one that is refused."""
    frontend = start()

    async def story():
        await frontend.accepts("open")
        disk.faults = {disk.operations: Fault.HALF}
        waiting = [frontend.log.open(frontend.opening(f"r{i}")) for i in range(3)]
        waiting.append(frontend.log.settle(frontend.ending("open", 5)))
        waiting.append(frontend.log.flush())
        return await frontend.until_done(asyncio.gather(*waiting, return_exceptions=True))

    answers = run(story())

    assert all(isinstance(answer, MeterUnavailable) for answer in answers)
    assert len(frontend.failures) == 1
    assert "Input/output error" in frontend.failures[0]


def test_a_defect_in_the_writer_answers_everybody_and_accepts_nothing(start, run, disk):
    frontend = start()

    def before(operation: str, _path: Path) -> None:
        if operation == "write":
            raise ZeroDivisionError("a defect")

    async def story():
        disk.before = before
        with pytest.raises(MeterUnavailable):
            await frontend.accepts("r1")
        with pytest.raises(MeterUnavailable):
            await frontend.accepts("r2")

    run(story())

    assert frontend.failures == ["the writer stopped"]


def test_a_full_disk_refuses_work_and_settles_what_was_accepted(start, run, told):
    """Two segments fit: the second is the room that is held in reserve."""
    disk = SimDisk(free_bytes=(128 << 10) + 100)
    frontend = start(disk)

    async def story():
        await frontend.accepts("streaming")
        accepted = 0
        while frontend.log.healthy:
            await frontend.accepts(f"r{accepted}")
            await frontend.ends(f"r{accepted}")
            accepted += 1
        assert accepted > 100
        with pytest.raises(MeterUnavailable, match="disk full"):
            await frontend.accepts("refused")
        frontend.delivers("streaming", 3)
        await frontend.flushes()
        disk.free_bytes += 64 << 10
        frontend.turn()
        await frontend.accepts("afterwards")
        await frontend.ends("streaming")

    run(story())

    assert frontend.log.healthy
    assert told(disk)["streaming"] == [("reserve", 0, 0), ("checkpoint", 3, 0), OK5]
    assert told(disk)["afterwards"] == [("reserve", 0, 0)]


def test_a_disk_that_is_full_is_asked_at_most_once_a_second(start, run):
    disk = SimDisk(free_bytes=(64 << 10) + 100)
    frontend = start(disk, probe_s=1.0)
    before = disk.operations

    async def story():
        for _ in range(10):
            frontend.clock.advance(ms=250)
            await frontend.flushes()

    run(story())

    assert disk.operations - before == 2
    assert not frontend.log.healthy


def test_a_full_disk_survives_a_restart(start, run, told):
    """What the dead frontend left open is closed in the segment that there is."""
    disk = SimDisk(free_bytes=(64 << 10) + 100)
    frontend = start(disk)
    assert not frontend.log.healthy

    again = start(disk.after_kill(), epoch="next")

    assert not again.log.healthy
    disk.free_bytes += 64 << 10
    again.turn()
    run(again.accepts("r1"))
    assert told(disk) == {"r1": [("reserve", 0, 0)]}


def test_on_a_full_disk_checkpoints_leave_room_for_settlements(start, run, told):
    """They only narrow what a crash could lose; without the settlement the stream is for free."""
    disk = SimDisk(free_bytes=(64 << 10) + 100)
    disk.free_bytes += 64 << 10
    frontend = start(disk)

    async def story():
        for i in range(40):
            await frontend.accepts(f"r{i}")
        while frontend.log.healthy:
            await frontend.refuses("filler#1")
        for tokens in range(3, 1000):
            for i in range(40):
                frontend.delivers(f"r{i}", tokens)
            await frontend.flushes()
        for i in range(40):
            await frontend.ends(f"r{i}")

    run(story())

    assert not frontend.failures
    assert all(told(disk)[f"r{i}"][-1] == OK5 for i in range(40))


def test_a_reader_answers_nothing_that_a_power_cut_takes_back(start, run, disk):
    """A ledger that had more than the log would disagree with it for ever."""
    frontend = start()
    run(frontend.accepts("r1"))
    disk.faults = {disk.operations + 1: Fault.EIO}
    with pytest.raises(MeterUnavailable):
        run(frontend.ends("r1"))
    bound = LogReader(FOLDER, files=disk, durable_seq=lambda: frontend.log.durable_seq)
    seen = bound.after(0)

    left = disk.after_power_cut(random.Random(1), Survival.NOTHING)

    kept = LogReader(FOLDER, files=left).after(0)
    assert [record.seq for record in seen] == [record.seq for record in kept]
    assert Outcome.OK not in [record.event.settle.outcome for record in seen]
