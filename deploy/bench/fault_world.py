"""A small platform of killable processes, and clients that write down what they were told.

One frontend as the supervisor would start it, paced engines as processes of their own, a PostgreSQL
for the shared ledger where Debian's package is installed, and asyncio clients in this process.
`kill` is SIGKILL (PostgreSQL: its own immediate stop) and returns when the successor works.
"""

import asyncio
import json
import os
import random
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import grpc.aio

from headrace.deploy.bench.grpc_client import Metadata, bearer
from headrace.deploy.bench.peers.base import free_port
from headrace.deploy.processes import Child
from headrace.serving.admission.accounts import demo_key
from headrace.serving.admission.key_store import cluster_token
from headrace.serving.config import Config
from headrace.serving.frontend.status import DETAILS_KEY
from headrace.serving.testing.postgres import PostgresServer
from headrace.serving.testing.signing import trust_key
from headrace.v1 import inference_pb2 as pb
from headrace.v1 import inference_pb2_grpc

MODEL = "paced"
TOKENS_PER_S = 300.0
ENGINES = 2
READY_S_MAX = 60.0
TOKENS_MAX = 160
PROMPT_TOKENS_MAX = 40
CUT_OFF = "CUT_OFF"
"""The error of a client whose connection died: gRPC's own, not a refusal of ours."""
HUNG_UP = "HUNG_UP"
"""The error of a client that left of its own will."""
PAUSE_S = 0.02
"""After a refusal. A real client waits longer; a bench wants the next request in the fault."""


@dataclass(slots=True, eq=False)
class Transcript:
    """One request as its client saw it."""

    request_id: str
    prompt_tokens: int
    received_tokens: int = 0
    done: pb.Done | None = None
    """The receipt: from here on the request is settled, whatever dies."""
    error: str = ""


class FaultWorld:
    """`async with`; everything it starts, it ends."""

    def __init__(self, home: Path, *, seed: int, postgres: PostgresServer | None) -> None:
        """Nothing runs yet. `postgres` runs, and belongs to the caller."""
        self.home = home
        self._postgres = postgres
        self.random = random.Random(seed)  # noqa: S311  Repeatable, not secret.
        self.transcripts: list[Transcript] = []
        self.kills: dict[str, int] = {}
        self._addresses: Mapping[str, object] = {}
        self._frontend: Child | None = None
        self._engines: list[asyncio.subprocess.Process] = []
        self._is_over = False
        self._count = 0
        self._clients: list[asyncio.Task[None]] = []
        self._is_up = asyncio.Event()
        self._has_more = asyncio.Event()

    async def __aenter__(self) -> Self:
        self.config = _config(self.home, self._postgres)
        cluster_token(self.config.cluster_token_file)
        trust_key(self.config.trust_dir)  # Of what the paced replicas announce.
        self._metadata: Metadata = bearer(demo_key(self.config))
        try:
            await self._start_frontend()
            for _ in range(ENGINES):
                await self._start_engine()
            await self._until_served()
        except BaseException:
            await self._end()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._end()

    def begin(self, clients: int) -> None:
        """Start `clients` clients, each asking its next question when the last one ended."""
        self._clients = [asyncio.create_task(self._client()) for _ in range(clients)]

    @property
    def victims(self) -> Sequence[str]:
        return (
            ("frontend", "engine") if self._postgres is None else ("frontend", "engine", "ledger")
        )

    async def kill(self, victim: str) -> None:
        """Kill one of `victims`; returns when its successor works."""
        self.kills[victim] = self.kills.get(victim, 0) + 1
        if victim == "frontend":
            assert self._frontend is not None
            self._is_up.clear()
            await self._frontend.kill()
            await self._start_frontend()
            await self._until_served()
        elif victim == "ledger":
            assert self._postgres is not None
            await asyncio.to_thread(self._postgres.stop)
            await self.until_more(self.random.randint(0, 4))
            await asyncio.to_thread(self._postgres.start)
        else:
            engine = self._engines.pop(self.random.randrange(len(self._engines)))
            os.kill(engine.pid, signal.SIGKILL)
            await engine.wait()
            await self._start_engine()

    async def finish(self) -> None:
        """Let the clients end their questions, then stop the frontend as an operator would."""
        self._is_over = True
        await asyncio.gather(*self._clients)
        assert self._frontend is not None
        await self._frontend.stop(READY_S_MAX)

    async def until_more(self, answers: int) -> None:
        """Return when so many more questions have ended."""
        goal = len(self.transcripts) + answers
        while len(self.transcripts) < goal:
            self._has_more.clear()
            await self._has_more.wait()

    async def _client(self) -> None:
        """Ask until it is over. A channel of its own, as every real client has."""
        while not self._is_over:
            await self._is_up.wait()
            address = str(self._addresses["grpc"])
            options = [("grpc.enable_retries", 0), ("grpc.use_local_subchannel_pool", 1)]
            async with grpc.aio.insecure_channel(address, options) as channel:
                stub = inference_pb2_grpc.InferenceStub(channel)
                while not self._is_over:
                    transcript = await self._ask(stub)
                    self._note(transcript)
                    if transcript.error:
                        await asyncio.sleep(PAUSE_S)
                        break  # With a new channel: gRPC's own reconnection backs off for long.

    def _note(self, transcript: Transcript) -> None:
        self.transcripts.append(transcript)
        self._has_more.set()

    async def _ask(self, stub: inference_pb2_grpc.InferenceStub) -> Transcript:
        self._count += 1
        prompt_tokens = self.random.randint(1, PROMPT_TOKENS_MAX)
        transcript = Transcript(f"q{self._count}", prompt_tokens)
        request = pb.GenerateRequest(
            request_id=transcript.request_id,
            model=MODEL,
            max_tokens=self.random.randint(1, TOKENS_MAX),
            ignore_eos=True,
        )
        request.tokens.ids.extend([5] * prompt_tokens)
        hangs_up_at = self.random.choice((None, None, None, self.random.randint(1, 60)))
        call = stub.Generate(request, metadata=self._metadata, timeout=30)
        try:
            async for chunk in call:
                if chunk.HasField("done"):
                    transcript.done = chunk.done
                    break
                transcript.received_tokens += len(chunk.token_ids)
                if hangs_up_at is not None and transcript.received_tokens >= hangs_up_at:
                    call.cancel()
                    transcript.error = HUNG_UP
                    break
        except grpc.aio.AioRpcError as error:
            told = {key for key, _ in error.trailing_metadata() or ()}
            # Every refusal of ours carries its details: what has none is gRPC's own.
            is_ours = DETAILS_KEY in told or error.code() is not grpc.StatusCode.UNAVAILABLE
            transcript.error = error.code().name if is_ours else CUT_OFF
        return transcript

    async def _start_frontend(self) -> None:
        child = await Child.start(
            "frontend",
            [sys.executable, "-m", "headrace.deploy.frontend_main", "--home", str(self.home)],
            log_path=self.home / "logs" / "frontend.log",
        )
        child.send({"event": "hello", **self._addresses})
        ready = await child.ready(READY_S_MAX)
        self._addresses = {name: ready[name] for name in ("grpc", "http", "directory")}
        self._frontend = child

    async def _start_engine(self) -> None:
        with (self.home / "logs" / "engines.log").open("ab") as log:
            engine = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "headrace.serving.testing.paced_replica"),
                *("--directory", str(self._addresses["directory"])),
                *("--cluster-token-file", str(self.config.cluster_token_file)),
                *("--model", MODEL, "--tokens-per-s", str(TOKENS_PER_S)),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=log,
            )
        self._engines.append(engine)

    async def _until_served(self) -> None:
        """Until a question is answered: the frontend listens and knows an engine."""
        async with asyncio.timeout(READY_S_MAX):
            while True:
                address = str(self._addresses["grpc"])
                async with grpc.aio.insecure_channel(address) as channel:
                    transcript = await self._ask(inference_pb2_grpc.InferenceStub(channel))
                self._note(transcript)
                if not transcript.error or transcript.error == HUNG_UP:
                    self._is_up.set()
                    return
                await asyncio.sleep(PAUSE_S)

    async def _end(self) -> None:
        self._is_over = True
        for client in self._clients:
            client.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)
        if self._frontend is not None:
            await self._frontend.kill()
        for engine in self._engines:
            if engine.returncode is None:
                engine.kill()
            await engine.wait()


def _config(home: Path, postgres: PostgresServer | None) -> Config:
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    settings: dict[str, object] = {
        "models": [{"name": MODEL}],
        "frontend": {"grpc_port": free_port(), "http_port": free_port(), "drain_s": 20.0},
        "directory": {"address": f"127.0.0.1:{free_port()}"},
    }
    if postgres is not None:
        (home / "dsn").write_text(postgres.dsn)
        settings["ledger"] = {"postgres_dsn_file": str(home / "dsn")}
    (home / "config.yaml").write_text(json.dumps(settings), "utf-8")  # JSON is YAML.
    config = Config.load(home)
    config.prepare_home()
    return config
