"""What a reader promises beside a writer: everything, in order, once, and only what is durable."""

import asyncio
from pathlib import Path

import pytest

from headrace.serving.errors import MeterLogDamaged, MeterUnavailable
from headrace.serving.metering.meterlog.reader import CHUNK_BYTES, LogReader
from headrace.serving.testing.sim_disk import SimDisk

FOLDER = Path("/log")


async def serves(frontend, names) -> None:
    for name in names:
        await frontend.accepts(name)
        await frontend.ends(name)


def seqs(records) -> list[int]:
    return [record.seq for record in records]


def test_records_come_in_order_across_segments_while_they_are_written(start, run, disk):
    frontend = start(segment_bytes=16 << 10)
    reader = LogReader(FOLDER, files=disk, durable_seq=lambda: frontend.log.durable_seq)
    seen: list[int] = []

    async def story():
        for n in range(200):
            await serves(frontend, [f"r{n}"])
            seen.extend(seqs(reader.after(seen[-1] if seen else 0)))

    run(story())

    assert len([name for name in disk.names(FOLDER) if name.endswith(".seg")]) > 2
    assert seen == list(range(1, frontend.log.durable_seq + 1))
    assert reader.after(seen[-1]) == []


@pytest.mark.parametrize("limit", [1, 7, 10_000])
def test_any_place_can_be_asked_for(limit, start, run, disk):
    frontend = start()
    run(serves(frontend, [f"r{n}" for n in range(200)]))
    last = frontend.log.durable_seq
    reader = LogReader(FOLDER, files=disk)

    for after in [0, last - 1, 17, last // 2, last // 2 + 1, last, 3]:
        expected = list(range(after + 1, min(after + limit, last) + 1))
        assert seqs(reader.after(after, limit=limit)) == expected


def test_a_record_says_which_log_it_is_of(start, run, disk):
    frontend = start()
    run(serves(frontend, ["r1"]))

    records = LogReader(FOLDER, files=disk).after(0)

    assert {record.log_id for record in records} == {frontend.log.log_id}
    kinds = [record.event.WhichOneof("kind") for record in records]
    assert kinds == ["carry", "epoch", "reserve", "settle"]


def test_reading_on_costs_what_is_new(start, run, disk):
    """A projector that is behind by one record must not read the month."""
    frontend = start(segment_bytes=1 << 20)
    run(serves(frontend, [f"r{n}" for n in range(1000)]))
    reader = LogReader(FOLDER, files=disk)
    records = reader.after(0)
    run(serves(frontend, ["one-more"]))
    sizes: list[int] = []
    real_read = disk.read
    disk.read = lambda path, **how: (sizes.append(how.get("size") or 0), real_read(path, **how))[1]

    new = reader.after(records[-1].seq)

    assert len(new) == 2
    assert sum(sizes) <= 2 * CHUNK_BYTES


def test_a_reader_of_another_process_syncs_before_it_answers(start, run, disk):
    """It cannot know what the writer has synced, and the kernel shows more than the disk has."""
    frontend = start()
    run(serves(frontend, ["r1"]))
    reader, done = LogReader(FOLDER, files=disk), []
    disk.before = lambda operation, path: done.append((operation, path.name))

    reader.after(0)

    assert done == [("sync", "00000001.seg")]
    assert reader.after(frontend.log.durable_seq) == []
    assert len(done) == 1


def test_what_is_being_written_is_no_damage(start, run, disk):
    """A reader may see half of a write; it waits for the rest."""
    frontend = start()
    run(serves(frontend, ["r1"]))
    reader = LogReader(FOLDER, files=disk)
    seen = reader.after(0)
    inode = disk._names[FOLDER / "00000001.seg"]
    end = len(inode.data.rstrip(b"\0"))
    run(serves(frontend, ["r2"]))
    whole = bytes(inode.data)
    inode.data[end + 100 :] = bytes(len(whole) - end - 100)

    assert reader.after(seen[-1].seq) == []
    inode.data[:] = whole
    assert len(reader.after(seen[-1].seq)) == 2


def test_a_read_beside_a_write_that_saw_later_pages_first_is_read_again(start, run, disk):
    frontend = start()
    run(serves(frontend, ["r1", "r2"]))
    reader, real_read, reads = LogReader(FOLDER, files=disk), disk.read, []

    def torn_read(path, *, offset=0, size=None):
        data = real_read(path, offset=offset, size=size)
        reads.append(path.name)
        if path.suffix == ".seg" and size == CHUNK_BYTES and reads.count(path.name) == 2:
            return bytes(200) + data[200:]
        return data

    disk.read = torn_read

    assert seqs(reader.after(0)) == list(range(1, frontend.log.durable_seq + 1))


def test_a_durable_record_that_is_not_there_is_damage(start, run, disk):
    frontend = start()
    run(serves(frontend, ["r1"]))
    reader = LogReader(FOLDER, files=disk, durable_seq=lambda: frontend.log.durable_seq + 1)

    with pytest.raises(MeterLogDamaged, match="was durable and is not there"):
        reader.after(0)


def test_no_log_means_no_records(tmp_path):
    reader = LogReader(tmp_path / "nowhere")

    assert reader.after(0) == []
    with pytest.raises(MeterUnavailable):
        _ = reader.log_id


def test_a_disk_that_does_not_answer_is_no_empty_log(start, run, disk):
    run(serves(start(), ["r1"]))

    def dead(path, *, offset=0, size=None):
        raise OSError(5, "Input/output error", str(path))

    disk.read = dead

    with pytest.raises(MeterUnavailable):
        LogReader(FOLDER, files=disk).after(0)


def test_two_readers_do_not_disturb_each_other(start, run):
    disk = SimDisk()
    frontend = start(disk)

    async def story():
        readers = [LogReader(FOLDER, files=disk) for _ in range(2)]
        seen: list[list[int]] = [[], []]
        for n in range(20):
            await serves(frontend, [f"r{n}"])
            mine = n % 2
            seen[mine] += seqs(readers[mine].after(seen[mine][-1] if seen[mine] else 0))
            await asyncio.sleep(0)
        return seen

    first, second = run(story())

    assert second[: len(first)] == first
