"""What the usage records promise when the disk does not do as it is told."""

import asyncio
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from headrace.serving.errors import MeterUnavailable

BUSY_FRONTEND = Path(__file__).parent / "busy_frontend.py"


class Disk:
    """Counts statements; the n-th one of each kind given, and it alone, meets an error."""

    def __init__(self, fails_at: int, error: Exception) -> None:
        self.statements = 0
        self.fails_at = fails_at
        self.error = error

    def before(self, statement: str) -> None:
        self.statements += 1
        if self.statements == self.fails_at:
            raise self.error


async def healed(frontend) -> None:
    """Each event makes a store with probe_s=0 try again."""
    while not frontend.store.healthy:
        await asyncio.gather(frontend.store.flush(), return_exceptions=True)


async def two_requests(frontend) -> dict[str, set[str]]:
    """Serve two requests; which acknowledgements were given."""
    acknowledged: dict[str, set[str]] = {"opened": set(), "settled": set(), "refused": set()}
    for name in ("r1", "r2"):
        try:
            await frontend.accepts(name)
        except MeterUnavailable:
            await healed(frontend)
            continue
        acknowledged["opened"].add(name)
        frontend.delivers(name, 3)
        await asyncio.gather(frontend.store.flush(), return_exceptions=True)
        try:
            await frontend.ends(name, tokens=5)
            acknowledged["settled"].add(name)
        except MeterUnavailable:
            acknowledged["refused"].add(name)
            await healed(frontend)
    return acknowledged


def test_an_error_at_any_statement_loses_nothing_and_charges_nothing_unconfirmed(
    tmp_path, start, run, tricky
):
    """One I/O error at statement n, for every n that two requests take."""
    fails_at = 0
    while True:
        fails_at += 1
        disk = Disk(fails_at, sqlite3.OperationalError("disk I/O error"))
        path = tmp_path / f"{fails_at}.db"
        try:
            frontend = start("life-1", at=path, connect=tricky(disk.before))
        except MeterUnavailable:
            frontend = start("life-1", at=path)
        said = run(two_requests(frontend))
        ledger = frontend.ledger()
        assert said["opened"] <= ledger.keys()
        for name in said["settled"]:
            assert ledger[name] == ("ok", 5, 16_400), fails_at
        for name in said["refused"]:
            assert ledger[name] == ("failed", 5, 0), fails_at
        if disk.statements < fails_at:
            break
    assert fails_at > 15


class FullDisk:
    """Every statement that would write meets the end of the disk, until there is room."""

    def __init__(self) -> None:
        self.is_full = False

    def before(self, statement: str) -> None:
        if self.is_full and statement.lstrip().startswith(("INSERT", "UPDATE")):
            raise sqlite3.OperationalError("database or disk is full")


def test_a_full_disk_refuses_work_and_charges_nothing_that_was_not_confirmed(start, run, tricky):
    """The stream's caller never got its final message, so it owes nothing."""
    disk = FullDisk()
    frontend = start("life-1", connect=tricky(disk.before))

    async def story():
        await frontend.accepts("streaming")
        disk.is_full = True
        with pytest.raises(MeterUnavailable):
            await frontend.accepts("refused")
        with pytest.raises(MeterUnavailable):
            await frontend.ends("streaming", tokens=5)
        assert not frontend.store.healthy
        disk.is_full = False
        await healed(frontend)
        await frontend.accepts("afterwards")

    run(story())

    assert frontend.ledger() == {"streaming": ("failed", 5, 0), "afterwards": ("open", 0, 0)}


def test_a_file_that_may_not_grow_still_settles_what_was_accepted(start, run, tricky):
    """A settlement changes a row in place; SQLite's own page bound stands in for the disk's."""
    connections = []

    def connect(path: Path):
        connections.append(tricky(lambda _: None)(path))
        return connections[-1]

    frontend = start("life-1", connect=connect)

    async def story():
        await frontend.accepts("streaming")
        connections[-1].execute("PRAGMA max_page_count = 1")
        attempts = [frontend.accepts(f"r{i}") for i in range(1_000)]
        answers = await asyncio.gather(*attempts, return_exceptions=True)
        assert any(isinstance(answer, MeterUnavailable) for answer in answers)
        await healed(frontend)
        await frontend.ends("streaming", tokens=5)

    run(story())

    assert frontend.ledger()["streaming"] == ("ok", 5, 16_400)


def test_a_process_that_hits_the_systems_own_limit_heals(path, start):
    """A real EFBIG from the kernel, in the middle of a write."""
    command = [sys.executable, str(BUSY_FRONTEND), str(path), "life-1", "300000"]
    process = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    said = [line.split() for line in process.stdout.splitlines()]
    ledger = start("life-2").ledger()

    assert ["FULL", "METER_UNAVAILABLE"] in said
    assert said[-1] == ["HEALED"]
    assert all(ledger[name][0] == "ok" for word, name, *_ in _acknowledged(said) if word == "S")
    assert {word for word, *_ in ledger.values()} <= {"ok", "failed", "recovered"}


def _acknowledged(said: list[list[str]]) -> list[list[str]]:
    return [words for words in said if words[0] in ("O", "S")]


def test_a_file_that_is_removed_under_us_is_noticed_before_work_is_accepted(path, start, run):
    """Writes to a removed file succeed, and are lost with it."""
    frontend = start("life-1")

    async def story():
        await frontend.accepts("r1")
        for file in path.parent.glob("ledger.db*"):
            if file.is_file():
                file.unlink()
        with pytest.raises(MeterUnavailable):
            await frontend.accepts("r2")
        await healed(frontend)
        await frontend.accepts("r3")

    run(story())

    assert frontend.ledger() == {"r3": ("open", 0, 0)}


def test_a_defect_in_the_writer_answers_everybody_and_accepts_nothing(start, run, tricky):
    """A caller that waits for ever would be worse than one that is refused."""
    disk = Disk(1 << 30, ZeroDivisionError("a defect"))
    frontend = start("life-1", connect=tricky(disk.before))

    async def story():
        disk.fails_at = disk.statements + 1
        waiting = [frontend.accepts(f"r{i}") for i in range(3)]
        answers = await asyncio.gather(*waiting, return_exceptions=True)
        with pytest.raises(MeterUnavailable):
            await frontend.ends("r1")
        return answers

    assert all(isinstance(answer, MeterUnavailable) for answer in run(story()))
    assert not frontend.store.healthy


def test_checkpoints_survive_a_failed_write(start, run, tricky):
    disk = Disk(1 << 30, sqlite3.OperationalError("disk I/O error"))
    frontend = start("life-1", connect=tricky(disk.before))

    async def story():
        await frontend.accepts("r1")
        frontend.delivers("r1", 7)
        disk.fails_at = disk.statements + 1
        with pytest.raises(MeterUnavailable):
            await frontend.store.flush()
        await healed(frontend)
        await frontend.store.flush()

    run(story())

    assert frontend.ledger() == {"r1": ("open", 7, 0)}
