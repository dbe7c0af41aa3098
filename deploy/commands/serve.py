"""`headrace serve`: the whole platform on one machine, in the foreground."""

import argparse
import asyncio
import fcntl
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from headrace.compile import catalog
from headrace.compile.store import Store
from headrace.deploy.supervisor import Addresses, Supervisor, log_folder
from headrace.serving.admission.accounts import demo_key
from headrace.serving.config import Config, ModelConfig, parse_assignment
from headrace.serving.errors import ArtifactError, ArtifactTampered, ConfigRefused, ModelNotFound

ROLES = ("all", "frontend", "control")
READY_S_MAX = 120.0
"""From the last child's `ready` to a replica in the frontend's directory: a second, normally."""

_SCHEMA = (
    '{"type":"object","properties":{"city":{"type":"string","maxLength":30},'
    '"country":{"type":"string","maxLength":30}},"required":["city","country"],'
    '"additionalProperties":false}'
)


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "serve",
        help="start the platform in the foreground",
        description="Start frontend, control plane and engines on this machine. Models that are "
        "configured and not yet built are fetched and compiled first. Ctrl-C drains and ends; a "
        "second one ends at once.",
    )
    parser.add_argument(
        "--role",
        choices=ROLES,
        default="all",
        help="frontend: what clients talk to; control: Ray and the replicas (default: all)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="assignments",
        metavar="KEY=VALUE",
        help="override the configuration, for example frontend.grpc_port=50061; repeatable",
    )
    parser.add_argument(
        "--allow-unverified",
        action="append_const",
        dest="assignments",
        const="allow_unverified=true",
        help="serve engines that were built where their device was not, and so never run there",
    )
    parser.add_argument("--home", type=Path, help="state folder (default: HEADRACE_HOME)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    console = Console(highlight=False, soft_wrap=True)
    overrides = dict(parse_assignment(text) for text in args.assignments)
    config = Config.load(args.home).with_overrides(overrides, where="--set")
    config.prepare_home()
    with _only_one(config.home, args.role):
        if args.role != "frontend":
            build_missing(config, console)
        # Before the frontend reads the keys: what is printed when it is ready is in force then.
        key = demo_key(config) if args.role != "control" else ""
        return asyncio.run(_serve(config, args, console, key=key))


async def _serve(config: Config, args: argparse.Namespace, console: Console, *, key: str) -> int:
    started = time.monotonic()
    stopping = _Stopping()
    supervisor = Supervisor(
        config,
        report=lambda line: console.print(f"[dim]{_clock_time()}[/dim] ", line, markup=True),
        assignments=args.assignments,
    )
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, supervisor.reload)
    console.print("Starting …", style="dim")
    begin = asyncio.create_task(
        supervisor.start(frontend=args.role != "control", control=args.role != "frontend")
    )
    await asyncio.wait({begin, stopping.first}, return_when=asyncio.FIRST_COMPLETED)
    if not begin.done():
        begin.cancel()
        await asyncio.wait({begin})
        return 0
    begin.result()
    if args.role == "all":
        ready = asyncio.create_task(supervisor.until_serving(READY_S_MAX))
        await asyncio.wait({ready, stopping.first}, return_when=asyncio.FIRST_COMPLETED)
        if ready.done():
            ready.result()
        ready.cancel()
    if not stopping.first.done():
        _greet(config, supervisor, console, key=key, took_s=time.monotonic() - started)
    await stopping.first
    console.print("Draining; Ctrl-C again ends at once …", style="dim")
    end = asyncio.create_task(supervisor.stop())
    await asyncio.wait({end, stopping.second}, return_when=asyncio.FIRST_COMPLETED)
    if not end.done():
        await supervisor.kill()
    await end
    console.print("Ended.", style="dim")
    return 0


class _Stopping:
    """The first and the second SIGINT or SIGTERM."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.first: asyncio.Future[None] = loop.create_future()
        self.second: asyncio.Future[None] = loop.create_future()
        for signum in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(signum, self._signalled)

    def _signalled(self) -> None:
        for future in (self.first, self.second):
            if not future.done():
                future.set_result(None)
                return


def build_missing(config: Config, console: Console) -> None:
    """Fetch and compile what is configured and not in the store, each in a process of its own.

    torch and its hundreds of megabytes live and die there; this process never imports it.

    Raises:
        ModelNotFound: a model is neither built nor in the catalog.
        ArtifactError: a model could not be built; the child has said why.
    """
    store = Store(config.home)
    for model in config.models:
        if model.replicas == 0 or _is_built(store, model):
            continue
        if model.variant or model.version:
            # Says which build is missing: only the target cpu is built unasked.
            store.configured(model)
        entry = _fetchable(model, others=store.index(model.name).variants)
        console.print(f"{model.name} ({model.precision}) is not built yet: building it once.")
        _run_verb(config, "models", "pull", entry.name)
        _run_verb(config, "compile", entry.name, "--target", "cpu", "--precision", model.precision)


def _fetchable(model: ModelConfig, *, others: Sequence[str]) -> catalog.Entry:
    """What can be built for the target cpu; `others` are variants that there are."""
    try:
        return catalog.find(model.name)
    except ModelNotFound as error:
        if others:
            raise ModelNotFound(
                f"The model {model.name} (cpu/{model.precision}) is configured and not built.",
                why=f"There is {', '.join(others)} of it, and a build for another target or "
                "precision is only served where that is asked for.",
                fix=f"Ask for it in config.yaml: `variant: {others[0]}` beside `name: "
                f"{model.name}`.",
                field="models",
            ) from error
        raise ModelNotFound(
            f"The model {model.name} ({model.precision}) is configured and not built.",
            why=error.why,
            fix=f"Build it: `headrace compile FOLDER --name {model.name} --precision "
            f"{model.precision}`; or take it out of config.yaml.",
            field="models",
        ) from error


def _run_verb(config: Config, *words: str) -> None:
    """One `headrace` command in a process of its own, on the same terminal."""
    ran = subprocess.run(
        [sys.executable, "-m", "headrace.deploy.cli", *words],
        env={**os.environ, "HEADRACE_HOME": str(config.home)},
        check=False,
    )
    if ran.returncode != 0:
        raise ArtifactError(
            f"`headrace {' '.join(words)}` ended with status {ran.returncode}.",
            why="A model that is to be served could not be built; the reason stands above.",
            fix="Mend that and start again, or take the model out of config.yaml.",
        )


def _is_built(store: Store, model: ModelConfig) -> bool:
    try:
        store.configured(model)
    except (ModelNotFound, ArtifactTampered):
        return False
    return True


@contextmanager
def _only_one(home: Path, role: str) -> Iterator[None]:
    """Hold the home for this role; the kernel lets go when this process ends, however it ends.

    Raises:
        ConfigRefused: another `headrace serve` holds it.
    """
    roles = ("frontend", "control") if role == "all" else (role,)
    folder = home / "run"
    folder.mkdir(mode=0o700, exist_ok=True)
    held: list[int] = []
    try:
        for each in roles:
            held.append(os.open(folder / f"{each}.lock", os.O_RDWR | os.O_CREAT, 0o600))
            try:
                fcntl.flock(held[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ConfigRefused(
                    f"Another `headrace serve` runs with {home}.",
                    why=f"One process at a time has the role {each} of a home.",
                    fix="End it, or set HEADRACE_HOME to another folder for this one.",
                ) from error
        yield
    finally:
        for descriptor in held:
            os.close(descriptor)


def _greet(
    config: Config, supervisor: Supervisor, console: Console, *, key: str, took_s: float
) -> None:
    """Addresses, key and three commands to try."""
    addresses = supervisor.addresses
    console.print(f"\n[bold green]Headrace is ready[/] after {took_s:.1f} s.")
    if addresses is None:
        return
    scheme = "https" if config.frontend.tls_cert else "http"
    for name, value in (
        ("gRPC", addresses.grpc),
        ("HTTP", f"{scheme}://{addresses.http}  (/metrics /healthz /readyz)"),
        ("demo key", key),
        ("logs", str(log_folder(config.home))),
    ):
        console.print(f"  {name:<9} {value}", markup=False)
    console.print("\nThree commands to try, in another terminal:\n")
    for command in three_commands(config, addresses):
        console.print(f"  {command}", style="cyan", markup=False)
    console.print("")


def three_commands(config: Config, addresses: Addresses) -> list[str]:
    """A streamed answer, a constrained one, and the table of what both used."""
    name = _command_name(config)
    models = [model.name for model in config.models if model.replicas]
    chat = f"{name} chat" + (f" --model {models[0]}" if len(models) > 1 else "")
    if addresses.grpc != f"127.0.0.1:{config.frontend.grpc_port}":
        chat += f" --address {addresses.grpc}"
    return [
        f'{chat} "What is the capital of France, and what is it known for?"',
        f"{chat} --json-schema {shlex.quote(_SCHEMA)} "
        '"The Eiffel Tower is in which city and country?"',
        f"{name} usage",
    ]


def _command_name(config: Config) -> str:
    """How a person in this folder calls this installation."""
    script = Path(sys.argv[0]).absolute()
    found = shutil.which("headrace")
    if found is not None and Path(found).absolute() == script:
        name = "headrace"
    elif script.name == "headrace":
        inside = script.is_relative_to(Path.cwd())
        name = str(script.relative_to(Path.cwd()) if inside else script)
    else:
        name = f"{sys.executable} -m headrace.deploy.cli"
    is_default = config.home == Path("~/.headrace").expanduser()
    return name if is_default else f"HEADRACE_HOME={shlex.quote(str(config.home))} {name}"


def _clock_time() -> str:
    return time.strftime("%H:%M:%S")
