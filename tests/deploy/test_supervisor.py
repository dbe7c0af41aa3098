"""Processes that die are started again, in bounded haste; a first start that fails is final."""

import asyncio
import sys
from pathlib import Path

import pytest

from headrace.deploy.processes import Child, ChildRefused
from headrace.deploy.supervisor import PAUSE_S_MAX, STEADY_S, Backoff, Keeper

READY = "say('ready'); hear()"
REFUSES = (
    "from headrace.serving.errors import ConfigRefused\n"
    "say_refused(ConfigRefused('Port 1 is taken.', why='B uses it.', fix='Stop B.'))"
)


class Stage:
    """Starts one child after the other, each with the next script."""

    def __init__(self, tmp_path: Path, *scripts: str) -> None:
        self.tmp_path = tmp_path
        self.scripts = list(scripts)
        self.reports: list[str] = []
        self.started = asyncio.Semaphore(0)

    def keeper(self) -> Keeper:
        return Keeper("engine", self._start, report=self.reports.append, backoff=Backoff(0.01))

    async def _start(self) -> Child:
        script = self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]
        child = await Child.start(
            "engine",
            [sys.executable, "-c", "from headrace.deploy.processes import *\n" + script],
            log_path=self.tmp_path / "engine.log",
        )
        await child.ready(30)
        self.started.release()
        return child


def test_a_process_that_dies_is_started_again(tmp_path: Path) -> None:
    async def story() -> None:
        stage = Stage(tmp_path, READY)
        keeper = stage.keeper()
        await keeper.first_ready
        first = keeper.child
        assert first is not None
        await first.kill()
        await stage.started.acquire()
        await stage.started.acquire()
        await keeper.stop(5)

        assert keeper.restarts == 1
        assert stage.reports[0] == "engine ended with status -9; starting it again"

    asyncio.run(story())


def test_a_first_start_that_is_refused_is_final(tmp_path: Path) -> None:
    """A taken port does not become free by trying; the operator has to hear of it."""

    async def story() -> None:
        keeper = Stage(tmp_path, REFUSES).keeper()
        with pytest.raises(ChildRefused, match=r"Port 1 is taken\."):
            await keeper.first_ready
        await keeper.stop(5)

        assert keeper.restarts == 0

    asyncio.run(story())


def test_a_later_start_that_is_refused_is_tried_again(tmp_path: Path) -> None:
    async def story() -> None:
        stage = Stage(tmp_path, READY, REFUSES, READY)
        keeper = stage.keeper()
        await keeper.first_ready
        assert keeper.child is not None
        await keeper.child.kill()
        await stage.started.acquire()
        await stage.started.acquire()
        await keeper.stop(5)

        assert "engine did not start: Port 1 is taken." in stage.reports

    asyncio.run(story())


def test_a_stopped_process_is_not_started_again(tmp_path: Path) -> None:
    async def story() -> None:
        stage = Stage(tmp_path, READY)
        keeper = stage.keeper()
        await keeper.first_ready
        await keeper.stop(5)

        assert keeper.child is not None
        assert not keeper.child.alive
        assert keeper.restarts == 0
        assert stage.reports == []

    asyncio.run(story())


def test_pauses_double_up_to_a_bound_and_begin_anew_after_a_steady_while() -> None:
    backoff = Backoff(0.5)
    pauses = [backoff.after(1.0) for _ in range(8)]

    assert pauses == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, PAUSE_S_MAX, PAUSE_S_MAX]
    assert backoff.after(STEADY_S) == 0.5
