"""Peers that are HTTP servers: one closed loop of streaming requests, read event by event."""

import asyncio
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import aiohttp

from headrace.deploy.bench.figures import Answer
from headrace.deploy.bench.peers.base import PeerProcess
from headrace.deploy.bench.workload import Load

EVENT_BYTES_MAX = 1 << 20
"""llama.cpp's last event repeats all settings and the prompt."""

Body = Callable[[Sequence[int], int], Mapping[str, Any]]
"""Prompt tokens and how many to generate, to the JSON of a request."""
TokensSoFar = Callable[[Mapping[str, Any]], int | None]
"""An event to how many tokens the answer has by now; None when it does not say."""


class HttpEntrant:
    """An HTTP server of a peer, and how to ask it."""

    def __init__(
        self, running: PeerProcess, url: str, *, body: Body, tokens_so_far: TokensSoFar
    ) -> None:
        self._running = running
        self._url = url
        self._body = body
        self._tokens_so_far = tokens_so_far

    @property
    def roots(self) -> Sequence[int]:
        return [self._running.pid]

    async def run(self, load: Load) -> Sequence[Answer]:
        answers: list[Answer] = []
        waiting = iter(load.prompts)
        # llama.cpp closes a connection it has kept for a while, also while the next request is
        # written to it; a new one for each request costs a tenth of a millisecond.
        connector = aiohttp.TCPConnector(limit=load.streams, force_close=True)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)
        try:
            async with (
                aiohttp.ClientSession(
                    connector=connector, timeout=timeout, read_bufsize=EVENT_BYTES_MAX
                ) as session,
                asyncio.timeout(load.time_s_max),
                asyncio.TaskGroup() as callers,
            ):
                for _ in range(load.streams):
                    callers.create_task(self._caller(session, waiting, load.tokens_out, answers))
        except TimeoutError:
            pass  # The load is cut off; what arrived until then counts.
        except ExceptionGroup as group:
            raise self._running.failed(f"{group.exceptions[0]!r}.") from group
        return answers

    async def _caller(
        self, session: aiohttp.ClientSession, waiting: Any, tokens_out: int, answers: list[Answer]
    ) -> None:
        for prompt in waiting:
            answer = Answer(time.monotonic())
            answers.append(answer)
            async with session.post(self._url, json=self._body(prompt, tokens_out)) as response:
                response.raise_for_status()
                count = 0
                async for line in response.content:
                    event = _event(line)
                    so_far = None if event is None else self._tokens_so_far(event)
                    if so_far is not None and so_far > count:
                        answer.arrivals.append((time.monotonic(), so_far - count))
                        count = so_far


def _event(line: bytes) -> Mapping[str, Any] | None:
    """The JSON of one server-sent event; None for the lines between and for the end mark."""
    if not line.startswith(b"data:"):
        return None
    data = line[5:].strip()
    return None if data == b"[DONE]" else json.loads(data)


async def answers_200(url: str) -> bool:
    """Whether a server is there and well."""
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2)) as session,
            session.get(url) as response,
        ):
            return response.status == 200
    except (aiohttp.ClientError, TimeoutError):
        return False
