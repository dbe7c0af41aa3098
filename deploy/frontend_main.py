"""The frontend process: `Frontend` under the supervisor's protocol.

It knows no Ray: what it needs of the replicas it learns from the directory that it keeps itself.
"""

import argparse
import asyncio
import gc
import signal
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import uvloop

from headrace.deploy.processes import Message, follow_parent, hear, say, say_refused
from headrace.serving import log
from headrace.serving.config import Config, parse_assignment
from headrace.serving.errors import ServingError
from headrace.serving.frontend.server import Frontend

METER_FAILED = 4
"""Exit status: usage cannot be recorded by this process any more."""


def pinned(greeting: Message) -> Mapping[str, object]:
    """Overrides that keep the ports of the frontend that this one replaces."""
    overrides: dict[str, object] = {}
    for name, key in (("grpc", "frontend.grpc_port"), ("http", "frontend.http_port")):
        if name in greeting:
            overrides[key] = int(str(greeting[name]).rpartition(":")[2])
    if "directory" in greeting:
        overrides["directory.address"] = greeting["directory"]
    return overrides


async def serve(config: Config) -> int:
    """Run until SIGTERM, then drain; answers the exit status.

    Without a meter log nothing may be delivered any more, so a log that has failed ends the
    process: its successor starts from what the disk has.

    Raises:
        ServingError: it cannot start.
    """
    stopping, changed, failed = asyncio.Event(), asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stopping.set)

    def meter_failed(_: str) -> None:
        loop.call_soon_threadsafe(failed.set)
        loop.call_soon_threadsafe(stopping.set)

    frontend = Frontend(
        config,
        version=version("headrace"),
        on_change=changed.set,
        on_meter_failed=meter_failed,
    )
    addresses = await frontend.start()
    say("ready", grpc=addresses.grpc, http=addresses.http, directory=addresses.directory)
    # What was loaded stays: the collector need not look at it again with every request.
    gc.collect()
    gc.freeze()
    announcing = loop.create_task(_announce_serving(config, frontend, changed))
    await stopping.wait()
    announcing.cancel()
    if not failed.is_set():
        await frontend.drain(config.frontend.drain_s)
    await frontend.stop()
    return METER_FAILED if failed.is_set() else 0


async def _announce_serving(config: Config, frontend: Frontend, changed: asyncio.Event) -> None:
    """Tell the parent once every configured model has a ready replica."""
    wanted = {model.name for model in config.models if model.replicas}
    while True:
        changed.clear()
        ready = {served.name for served in frontend.fleet.models() if served.replicas_ready}
        if wanted <= ready:
            say("serving")
            return
        await changed.wait()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], dest="assignments")
    args = parser.parse_args()
    follow_parent()
    greeting = hear()
    if greeting is None:
        return 0
    log.setup_logging()
    try:
        config = Config.load(args.home).with_overrides(
            dict(parse_assignment(text) for text in args.assignments) | dict(pinned(greeting))
        )
        return uvloop.run(serve(config))
    except ServingError as refusal:
        say_refused(refusal)
        return 3


if __name__ == "__main__":
    raise SystemExit(main())
