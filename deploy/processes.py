"""Child processes: how a parent starts one, hears from it and ends it.

A child speaks on its standard output, one JSON object a line with an `event`: `ready` once it does
its work, `refused` when it cannot (three sentences for the operator), `status` for anything else.
It listens on its standard input for objects of the same form; end of file there means that the
parent is gone. Standard error is the child's log: bounded, rotated by the parent.
"""

import asyncio
import contextlib
import ctypes
import json
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from headrace.serving.errors import ConfigRefused, ServingError

LOG_BYTES_MAX = 8 << 20
"""A log is kept twice: the current file and the one before it. At 300 bytes a request that is
50,000 requests."""
LINE_BYTES_MAX = 1 << 20
"""Longest line a child may say; a longer one is a defect of ours."""
TAIL_LINES = 30
"""Last lines of a child's log that explain why it ended."""

_PR_SET_PDEATHSIG = 1

Message = Mapping[str, Any]
"""One JSON object of the child protocol; its fields depend on its `event`."""


class ChildRefused(ServingError):
    """A child said in three sentences why it cannot do its work; repeated word for word."""

    reason = "CHILD_REFUSED"

    def __init__(self, message: Message) -> None:
        super().__init__(message["what"], why=message["why"], fix=message["fix"])
        self.child_reason = str(message["reason"])


def follow_parent(signum: signal.Signals = signal.SIGTERM) -> None:
    """Have the kernel send this process `signum` when its parent dies, however that happens.

    Call it first thing in a child. A parent that died before the call is noticed too.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(signum), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    expected = os.environ.get("HEADRACE_PARENT_PID")
    if expected is not None and os.getppid() != int(expected):
        os.kill(os.getpid(), signum)


def say(event: str, **fields: object) -> None:
    """Tell the parent. A parent that is gone is told nothing: the death signal deals with that."""
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.write(json.dumps({"event": event, **fields}) + "\n")
        sys.stdout.flush()


def say_refused(error: ServingError) -> None:
    say("refused", reason=error.reason, what=error.what, why=error.why, fix=error.fix)


def hear() -> Message | None:
    """The parent's next message; None at end of file. Blocks."""
    line = sys.stdin.readline()
    return json.loads(line) if line else None


def stop_event() -> threading.Event:
    """Set by SIGTERM and SIGINT. Call it in the main thread."""
    event = threading.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: event.set())
    return event


class RotatingLog:
    """An append-only file of bounded size; the part before it is kept once, as `.1`."""

    def __init__(self, path: Path, *, bytes_max: int = LOG_BYTES_MAX) -> None:
        self.path = path
        self._bytes_max = bytes_max
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._file = path.open("ab")

    def write(self, line: bytes) -> None:
        if self._file.tell() + len(line) > self._bytes_max:
            self._file.close()
            self.path.replace(self.path.with_name(self.path.name + ".1"))
            self._file = self.path.open("ab")
        self._file.write(line)
        self._file.flush()
        self.tail.append(line.decode("utf-8", "replace").rstrip())

    def close(self) -> None:
        self._file.close()


class Child:
    """One running child process. One event loop owns it; `wait` may be awaited by many."""

    def __init__(
        self,
        name: str,
        process: asyncio.subprocess.Process,
        log: RotatingLog,
        on_message: Callable[["Child", Message], Awaitable[None]] | None,
    ) -> None:
        self.name = name
        self._process = process
        self._log = log
        self._on_message = on_message
        self._pidfd = os.pidfd_open(process.pid)
        self._ready: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._ended = asyncio.create_task(self._follow(), name=f"child {name}")

    @classmethod
    async def start(
        cls,
        name: str,
        argv: Sequence[str],
        *,
        log_path: Path,
        env: Mapping[str, str] | None = None,
        on_message: Callable[["Child", Message], Awaitable[None]] | None = None,
    ) -> "Child":
        """Start it in a session of its own, so that a terminal's Ctrl-C reaches only the parent."""
        log = RotatingLog(log_path)
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**(os.environ if env is None else env), "HEADRACE_PARENT_PID": str(os.getpid())},
            start_new_session=True,
            limit=LINE_BYTES_MAX,
        )
        return cls(name, process, log, on_message)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.returncode is None

    async def ready(self, timeout_s: float) -> Message:
        """What the child said with its first `ready`. A child that fails to is killed.

        Raises:
            ChildRefused: it said why it cannot.
            ConfigRefused: it ended, or said nothing for `timeout_s`.
        """
        try:
            return await asyncio.wait_for(asyncio.shield(self._ready), timeout_s)
        except BaseException as error:
            await self.kill()
            if not isinstance(error, TimeoutError):
                raise
            raise ConfigRefused(
                f"The {self.name} process was not ready after {timeout_s:.0f} s.",
                why="Its log ends: " + (" / ".join(list(self._log.tail)[-3:]) or "(empty)"),
                fix=f"Read {self._log.path}; a machine under heavy load may need another try.",
            ) from error

    def send(self, message: Message) -> None:
        """Queue one object on its standard input. Messages are few and small: nothing to bound."""
        assert self._process.stdin is not None
        if self.alive:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")

    async def wait(self) -> int:
        """Its exit status, once it has ended and all it said was handled."""
        return await asyncio.shield(self._ended)

    async def stop(self, grace_s: float) -> None:
        """SIGTERM; after `grace_s`, SIGKILL to its whole session. Idempotent."""
        if self.alive:
            self._signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(self.wait(), grace_s)
        except TimeoutError:
            await self.kill()

    async def kill(self) -> None:
        """SIGKILL to its whole session. Idempotent."""
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
        await self.wait()

    def _signal(self, signum: signal.Signals) -> None:
        """By descriptor: a process id may mean another process by now.

        Not by asyncio's own method, which may reap the process before asyncio's watcher does.
        """
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signum)

    async def _follow(self) -> int:
        """Read both streams to their ends, then reap."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._read_messages())
            group.create_task(self._read_log())
        status = await self._process.wait()
        os.close(self._pidfd)
        self._log.close()
        if not self._ready.done():
            self._ready.set_exception(self._ended_early(status))
            self._ready.exception()  # Retrieved here: nobody has to be waiting for it.
        return status

    async def _read_messages(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            try:
                message: Message = json.loads(line)
                event = message["event"]
            except (ValueError, TypeError, KeyError):
                self._log.write(line)  # A library that prints: for the log, not for us.
                continue
            if event == "ready" and not self._ready.done():
                self._ready.set_result(message)
            elif event == "refused" and not self._ready.done():
                self._ready.set_exception(ChildRefused(message))
                self._ready.exception()
            if self._on_message is not None:
                await self._on_message(self, message)

    async def _read_log(self) -> None:
        assert self._process.stderr is not None
        partial = b""
        while chunk := await self._process.stderr.read(1 << 16):
            *lines, partial = (partial + chunk).splitlines(keepends=True)
            if partial.endswith(b"\n") or len(partial) > LINE_BYTES_MAX:
                lines, partial = [*lines, partial], b""
            for line in lines:
                self._log.write(line)
        if partial:
            self._log.write(partial + b"\n")

    def _ended_early(self, status: int) -> ServingError:
        return ConfigRefused(
            f"The {self.name} process ended with status {status} before it was ready.",
            why="Its log ends: " + (" / ".join(list(self._log.tail)[-3:]) or "(empty)"),
            fix=f"Read {self._log.path}.",
        )
