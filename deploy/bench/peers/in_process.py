"""Peers with an API in their own process: a worker drives them, we only hand over the loads."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from headrace.deploy.bench.figures import Answer
from headrace.deploy.bench.peers.base import (
    ROWS_MAX,
    THREADS,
    PeerProcess,
    peer_process,
)
from headrace.deploy.bench.workload import Load

START_S_MAX = 120.0
BATCH_TOKENS_MAX = 512
"""Tokens of one step, as ours has by default."""
SLACK_S = 60.0
"""Beyond a load's time limit, for the step that was running then."""

_WORKER = Path(__file__).with_name("worker.py")


def worker_options(*, shares_prefix: bool) -> dict[str, object]:
    return {
        "rows_max": ROWS_MAX,
        "batch_tokens_max": BATCH_TOKENS_MAX,
        "threads": THREADS,
        "shares_prefix": shares_prefix,
    }


def worker_argv(python: Path, engine: str, model: Path, *, shares_prefix: bool) -> list[str]:
    options = json.dumps(worker_options(shares_prefix=shares_prefix))
    # -P: the worker's folder has modules named like the peers, which must not shadow them.
    return [str(python), "-P", str(_WORKER), engine, str(model), options]


class WorkerEntrant:
    """An engine behind a worker's two pipes."""

    def __init__(self, running: PeerProcess) -> None:
        self._running = running
        self.said: Mapping[str, Any] = {}
        """What the worker said when it was ready."""

    @property
    def roots(self) -> Sequence[int]:
        return [self._running.pid]

    async def start(self) -> None:
        self.said = await self._hear(START_S_MAX)

    async def run(self, load: Load) -> Sequence[Answer]:
        message = {
            "prompts": [list(prompt) for prompt in load.prompts],
            "streams": load.streams,
            "tokens_out": load.tokens_out,
            "time_s_max": load.time_s_max,
        }
        assert self._running.process.stdin is not None
        self._running.process.stdin.write(json.dumps(message).encode() + b"\n")
        raw = await self._hear(load.time_s_max + SLACK_S)
        return [
            Answer(each["asked_s"], [(at, tokens) for at, tokens in each["arrivals"]])
            for each in raw
        ]

    async def _hear(self, within_s: float) -> Any:
        assert self._running.process.stdout is not None
        try:
            line = await asyncio.wait_for(self._running.process.stdout.readline(), within_s)
        except TimeoutError as error:
            raise self._running.failed(f"It said nothing for {within_s:.0f} s.") from error
        if not line:
            status = await self._running.process.wait()
            raise self._running.failed(f"It ended with status {status}.")
        return json.loads(line)


@asynccontextmanager
async def worker(
    name: str, argv: Sequence[str], log: Path, env: Mapping[str, str]
) -> AsyncIterator[WorkerEntrant]:
    """Start a worker and wait for its engine; leaving ends it."""
    async with peer_process(name, argv, log=log, env=env, pipes=True) as running:
        entrant = WorkerEntrant(running)
        await entrant.start()
        yield entrant
