"""What the usage records promise when a process dies, however and whenever it does."""

import asyncio
import random
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from headrace.serving.errors import ConfigRefused

BUSY_FRONTEND = Path(__file__).parent / "busy_frontend.py"
NANO_A_TOKEN = 1_000


def killed_after(lines: int, ledger: Path, epoch: str) -> list[list[str]]:
    """Serve in another process, SIGKILL it after so many acknowledgements; what it had said."""
    command = [sys.executable, str(BUSY_FRONTEND), str(ledger), epoch]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        said = [process.stdout.readline() for _ in range(lines)]
        process.kill()
        said += process.stdout.readlines()
    # A line that the kill cut short was not said.
    return [line.split() for line in said if line.endswith("\n")]


def integrity(ledger: Path) -> str:
    with closing(sqlite3.connect(ledger)) as connection:
        return connection.execute("PRAGMA integrity_check").fetchone()[0]


@pytest.mark.parametrize("seed", range(6))
def test_a_killed_frontend_loses_nothing_that_it_had_acknowledged(seed, path, start):
    """Three lives, each killed at a random moment, then one that puts things in order."""
    rng = random.Random(seed)
    said: list[list[str]] = []
    for life in range(3):
        said += killed_after(rng.randrange(1, 400), path, f"life-{life}")

    ledger = start("the-last").ledger()

    assert integrity(path) == "ok"
    for word, *rest in said:
        if word == "O":
            assert ledger[rest[0]][0] in ("ok", "recovered"), rest
        if word == "S":
            assert ledger[rest[0]] == ("ok", int(rest[1]), (10 + int(rest[1])) * NANO_A_TOKEN)
    assert not [each for each in ledger.values() if each[0] == "open"]


def test_a_crash_settles_at_the_last_checkpoint_and_at_the_frozen_price(path, start, run):
    """6 fresh, 4 cached and 7 completion tokens: 6 * 1000 + 4 * 100 + 7 * 2000 = 20,400 nano."""
    crashed = start("life-1")

    async def story():
        await crashed.accepts("streaming")
        await crashed.accepts("waiting")
        crashed.delivers("streaming", 7)
        await crashed.store.flush()
        crashed.delivers("streaming", 9)

    run(story())
    crashed.dies()
    after = start("life-2")

    assert after.store.recovered == 2
    assert after.ledger() == {"streaming": ("recovered", 7, 20_400), "waiting": ("recovered", 0, 0)}


def test_a_recovery_happens_once(path, start, run):
    crashed = start("life-1")
    run(crashed.accepts("r1"))
    crashed.store.close()

    lives = [start(f"life-{i}") for i in (2, 3)]

    assert [life.store.recovered for life in lives] == [1, 0]


def test_a_frontend_that_is_alive_keeps_its_requests_when_another_starts(path, start, run):
    """Two frontends may share a file; neither may settle what the other is streaming."""
    first = start("frontend-a")

    async def story():
        await first.accepts("r1")
        second = start("frontend-b")
        await second.accepts("r2")
        await first.ends("r1", tokens=5)
        return second

    second = run(story())

    assert second.store.recovered == 0
    assert second.ledger() == {"r1": ("ok", 5, 16_400), "r2": ("open", 0, 0)}


def test_a_frontend_with_a_fixed_name_recovers_its_own_former_life(path, start, run):
    former = start("frontend-0")
    run(former.accepts("r1"))
    former.store.close()

    assert start("frontend-0").store.recovered == 1


def test_two_live_frontends_of_one_name_are_refused(path, start):
    start("frontend-0")

    with pytest.raises(ConfigRefused):
        start("frontend-0")


def test_whatever_statement_is_the_last_one_the_records_are_whole(path, start, run, tricky):
    """The files are copied before every statement, as a kill would leave them, and reopened."""
    opened: set[str] = set()
    settled: set[str] = set()
    copies: list[tuple[Path, set[str], set[str]]] = []

    def before(statement: str) -> None:
        copy = path.parent / f"killed-at-{len(copies)}"
        copy.mkdir()
        for file in path.parent.glob("ledger.db*"):
            if file.is_file() and not file.name.endswith("-shm"):
                shutil.copy(file, copy)
        copies.append((copy, set(opened), set(settled)))

    frontend = start("life-1", connect=tricky(before))

    async def serve(name: str) -> None:
        await frontend.accepts(name)
        opened.add(name)
        frontend.delivers(name, 3)
        await frontend.store.flush()
        await frontend.ends(name, tokens=5)
        settled.add(name)

    async def story():
        await serve("r0")
        await asyncio.gather(*(serve(f"r{i}") for i in range(1, 4)))

    run(story())
    assert len(copies) > 15

    for copy, was_opened, was_settled in copies:
        ledger = start("after", at=copy / path.name).ledger()
        assert was_opened <= ledger.keys()
        assert all(ledger[name] == ("ok", 5, 16_400) for name in was_settled)
        unsettled = {ledger[name] for name in ledger.keys() - was_settled}
        assert unsettled <= {("recovered", 0, 0), ("recovered", 3, 12_400), ("ok", 5, 16_400)}
