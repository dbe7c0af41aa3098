"""What our frontend is compared with, each a process: bare `grpc.aio`, and Ray Serve's gRPC proxy.

`python -m headrace.deploy.bench.frontend_servers bare|serve --tokens-per-s N` prints one JSON line
with its address and serves until its standard input ends. Both answer the same protocol as our
frontend with the same message in every chunk; neither authenticates, meters or tokenises.
"""

import argparse
import asyncio
import json
import logging
import os
import sys
import time
from collections.abc import AsyncIterator

import grpc
import grpc.aio
import uvloop

from headrace.v1 import inference_pb2, inference_pb2_grpc

TEXT = "the"
TOKEN_ID = 1
SERVE_APPLICATION = "paced"
PROXY_S_MAX = 20.0


class Ticker:
    """A clock that all streams of a process share: they advance together, like rows of a batch."""

    def __init__(self, tokens_per_s: float) -> None:
        self._period_s = 1 / tokens_per_s if tokens_per_s else 0.0
        self._next = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def tick(self) -> None:
        """Return at the next tick; at once when there is no pace."""
        if not self._period_s:
            await asyncio.sleep(0)
            return
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        await self._next.wait()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        due_s = loop.time()
        while True:
            # A late tick is not made up for: a real engine does not hurry either.
            due_s = max(due_s, loop.time() - self._period_s) + self._period_s
            await asyncio.sleep(due_s - loop.time())
            reached, self._next = self._next, asyncio.Event()
            reached.set()


async def answer(
    ticker: Ticker, request: inference_pb2.GenerateRequest
) -> AsyncIterator[inference_pb2.GenerateChunk]:
    """A first token at once, then one for each tick."""
    for count in range(1, request.max_tokens + 1):
        chunk = inference_pb2.GenerateChunk(
            request_id=request.request_id, text=TEXT, token_ids=(TOKEN_ID,)
        )
        chunk.usage.prompt_tokens = len(request.tokens.ids)
        chunk.usage.completion_tokens = count
        if count == request.max_tokens:
            chunk.finish_reason = inference_pb2.FINISH_REASON_LENGTH
            chunk.done.usage.CopyFrom(chunk.usage)
        yield chunk
        if count < request.max_tokens:
            await ticker.tick()


class Bare(inference_pb2_grpc.InferenceServicer):
    """The least that a Python server can do."""

    def __init__(self, tokens_per_s: float) -> None:
        self._ticker = Ticker(tokens_per_s)

    async def Generate(
        self,
        request: inference_pb2.GenerateRequest,
        context: grpc.aio.ServicerContext,
    ) -> None:
        async for chunk in answer(self._ticker, request):
            await context.write(chunk)


async def serve_bare(tokens_per_s: float) -> None:
    server = grpc.aio.server()
    inference_pb2_grpc.add_InferenceServicer_to_server(Bare(tokens_per_s), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    _say(f"127.0.0.1:{port}")
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(None)


def serve_ray(tokens_per_s: float) -> None:
    """Ray Serve with its defaults, one replica, its own gRPC proxy on this node."""
    import ray
    from ray import serve
    from ray.serve.config import gRPCOptions

    from headrace.deploy.bench.peers.base import free_port

    port = free_port()
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    serve.start(
        http_options={"host": "127.0.0.1", "port": free_port()},
        grpc_options=gRPCOptions(
            port=port,
            grpc_servicer_functions=[
                "headrace.v1.inference_pb2_grpc.add_InferenceServicer_to_server"
            ],
        ),
        logging_config={"log_level": "ERROR", "enable_access_log": False},
    )
    deployment = serve.deployment(
        name="paced", max_ongoing_requests=1024, ray_actor_options={"num_cpus": 0.1}
    )(PacedGenerator)
    serve.run(deployment.bind(tokens_per_s), name=SERVE_APPLICATION, route_prefix="/paced")
    _wait_for_application(f"127.0.0.1:{port}")
    _say(f"127.0.0.1:{port}")
    sys.stdin.read()
    serve.shutdown()
    ray.shutdown()


def _wait_for_application(address: str) -> None:
    """Return once the proxy knows where the application is; it learns a moment after `run`."""
    from ray.serve.generated import serve_pb2, serve_pb2_grpc

    request_type = serve_pb2.ListApplicationsRequest  # pyright: ignore[reportAttributeAccessIssue]

    with grpc.insecure_channel(address) as channel:
        stub = serve_pb2_grpc.RayServeAPIServiceStub(channel)
        deadline_s = time.monotonic() + PROXY_S_MAX
        while time.monotonic() < deadline_s:
            listed = stub.ListApplications(request_type(), wait_for_ready=True, timeout=PROXY_S_MAX)
            if SERVE_APPLICATION in listed.application_names:
                return
            time.sleep(0.1)
    raise TimeoutError(f"Serve's proxy did not know {SERVE_APPLICATION} after {PROXY_S_MAX} s")


class PacedGenerator:
    """The deployment behind Serve's proxy."""

    def __init__(self, tokens_per_s: float) -> None:
        self._tokens_per_s = tokens_per_s
        self._ticker: Ticker | None = None

    async def Generate(
        self, request: inference_pb2.GenerateRequest
    ) -> AsyncIterator[inference_pb2.GenerateChunk]:
        if self._ticker is None:  # Not in __init__: the ticker belongs to this event loop.
            self._ticker = Ticker(self._tokens_per_s)
        async for chunk in answer(self._ticker, request):
            yield chunk


def _say(address: str) -> None:
    os.write(3, json.dumps({"address": address}).encode() + b"\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=("bare", "serve"))
    parser.add_argument("--tokens-per-s", type=float, required=True)
    args = parser.parse_args()
    os.dup2(1, 3)
    os.dup2(2, 1)  # What a library prints must not mix with what we say.
    if args.kind == "bare":
        uvloop.run(serve_bare(args.tokens_per_s))
    else:
        serve_ray(args.tokens_per_s)


if __name__ == "__main__":
    main()
