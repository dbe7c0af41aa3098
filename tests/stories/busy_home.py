"""A platform that serves a home until it is killed: `busy_home.py HOME`.

Says `READY address` once clients may come, and `PROGRESS` after each commit of a batch. SIGTERM
ends it in order, after a last round of house-keeping.
"""

import asyncio
import itertools
import os
import signal
import sys
from pathlib import Path

from headrace.serving.testing.platform import Platform


def say(*words: object) -> None:
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


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
    async with Platform(home, num_replicas=2) as platform:
        stopping = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
        telling = asyncio.ensure_future(tell_progress(platform))
        say("READY", platform.addresses.grpc)
        await stopping.wait()
        telling.cancel()
        await platform.frontend.jobs.idempotency.keep_house()


asyncio.run(main(Path(sys.argv[1])))
