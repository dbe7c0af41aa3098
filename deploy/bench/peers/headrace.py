"""Headrace itself, twice: as `headrace serve` runs it, and its engine loop alone."""

import json
import re
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import ClassVar

import aiohttp
import grpc.aio

from headrace.compile.store import Store
from headrace.deploy.bench import procfs
from headrace.deploy.bench.engine_worker import ENGINE_OPTIONS
from headrace.deploy.bench.figures import Answer
from headrace.deploy.bench.grpc_client import closed_loop, inference_stub
from headrace.deploy.bench.peers.base import THREADS, Entrant, PeerFailed
from headrace.deploy.bench.peers.in_process import worker
from headrace.deploy.bench.workload import Load
from headrace.deploy.supervisor import Supervisor
from headrace.serving.admission.accounts import demo_key
from headrace.serving.config import Config, ModelConfig
from headrace.serving.domain.artifact import Precision
from headrace.serving.errors import ServingError
from headrace.v1 import inference_pb2_grpc

READY_S_MAX = 120.0


class HeadraceEntrant:
    """A running platform, reached over gRPC like any client reaches it."""

    def __init__(
        self,
        supervisor: Supervisor,
        stub: inference_pb2_grpc.InferenceStub,
        model: str,
        key: str,
    ) -> None:
        self._supervisor = supervisor
        self._stub = stub
        self._model = model
        self._key = key

    @property
    def roots(self) -> Sequence[int]:
        return list(self._supervisor.pids.values())

    async def run(self, load: Load) -> Sequence[Answer]:
        try:
            return await closed_loop(self._stub, self._model, self._key, load)
        except grpc.aio.AioRpcError as error:
            raise PeerFailed(
                f"headrace answered {error.code().name}.",
                why=error.details() or "It said no more.",
                fix="Read the logs in the benchmark's folder.",
            ) from error

    async def step_overhead(self) -> tuple[float, float]:
        """Sum and count of the steps' shares outside the engine call, so far."""
        addresses = self._supervisor.addresses
        assert addresses is not None
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"http://{addresses.http}/metrics") as response,
        ):
            return histogram(await response.text(), "headrace_step_overhead_ratio")

    def rss_mb(self) -> Mapping[str, float]:
        """Of the processes that serve: the frontend, and the largest replica."""
        processes = procfs.read_all()
        replicas = [
            process.rss_bytes
            for process in procfs.tree(self.roots, processes)
            if "ServeReplica" in process.title
        ]
        frontend = processes.get(self._supervisor.pids.get("frontend", 0))
        found = {"replica": max(replicas, default=0)}
        found["frontend"] = frontend.rss_bytes if frontend else 0
        return {name: rss / 1e6 for name, rss in found.items() if rss}


class Headrace:
    """Frontend, step channel, Ray and replica, as a user runs them; one replica, two threads."""

    name = "headrace"
    title = "Headrace"
    formats: ClassVar[Mapping[Precision, str]] = {Precision.INT8: "int8", Precision.INT4: "int4"}
    starts_slowly = False

    def __init__(self, home: Path, model: str) -> None:
        self._home = home
        self._model = model

    def missing(self, precision: Precision) -> str | None:
        return missing_artifact(self._home, self._model, precision)

    def start(self, precision: Precision, log: Path) -> AbstractAsyncContextManager[Entrant]:
        return self._serve(precision)

    @asynccontextmanager
    async def _serve(self, precision: Precision) -> AsyncIterator[HeadraceEntrant]:
        with tempfile.TemporaryDirectory(prefix="headrace-bench-") as folder:
            config = bench_config(Path(folder), self._home, self._model, precision)
            key = demo_key(config)  # Before the frontend reads the keys.
            supervisor = Supervisor(config, report=lambda _: None, assignments=())
            try:
                await supervisor.start(frontend=True, control=True)
                await supervisor.until_serving(READY_S_MAX)
                assert supervisor.addresses is not None
                async with inference_stub(supervisor.addresses.grpc) as stub:
                    yield HeadraceEntrant(supervisor, stub, self._model, key)
            finally:
                await supervisor.stop()


class HeadraceEngine:
    """The engine and its loop in one process, as the peers with an in-process API are driven."""

    name = "headrace-engine"
    title = "Headrace, engine loop alone"
    formats: ClassVar[Mapping[Precision, str]] = {Precision.INT8: "int8", Precision.INT4: "int4"}
    starts_slowly = False

    def __init__(self, home: Path, model: str) -> None:
        self._home = home
        self._model = model

    def missing(self, precision: Precision) -> str | None:
        return missing_artifact(self._home, self._model, precision)

    def start(self, precision: Precision, log: Path) -> AbstractAsyncContextManager[Entrant]:
        folder = Store(self._home).resolve(self._model, precision)
        limits = model_config(self._home, self._model, precision)
        options = json.dumps({name: getattr(limits, name) for name in ENGINE_OPTIONS})
        argv = [sys.executable, "-m", "headrace.deploy.bench.engine_worker", str(folder), options]
        return worker(f"{self.title} {precision}", argv, log, env={})


def model_config(home: Path, model: str, precision: Precision) -> ModelConfig:
    """The model as the user's config.yaml has it, with one replica on our number of threads.

    Raises:
        ConfigRefused: the file cannot be read.
    """
    found = next((each for each in Config.load(home).models if each.name == model), None)
    limits = found or ModelConfig(name=model)
    return replace(limits, precision=precision, replicas=1, threads=THREADS)


def missing_artifact(home: Path, model: str, precision: Precision) -> str | None:
    try:
        Store(home).resolve(model, precision)
    except ServingError as refusal:
        return f"{refusal.what} {refusal.fix}"
    return None


def bench_config(folder: Path, home: Path, model: str, precision: Precision) -> Config:
    """A home of its own for one turn: artifacts and the model's limits are the user's.

    Raises:
        ConfigRefused: the folder cannot be made.
    """
    for name in ("artifacts", "names", "trust"):
        (folder / name).symlink_to((home / name).absolute())
    settings = {
        "models": [asdict(model_config(home, model, precision))],
        "frontend": {"grpc_port": 0, "http_port": 0, "drain_s": 1.0},
        "directory": {"address": "127.0.0.1:0"},
    }
    (folder / "config.yaml").write_text(json.dumps(settings), "utf-8")  # JSON is YAML.
    config = Config.load(folder)
    config.prepare_home()
    return config


def histogram(text: str, name: str) -> tuple[float, float]:
    """Sum and count of a histogram over all labels, in Prometheus' text form."""
    totals = {"sum": 0.0, "count": 0.0}
    for kind in totals:
        for value in re.findall(rf"^{name}_{kind}(?:{{[^}}]*}})? (\S+)", text, re.MULTILINE):
            totals[kind] += float(value)
    return totals["sum"], totals["count"]
