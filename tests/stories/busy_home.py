"""A platform that serves a home until it is killed: `busy_home.py HOME`.

Says `READY address` once clients may come, and `PROGRESS` after each commit of a batch. Corrections
of charges are appended to `adjustments.jsonl` in the home, as the meter log would keep them.
SIGTERM ends it in order, after a last round of house-keeping.
"""

import asyncio
import itertools
import json
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path

from headrace.serving.metering.give_back import Adjustment
from headrace.serving.testing.platform import Platform


def say(*words: object) -> None:
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


class FileAdjuster:
    """Applies a correction once, whichever life asks for it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        text = path.read_text() if path.exists() else ""
        self._applied = {json.loads(line)["adjustment_id"] for line in text.splitlines()}

    async def __call__(self, adjustment: Adjustment) -> None:
        if adjustment.adjustment_id not in self._applied:
            self._applied.add(adjustment.adjustment_id)
            self._append(json.dumps(asdict(adjustment)).encode() + b"\n")

    def _append(self, line: bytes) -> None:
        with open(self._path, "ab", buffering=0) as file:
            file.write(line)


async def tell_progress(platform: Platform) -> None:
    """Meanwhile the replica that came first dies at every third commit, and another one comes."""
    seen = 0
    for number in itertools.count():
        seen = await platform.frontend.jobs.batches.progressed(seen)
        say("PROGRESS")
        if number % 3 == 2:
            await platform.replicas[number // 3].kill()
            await platform.add_replica()


async def main(home: Path) -> None:
    adjuster = FileAdjuster(home / "adjustments.jsonl")
    async with Platform(home, num_replicas=2, adjust=adjuster) as platform:
        stopping = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
        telling = asyncio.ensure_future(tell_progress(platform))
        say("READY", platform.addresses.grpc)
        await stopping.wait()
        telling.cancel()
        await platform.frontend.jobs.idempotency.keep_house()


asyncio.run(main(Path(sys.argv[1])))
