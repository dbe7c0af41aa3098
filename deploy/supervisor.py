"""`headrace serve`: starts the platform's processes, keeps them running and ends them in order.

    frontend   what clients talk to; holds the directory of replicas and the usage store
    head       Ray's own processes; the replicas are their children
    control    tells Ray Serve which models to run, again after every change of the configuration

Each may die alone. A frontend comes back with its usage store and its directory; replicas announce
themselves again. Without the control process everything that runs goes on running. The head takes
the replicas with it, and both come back. Between tries the pause doubles up to a bound.
"""

import asyncio
import os
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from headrace.deploy.processes import Child, Message
from headrace.deploy.ray_env import ray_environment
from headrace.serving.config import Config, cores
from headrace.serving.errors import ConfigRefused, ServingError

START_S_MAX = 180.0
"""A child that is not ready by then never will be: a cold page cache and a swapping laptop fit."""
PAUSE_S_MIN, PAUSE_S_MAX = 0.5, 30.0
STEADY_S = 60.0
"""A child that ran this long was well: its next death starts again at the shortest pause."""
STOP_SLACK_S = 10.0
"""What a child gets beyond its drain time before it is killed."""

Report = Callable[[str], None]
"""Takes one line for the operator."""


class Backoff:
    """Pauses between tries: doubling, bounded, forgotten after a steady while."""

    def __init__(self, first_s: float = PAUSE_S_MIN) -> None:
        self._first_s = first_s
        self._pause_s = first_s

    def after(self, ran_s: float) -> float:
        """How long to pause before the next try of a child that ran for `ran_s`."""
        if ran_s >= STEADY_S:
            self._pause_s = self._first_s
        pause_s = self._pause_s
        self._pause_s = min(PAUSE_S_MAX, pause_s * 2)
        return pause_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Addresses:
    """Where the frontend listens, as it told us."""

    grpc: str
    http: str
    directory: str

    @classmethod
    def of(cls, message: Message) -> "Addresses":
        return cls(grpc=message["grpc"], http=message["http"], directory=message["directory"])


class Keeper:
    """One child, started again whenever it ends, until told to stop.

    `start` makes the child and returns once it is ready; its refusal on the first try is final,
    because then something is wrong that trying again does not mend.
    """

    def __init__(
        self,
        name: str,
        start: Callable[[], Awaitable[Child]],
        *,
        report: Report,
        backoff: Backoff | None = None,
    ) -> None:
        self.name = name
        self.child: Child | None = None
        self.restarts = 0
        self._start = start
        self._report = report
        self._backoff = backoff or Backoff()
        self._stopping = asyncio.Event()
        self.first_ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._keep(), name=f"keeper {name}")

    async def stop(self, grace_s: float) -> None:
        """End the child, with SIGTERM first, and start it no more. Idempotent."""
        self._stopping.set()
        if self.child is not None:
            await self.child.stop(grace_s)
        self._task.cancel()
        await asyncio.wait({self._task})

    async def kill(self) -> None:
        self._stopping.set()
        if self.child is not None:
            await self.child.kill()

    async def _keep(self) -> None:
        while not self._stopping.is_set():
            started = time.monotonic()
            try:
                self.child = await self._start()
            except ServingError as refusal:
                if not self.first_ready.done():
                    self.first_ready.set_exception(refusal)
                    return
                self._report(f"{self.name} did not start: {refusal.what}")
            else:
                if not self.first_ready.done():
                    self.first_ready.set_result(None)
                elif self.restarts:
                    self._report(f"{self.name} is back")
                status = await self.child.wait()
                if self._stopping.is_set():
                    return
                self._report(f"{self.name} ended with status {status}; starting it again")
            self.restarts += 1
            await self._pause(self._backoff.after(time.monotonic() - started))

    async def _pause(self, pause_s: float) -> None:
        try:
            await asyncio.wait_for(self._stopping.wait(), pause_s)
        except TimeoutError:
            return


class Supervisor:
    """The processes of one `headrace serve`. One event loop owns it.

    The home is locked by the caller, so there is one supervisor for each home and role.
    """

    def __init__(self, config: Config, *, report: Report, assignments: Sequence[str]) -> None:
        """`assignments` are `--set` assignments, passed on to every child word for word."""
        self._config = config
        self._report = report
        self._assignments = [part for text in assignments for part in ("--set", text)]
        self._keepers: list[Keeper] = []
        self._frontend: Keeper | None = None
        self._addresses: Addresses | None = None
        self._serving = asyncio.Event()
        self._control: Child | None = None
        self._head_watch: asyncio.Task[None] | None = None
        self._ray_address: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    @property
    def addresses(self) -> Addresses | None:
        """Where the frontend listens; None when this supervisor runs none."""
        return self._addresses

    @property
    def pids(self) -> Mapping[str, int]:
        return {k.name: k.child.pid for k in self._keepers if k.child is not None}

    async def start(self, *, frontend: bool, control: bool) -> None:
        """Start what this role runs; returns when each child said that it is ready.

        Raises:
            ServingError: one of them cannot start; the others are ended.
        """
        if frontend:
            self._frontend = self._keep("frontend", self._start_frontend)
        if control:
            self._keep("head", self._start_head)
            self._keep("control", self._start_control)
        try:
            await _all_or_first_failure([keeper.first_ready for keeper in self._keepers])
        except BaseException:
            await self.kill()
            raise

    async def until_serving(self, timeout_s: float) -> None:
        """Return when the frontend has a ready replica of every model.

        Raises:
            ConfigRefused: it had none within `timeout_s`.
        """
        try:
            await asyncio.wait_for(self._serving.wait(), timeout_s)
        except TimeoutError as error:
            raise ConfigRefused(
                f"No replica reached the frontend within {timeout_s:.0f} s.",
                why="Replicas announce themselves to the directory that the frontend keeps.",
                fix=f"Look into {log_folder(self._config.home)}.",
            ) from error

    async def stop(self) -> None:
        """In order: the frontend lets its streams finish, then the replicas go, then Ray."""
        grace_s = self._config.frontend.drain_s + STOP_SLACK_S
        by_name = {keeper.name: keeper for keeper in self._keepers}
        for name in ("frontend", "control", "head"):
            if name in by_name:
                await by_name[name].stop(grace_s)

    async def kill(self) -> None:
        """Without grace: what a second Ctrl-C asks for."""
        await asyncio.gather(*(keeper.kill() for keeper in self._keepers))
        for keeper in self._keepers:
            await keeper.stop(0)

    def reload(self) -> None:
        """Have the control process read the configuration now, not at its next look."""
        if self._control is not None:
            self._control.send({"event": "reload"})

    def _keep(self, name: str, start: Callable[[], Awaitable[Child]]) -> Keeper:
        keeper = Keeper(name, start, report=self._report)
        self._keepers.append(keeper)
        return keeper

    async def _start_frontend(self) -> Child:
        child = await self._spawn("frontend", "headrace.deploy.frontend_main", *self._assignments)
        # Ports that the system chose stay after a restart: clients and replicas know them by now.
        known = asdict(self._addresses) if self._addresses else {}
        child.send({"event": "hello", **known})
        self._addresses = Addresses.of(await child.ready(START_S_MAX))
        return child

    async def _start_head(self) -> Child:
        # Logical CPUs only bound how many replicas Ray would place: we placed them by the config.
        cpus = max(4, cores(), *(model.replicas for model in self._config.models))
        child = await self._spawn("head", "headrace.deploy.head", "--cpus", str(cpus))
        self._ray_address.set_result((await child.ready(START_S_MAX))["ray_address"])
        self._head_watch = asyncio.create_task(self._follow_head(child))
        return child

    async def _follow_head(self, head: Child) -> None:
        """When Ray is gone, so is what control talks to: its successor waits for the next head."""
        await head.wait()
        self._ray_address = asyncio.get_running_loop().create_future()
        if self._control is not None:
            await self._control.kill()

    async def _start_control(self) -> Child:
        """It imports Ray while the head starts, and then waits for this greeting."""
        child = await self._spawn("control", "headrace.deploy.control", *self._assignments)
        self._control = child
        greeting = asyncio.create_task(self._greet(child))
        gone = asyncio.create_task(child.wait())
        try:
            await asyncio.wait({gone, greeting}, return_when=asyncio.FIRST_COMPLETED)
            if greeting.done():
                greeting.result()
            await child.ready(START_S_MAX)
        except BaseException:
            await child.kill()
            raise
        finally:
            gone.cancel()
            greeting.cancel()
        return child

    async def _greet(self, child: Child) -> None:
        address = await asyncio.shield(self._ray_address)
        directory = self._config.directory.address
        if self._frontend is not None:
            await asyncio.shield(self._frontend.first_ready)
            assert self._addresses is not None
            directory = self._addresses.directory
        child.send({"event": "hello", "ray_address": address, "directory": directory})

    async def _spawn(self, name: str, module: str, *arguments: str) -> Child:
        home = self._config.home
        return await Child.start(
            name,
            [sys.executable, "-m", module, "--home", str(home), *arguments],
            env=ray_environment(home, os.environ),
            log_path=log_folder(home) / f"{name}.log",
            on_message=self._heard,
        )

    async def _heard(self, child: Child, message: Message) -> None:
        if message["event"] == "serving":
            self._serving.set()
        elif message["event"] == "status":
            self._report(f"{child.name}: {message['text']}")


async def _all_or_first_failure(futures: list[asyncio.Future[None]]) -> None:
    done, _ = await asyncio.wait(futures, return_when=asyncio.FIRST_EXCEPTION)
    for future in done:
        future.result()


def log_folder(home: Path) -> Path:
    return home / "logs"
