"""A whole platform as its own processes, started by the command an operator would use; for tests.

It owns what it starts: leaving the block ends every process of it.
"""

import contextlib
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self, TextIO

import yaml

from headrace.deploy.client import Client
from headrace.serving.admission.accounts import demo_key
from headrace.serving.config import Config

READY_S_MAX = 120.0
"""The two cores of a test machine may be shared with three other test processes."""
_REPLICA = "ray::ServeReplica:"


class Platform:
    """One `headrace serve` on ports that the system chose."""

    def __init__(self, home: Path, models: Sequence[Mapping[str, object]]) -> None:
        """`home` has `artifacts` and `names`; `models` is the configuration's list."""
        self.home = home
        self.output: list[str] = []
        self.configure(models)
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "headrace.deploy.cli", "serve"),
                *("--set", "frontend.grpc_port=0", "--set", "frontend.http_port=0"),
                *("--set", "directory.address=127.0.0.1:0"),
            ],
            env={**os.environ, "HEADRACE_HOME": str(home)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            bufsize=1,
        )
        assert self._process.stdout is not None
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, args=(self._process.stdout,))
        self._reader.start()

    def __enter__(self) -> Self:
        try:
            self.until("Headrace is ready")
            self.address = self.until("gRPC").split()[-1]
            self.http = self.until("HTTP").split()[1]
            self.until("usage")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def configure(self, models: Sequence[Mapping[str, object]]) -> None:
        """Write the configuration; a running platform follows it."""
        text = yaml.safe_dump({"models": [dict(model) for model in models]})
        temporary = self.home / "config.yaml.new"
        temporary.write_text(text)
        temporary.replace(self.home / "config.yaml")

    def until(self, text: str, timeout_s: float = READY_S_MAX) -> str:
        """The next line of its output that contains `text`; earlier lines are passed over.

        Raises:
            AssertionError: it ended, or said no such thing in time.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"no {text!r} in: {''.join(self.output)}") from None
            if line is None:
                raise AssertionError(f"it ended; it said: {''.join(self.output)}")
            if text in line:
                return line.strip()

    def client(self) -> Client:
        return Client(self.address, self.demo_key)

    @property
    def demo_key(self) -> str:
        return demo_key(Config(home=self.home))

    def command(self, *words: str) -> str:
        """What a `headrace` command prints, run as a person at this home would.

        Raises:
            subprocess.CalledProcessError: it did not end with 0.
        """
        ran = subprocess.run(
            [sys.executable, "-m", "headrace.deploy.cli", *words],
            env={**os.environ, "HEADRACE_HOME": str(self.home)},
            capture_output=True,
            text=True,
            check=True,
        )
        return ran.stdout

    def replicas(self, model: str = "") -> Sequence[int]:
        """Process ids of the engines, of one model or of all."""
        return [pid for pid, command in self.processes() if command.startswith(_REPLICA + model)]

    def pid_of(self, part: str) -> int:
        """The one process whose command contains `part`.

        Raises:
            ValueError: none has, or several have.
        """
        (pid,) = (pid for pid, command in self.processes() if part in command)
        return pid

    def processes(self) -> Sequence[tuple[int, str]]:
        """Every process of this platform but the first: id and command line."""
        children: dict[int, list[int]] = {}
        commands: dict[int, str] = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    status = (entry / "stat").read_text().rpartition(")")[2].split()
                    if status[0] != "Z":
                        children.setdefault(int(status[1]), []).append(int(entry.name))
                        command = (entry / "cmdline").read_bytes().rstrip(b"\0")
                        commands[int(entry.name)] = command.replace(b"\0", b" ").decode()
        return [(pid, commands[pid]) for pid in _below(self.pid, children)]

    def kill(self, pid: int) -> None:
        """SIGKILL, of a process of this platform only."""
        assert pid in dict(self.processes())
        os.kill(pid, signal.SIGKILL)

    def until_ended(self, pids: Iterable[int], timeout_s: float = READY_S_MAX) -> None:
        """Wait for processes that are on their way out."""
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                descriptor = os.pidfd_open(pid)
                ended, _, _ = select.select([descriptor], [], [], timeout_s)
                os.close(descriptor)
                assert ended, f"process {pid} has not ended"

    def terminate(self) -> None:
        """SIGTERM, as an init system would send it."""
        self._process.send_signal(signal.SIGTERM)

    def wait(self, timeout_s: float = 60) -> int:
        """Its exit status; all it said is in `output`."""
        status = self._process.wait(timeout_s)
        self._reader.join(timeout_s)
        return status

    def close(self) -> None:
        """End it, gently and then not. Idempotent."""
        if self._process.poll() is None:
            self.terminate()
            try:
                self._process.wait(READY_S_MAX)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self.wait()

    def _read(self, stream: TextIO) -> None:
        """Keep the pipe empty, so that the platform never waits for us."""
        with stream:
            for line in stream:
                self.output.append(line)
                self._lines.put(line)
        self._lines.put(None)


def _below(pid: int, children: Mapping[int, Sequence[int]]) -> Iterator[int]:
    for child in children.get(pid, ()):
        yield child
        yield from _below(child, children)
