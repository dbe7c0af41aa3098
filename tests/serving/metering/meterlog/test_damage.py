"""A damaged log is named, by file, offset and record; nothing of it is passed over."""

import asyncio
import contextlib
import random
from pathlib import Path

import google_crc32c
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.serving.errors import MeterLogDamaged
from headrace.serving.metering.meterlog import format as fmt
from headrace.serving.metering.meterlog.reader import LogReader
from headrace.serving.metering.meterlog.verify import verify
from headrace.serving.testing.sim_disk import SimDisk, Survival

FOLDER = Path("/log")
FIRST, SECOND, THIRD = (FOLDER / f"0000000{n}.seg" for n in (1, 2, 3))


@pytest.fixture
def log(start, disk) -> SimDisk:
    """Three segments, two of them sealed; one batch for each record."""
    frontend = start()

    async def life():
        for name in ("r1", "r2", "r3"):
            await frontend.accepts(name)
            await frontend.ends(name)
            if name != "r3":
                frontend.clock.advance(seconds=3600)
                frontend.turn()
        await frontend.accepts("open")
        frontend.delivers("open", 3)
        await frontend.flushes()
        await frontend.refuses("last#1")

    asyncio.run(life())
    frontend.log.close()
    return disk.after_kill()


def used(disk: SimDisk, path: Path) -> int:
    return len(disk.read(path).rstrip(b"\0"))


def test_a_sound_log_is_verified(log):
    verified = verify(FOLDER, files=log)

    assert (verified.segments, verified.sealed, verified.torn_bytes) == (3, 2, 0)
    assert [hold.request_id for hold in verified.open] == ["open"]
    assert verified.records == verified.last_seq == len(LogReader(FOLDER, files=log).after(0))


@pytest.mark.parametrize("path", [FIRST, SECOND], ids=["the first segment", "the second segment"])
def test_any_flipped_bit_of_a_sealed_segment_is_found(path, log):
    for offset in range(used(log, path)):
        log.flip(path, offset, bit=offset % 8)
        with pytest.raises(MeterLogDamaged) as found:
            verify(FOLDER, files=log)
        assert path.name in found.value.what or THIRD.name in found.value.what
        with pytest.raises(MeterLogDamaged):
            LogReader(FOLDER, files=log).after(0)
        log.flip(path, offset, bit=offset % 8)
    verify(FOLDER, files=log)


def test_any_flipped_bit_of_the_last_segment_stops_a_start(log, start):
    """But in the very last record: it looks as one that was torn, and is taken back aloud."""
    end = used(log, THIRD)
    *_, last = fmt.frames(log.read(THIRD), offset=fmt.HEADER_BYTES, seq=log_first_seq(log))
    for offset in range(last.offset):
        log.flip(THIRD, offset, bit=offset % 8)
        with pytest.raises(MeterLogDamaged) as found:
            start(log, epoch="next")
        assert THIRD.name in found.value.what
        log.flip(THIRD, offset, bit=offset % 8)
    log.flip(THIRD, last.offset + 30)

    assert verify(FOLDER, files=log).torn_bytes == end - last.offset


def log_first_seq(disk: SimDisk) -> int:
    return fmt.read_header(disk.read(THIRD), THIRD).first_seq


def test_a_flipped_bit_within_one_write_of_many_records_is_no_torn_write(start, disk, run):
    """Records that follow it prove that the sectors around it had reached the disk."""
    frontend = start()

    async def life():
        openings = [frontend.log.open(frontend.opening(f"r{i}")) for i in range(8)]
        await frontend.until_done(asyncio.gather(*openings))

    run(life())
    *_, seventh, _ = fmt.frames(disk.read(FIRST), offset=fmt.HEADER_BYTES, seq=fmt.FIRST_SEQ)
    disk.flip(FIRST, seventh.offset + 40)

    with pytest.raises(MeterLogDamaged) as found:
        start(disk.after_kill(), epoch="next")

    assert f"byte {seventh.offset:,}, record {seventh.seq}" in found.value.what


def test_a_sector_of_zeros_before_a_later_write_is_damage(start, disk, run):
    """The later write came after a sync, so that sector had been durable."""
    frontend = start()

    async def life():
        for i in range(8):
            await frontend.accepts(f"r{i}")

    run(life())
    sector = slice(2 * fmt.SECTOR_BYTES, 3 * fmt.SECTOR_BYTES)
    disk._names[FIRST].data[sector] = bytes(fmt.SECTOR_BYTES)

    with pytest.raises(MeterLogDamaged, match="a later write follows"):
        start(disk.after_kill(), epoch="next")


@pytest.mark.parametrize("seed", range(40))
def test_sectors_that_a_power_cut_lost_out_of_order_are_no_damage(seed, start, run):
    """A write of many sectors: the disk may keep the last and lose the first."""
    disk = SimDisk()
    frontend = start(disk)

    async def life():
        await frontend.accepts("durable")
        disk.cut_at = disk.operations + 1
        openings = [frontend.log.open(frontend.opening(f"r{i}")) for i in range(20)]
        await frontend.until_done(asyncio.gather(*openings, return_exceptions=True))

    run(life())
    left = disk.after_power_cut(random.Random(seed), Survival.SECTORS)

    assert start(left, epoch="next").log.recovered >= 1
    assert verify(FOLDER, files=left).torn_bytes == 0


@pytest.mark.parametrize("path", [FIRST, SECOND], ids=["the first", "one in the middle"])
def test_a_missing_segment_is_named(path, log, start):
    log.delete(path)

    for reads in (
        lambda: verify(FOLDER, files=log),
        lambda: start(log, epoch="next"),
        lambda: LogReader(FOLDER, files=log).after(0),
    ):
        with pytest.raises(MeterLogDamaged, match=f"{path.name}.*missing"):
            reads()


def test_a_missing_last_segment_is_missed_by_whoever_read_it(log):
    """Nothing in the log can say that it once was longer; the ledger knows how far it was."""
    last = verify(FOLDER, files=log).last_seq
    log.delete(THIRD)

    with pytest.raises(MeterLogDamaged, match="which was read from it before"):
        LogReader(FOLDER, files=log).after(last)


def test_a_log_without_its_name_is_refused(log, start):
    log.delete(FOLDER / "log_id")

    with pytest.raises(MeterLogDamaged, match="log_id"):
        start(log, epoch="next")


def test_a_segment_of_another_log_is_refused(log, start):
    other = SimDisk()
    start(other).log.close()
    stranger, data = log._names[THIRD], other._names[FIRST].data
    header = fmt.read_header(bytes(data), FIRST)
    stranger.data[: fmt.HEADER_BYTES] = fmt.Header(
        log_id=header.log_id, number=3, first_seq=log_first_seq(log), previous_chain=fmt.GENESIS
    ).to_bytes()

    for reads in (lambda: verify(FOLDER, files=log), lambda: start(log, epoch="next")):
        with pytest.raises(MeterLogDamaged, match="of log"):
            reads()


def forge(disk: SimDisk, path: Path, *, at: int, change) -> None:
    """Change a record and give it a checksum that is right, as somebody with an editor could."""
    data = disk._names[path].data
    first = fmt.read_header(bytes(data), path).first_seq
    frame = list(fmt.frames(bytes(data), offset=fmt.HEADER_BYTES, seq=first))[at]
    forged = b"".join(fmt.pack([change(frame.payload)], frame.seq))
    assert len(forged) == frame.end - frame.offset
    data[frame.offset : frame.end] = forged


def test_a_forged_record_of_a_sealed_segment_is_found_by_its_root(log):
    forge(log, FIRST, at=2, change=lambda payload: payload.replace(b"acme", b"zeta"))

    with pytest.raises(MeterLogDamaged, match=r"Merkle root|another request"):
        verify(FOLDER, files=log)


def test_an_end_of_another_request_is_found(log):
    forge(log, THIRD, at=2, change=lambda payload: payload.replace(b"r3", b"rX"))

    with pytest.raises(MeterLogDamaged, match="of another request"):
        verify(FOLDER, files=log)


def test_a_segment_of_another_format_is_left_alone(log, start):
    data = log._names[THIRD].data
    body = bytes(data[: fmt.HEADER_BYTES - 4]).replace(b"HRMETER\0\1", b"HRMETER\0\2")
    data[: fmt.HEADER_BYTES] = body + google_crc32c.value(body).to_bytes(4, "little")

    with pytest.raises(MeterLogDamaged, match="format 2"):
        start(log, epoch="next")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_whatever_bytes_stand_in_a_segment_the_answer_is_records_or_damage(data):
    """No input makes a reader crash, or answer a record whose checksum is wrong."""
    junk = data.draw(st.binary(max_size=400))
    header = fmt.Header(log_id="0" * 32, number=1, first_seq=1, previous_chain=fmt.GENESIS)
    whole = b"".join(fmt.pack([b"abc", b"defg"], 1))
    segment = header.to_bytes() + whole + junk + bytes(300)

    found = list(fmt.frames(segment, offset=fmt.HEADER_BYTES, seq=1))
    with contextlib.suppress(MeterLogDamaged):
        fmt.check_tail(segment, FIRST, offset=found[-1].end, seq=found[-1].seq + 1)

    assert [frame.payload for frame in found[:2]] == [b"abc", b"defg"]
