"""A parent starts children, hears from them, and leaves none behind."""

import asyncio
import os
import select
import signal
import sys
from pathlib import Path

import pytest

from headrace.deploy.processes import Child, ChildRefused, Message, RotatingLog
from headrace.serving.errors import ConfigRefused

PREAMBLE = "from headrace.deploy.processes import *; import sys, os, time, signal\n"


async def start(code: str, tmp_path: Path, heard: list[Message] | None = None) -> Child:
    async def on_message(_: Child, message: Message) -> None:
        if heard is not None:
            heard.append(message)

    return await Child.start(
        "worker",
        [sys.executable, "-c", PREAMBLE + code],
        log_path=tmp_path / "worker.log",
        on_message=on_message,
    )


def test_a_child_says_when_it_is_ready_and_hears_what_it_is_told(tmp_path: Path) -> None:
    async def story() -> None:
        heard: list[Message] = []
        child = await start(
            "say('ready', port=7); say('status', text=hear()['x'])", tmp_path, heard
        )
        ready = await child.ready(30)
        child.send({"event": "hello", "x": "good"})
        status = await child.wait()

        assert ready["port"] == 7
        assert status == 0
        assert heard[-1] == {"event": "status", "text": "good"}

    asyncio.run(story())


def test_a_refusal_reaches_the_operator_word_for_word(tmp_path: Path) -> None:
    code = (
        "from headrace.serving.errors import ConfigRefused\n"
        "say_refused(ConfigRefused('Port 1 is taken.', why='B uses it.', fix='Stop B.'))"
    )

    async def story() -> None:
        child = await start(code, tmp_path)
        with pytest.raises(ChildRefused) as refused:
            await child.ready(30)
        await child.wait()

        assert refused.value.what == "Port 1 is taken."
        assert refused.value.fix == "Stop B."
        assert refused.value.child_reason == "CONFIG_REFUSED"

    asyncio.run(story())


def test_a_child_that_crashes_early_is_explained_by_the_end_of_its_log(tmp_path: Path) -> None:
    async def story() -> None:
        child = await start("raise ValueError('the reason')", tmp_path)
        with pytest.raises(ConfigRefused, match="the reason"):
            await child.ready(30)

        assert "the reason" in (tmp_path / "worker.log").read_text()

    asyncio.run(story())


def test_a_child_that_says_nothing_in_time_is_reported(tmp_path: Path) -> None:
    async def story() -> None:
        child = await start("hear()", tmp_path)
        with pytest.raises(ConfigRefused, match="not ready after 0 s"):
            await child.ready(0.01)
        await child.kill()

    asyncio.run(story())


def test_what_a_library_prints_goes_to_the_log_not_into_the_protocol(tmp_path: Path) -> None:
    async def story() -> None:
        heard: list[Message] = []
        child = await start("print('hello'); print('[1]'); say('ready')", tmp_path, heard)
        await child.wait()

        assert [message["event"] for message in heard] == ["ready"]
        assert (tmp_path / "worker.log").read_text() == "hello\n[1]\n"

    asyncio.run(story())


def test_a_child_that_ignores_sigterm_is_killed_with_its_children(tmp_path: Path) -> None:
    code = (
        "import subprocess\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "grandchild = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "say('ready', grandchild=grandchild.pid); hear()"
    )

    async def story() -> None:
        child = await start(code, tmp_path)
        grandchild = os.pidfd_open((await child.ready(30))["grandchild"])
        await child.stop(grace_s=0.05)

        assert await child.wait() == -signal.SIGKILL
        # Killed in the same call; the kernel may bury it a moment after the child.
        ended, _, _ = select.select([grandchild], [], [], 30)
        assert ended == [grandchild]
        os.close(grandchild)

    asyncio.run(story())


def test_a_child_dies_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    """Otherwise a crashed supervisor leaves engines that hold ports and memory."""
    child = "follow_parent(); print(os.getpid(), flush=True); time.sleep(600)"
    parent = (
        "import subprocess\n"
        f"code = {PREAMBLE + child!r}\n"
        "env = dict(os.environ, HEADRACE_PARENT_PID=str(os.getpid()))\n"
        "command = [sys.executable, '-c', code]\n"
        "started = subprocess.Popen(command, stdout=subprocess.PIPE, env=env)\n"
        "say('ready', child=int(started.stdout.readline()))\n"
        "hear(); os.kill(os.getpid(), signal.SIGKILL)"
    )

    async def story() -> None:
        process = await start(parent, tmp_path)
        orphan = os.pidfd_open((await process.ready(30))["child"])
        process.send({"event": "go"})
        await process.wait()
        ended, _, _ = select.select([orphan], [], [], 30)

        assert ended == [orphan]
        os.close(orphan)

    asyncio.run(story())


def test_a_log_is_bounded_and_keeps_what_came_before_once(tmp_path: Path) -> None:
    log = RotatingLog(tmp_path / "a.log", bytes_max=10)
    for line in (b"1234567\n", b"abcdefg\n", b"ABCDEFG\n"):
        log.write(line)
    log.close()

    assert (tmp_path / "a.log").read_bytes() == b"ABCDEFG\n"
    assert (tmp_path / "a.log.1").read_bytes() == b"abcdefg\n"
    assert list(log.tail) == ["1234567", "abcdefg", "ABCDEFG"]
