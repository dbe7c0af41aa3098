"""What a peer is: where it lives, how it is installed, and how one of its engines is driven.

Each peer has a folder of its own, `<home>/peers/<name>`, with a virtual environment in `venv` and
its form of the model beside it. Nothing of a peer is ever imported by Headrace's own processes.
"""

import asyncio
import contextlib
import os
import shutil
import signal
import socket
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol

from headrace.deploy.bench.figures import Answer
from headrace.deploy.bench.workload import Load
from headrace.serving.domain.artifact import Precision
from headrace.serving.errors import ServingError

THREADS = 2
"""Threads of every engine, ours too. `headrace bench llm` is about two cores."""
ROWS_MAX = 32
"""Sequences that every engine may have in a batch."""
CONTEXT_TOKENS = 512
"""Longest prompt and answer together, with some room: what a slot of llama.cpp is given."""
STOP_S = 10.0
"""From SIGTERM to SIGKILL."""


class PeerFailed(ServingError):
    """A peer could not be installed, started or asked. The others are measured all the same."""

    reason = "PEER_FAILED"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """One model, in the two forms that peers are made from."""

    checkpoint: Path
    """A folder as `transformers` loads it."""
    gguf: Path
    """The same weights as the GGUF file that they came in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One command of an installation. It is left out when what it makes is there already."""

    what: str
    argv: Sequence[str]
    makes: Path
    env: Mapping[str, str] = field(default_factory=dict[str, str])


class Entrant(Protocol):
    """One engine with one precision, while it runs. One event loop owns it."""

    @property
    def roots(self) -> Sequence[int]:
        """The processes we started; what they started descends from them."""
        ...

    async def run(self, load: Load) -> Sequence[Answer]:
        """Drive one closed loop.

        Raises:
            PeerFailed: it stopped answering.
        """
        ...


class Peer(Protocol):
    """One engine family. `start` may be entered once for each turn."""

    name: str
    formats: ClassVar[Mapping[Precision, str]]
    """What it calls the weights that compare with ours: int8 is llama.cpp's q8_0."""
    starts_slowly: bool
    """True: it is paused between its turns. False: it is ended, and started again."""

    def missing(self, precision: Precision) -> str | None:
        """Why it cannot run here, with what to do about it; None when it can."""
        ...

    def start(
        self, precision: Precision, log: Path
    ) -> "contextlib.AbstractAsyncContextManager[Entrant]":
        """Start it; leaving the block ends it.

        Raises:
            PeerFailed: it did not start.
        """
        ...


@dataclass(frozen=True, slots=True)
class Place:
    """The folder of one peer."""

    folder: Path

    @property
    def venv(self) -> Path:
        return self.folder / "venv"

    @property
    def python(self) -> Path:
        return self.venv / "bin" / "python"

    @property
    def site_packages(self) -> Path:
        found = sorted(self.venv.glob("lib/python3*/site-packages"))
        return found[0] if found else self.venv / "lib" / "python3" / "site-packages"

    def model(self, name: str) -> Path:
        return self.folder / "models" / name

    def not_installed(self, peer: str, *needed: Path) -> str | None:
        """Why the peer cannot run: the first of these files that is not there."""
        for path in (self.python, *needed):
            if not path.exists():
                return f"{path} is not there: run `headrace bench peers install {peer}`"
        return None


def venv_step(place: Place, python: str) -> Step:
    return Step(
        what="make a virtual environment",
        argv=[python, "-m", "venv", str(place.venv)],
        makes=place.python,
    )


def pip_step(place: Place, what: str, *packages: str, makes: Path, **env: str) -> Step:
    """Install by name only, with the site's own index settings."""
    return Step(
        what=what,
        argv=[
            *(str(place.python), "-m", "pip", "install", "--disable-pip-version-check"),
            *("--no-input", *packages),
        ],
        makes=makes,
        env=env,
    )


class PeerProcess:
    """A process group of a peer, its log, and nothing else. One event loop owns it."""

    def __init__(self, process: asyncio.subprocess.Process, name: str, log: Path) -> None:
        self.process = process
        self._name = name
        self._log = log

    @property
    def pid(self) -> int:
        return self.process.pid

    def failed(self, why: str) -> PeerFailed:
        return PeerFailed(
            f"{self._name} stopped answering.",
            why=f"{why} Its log ends: {tail(self._log)}",
            fix=f"Read {self._log}, or leave it out with --peers.",
        )

    def signal(self, signum: signal.Signals) -> None:
        """To the whole group; one that has ended is left in peace."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signum)

    async def stop(self) -> None:
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.process.wait(), STOP_S)
        self.signal(signal.SIGKILL)  # Helpers of the group that outlived it.
        await self.process.wait()


@asynccontextmanager
async def peer_process(
    name: str,
    argv: Sequence[str],
    *,
    log: Path,
    env: Mapping[str, str],
    pipes: bool = False,
) -> AsyncIterator[PeerProcess]:
    """Run a program in a group of its own; its output goes to the log. Leaving ends the group."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.PIPE if pipes else asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE if pipes else file,
            stderr=file,
            env={**os.environ, **env},
            start_new_session=True,
            limit=1 << 26,
        )
    running = PeerProcess(process, name, log)
    try:
        yield running
    finally:
        await running.stop()


async def until(
    ready: Callable[[], "asyncio.Future[bool]"], running: PeerProcess, *, within_s: float
) -> None:
    """Ask `ready` five times a second until it says yes.

    Raises:
        PeerFailed: the process ended, or the time passed.
    """
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + within_s
    while not await ready():
        if running.process.returncode is not None:
            raise running.failed(f"It ended with status {running.process.returncode}.")
        if loop.time() > deadline_s:
            raise running.failed(f"It was not ready after {within_s:.0f} s.")
        await asyncio.sleep(0.2)


def free_port() -> int:
    """A port that was free a moment ago, for programs that cannot be told to choose one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def tail(log: Path, lines: int = 3) -> str:
    try:
        text = log.read_text("utf-8", "replace")
    except OSError:
        return "(no log)"
    return " / ".join(text.splitlines()[-lines:]) or "(empty)"


def system_python() -> str:
    """The interpreter for virtual environments: a plain one, where there is one."""
    return shutil.which("python3.11") or shutil.which("python3") or "python3"
