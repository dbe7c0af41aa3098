"""A whole platform in one process: a real frontend, real channels, scripted engines.

Everything between a client's socket and `engine.step` is what production runs: gRPC, the directory,
the step channel, the engine loop, meter log and ledger. Only the engine computes nothing.
"""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

import grpc.aio

from headrace.serving.admission.accounts import demo_key
from headrace.serving.admission.key_store import cluster_token
from headrace.serving.channel.directory import Announcer
from headrace.serving.channel.replica_server import ReplicaServer, Sink
from headrace.serving.clock import Clock, SystemClock
from headrace.serving.config import Config, ModelConfig
from headrace.serving.domain.artifact import Manifest
from headrace.serving.domain.record import UsageRecord
from headrace.serving.engine.loop import EngineLoop
from headrace.serving.frontend.server import Addresses, Frontend
from headrace.serving.metering.give_back import Adjust
from headrace.serving.metering.ledger.ledger import Ledger
from headrace.serving.metering.ledger.projector import Follower
from headrace.serving.metering.ledger.reader import LedgerReader
from headrace.serving.metering.ledger.sqlite_database import SqliteDatabase
from headrace.serving.metering.meterlog.reader import LogReader
from headrace.serving.router.endpoint import ReplicaFacts
from headrace.serving.testing.gated_engine import GatedEngine
from headrace.serving.testing.greedy_sampler import GreedySampler
from headrace.serving.testing.scripted_engine import Rule, chained, tiny_limits
from headrace.serving.testing.signing import trust_key
from headrace.serving.testing.tiny_artifact import tiny_manifest, write_tiny_artifact
from headrace.serving.tokenizer import Tokenizer
from headrace.v1 import admin_pb2_grpc, billing_pb2_grpc, inference_pb2_grpc

MODEL = "tiny"
CONTROL_TOKENS = 3
"""The tiny tokenizer's first ids: its end of sequence and its chat marks."""


def endless(vocab: int) -> Rule:
    """A different token after every context, and never one that ends the answer."""
    rule = chained(vocab - CONTROL_TOKENS)

    def never_ending(context: Sequence[int]) -> int:
        return CONTROL_TOKENS + rule(context)

    return never_ending


class TestReplica:
    """One replica: a gated engine, its loop, its step channel, its announcement."""

    __test__ = False

    def __init__(
        self, replica_id: str, folder: Path, manifest: Manifest, *, token: str, directory: str
    ) -> None:
        vocab = manifest.decoder.vocab
        self.engine = GatedEngine(
            tiny_limits(
                vocab=vocab,
                rows_max=8,
                batch_tokens_max=64,
                sequence_tokens_max=1024,
                kv_blocks=1025,
                kv_block_tokens=8,
            ),
            endless(vocab),
        )
        self.loop: EngineLoop
        self._tokenizer = Tokenizer.from_folder(folder, manifest)
        self._manifest = manifest
        facts = ReplicaFacts(
            replica_id=replica_id,
            address="",
            model=manifest.model,
            version=manifest.artifact_id,
            ready=False,
            context_tokens=self.engine.limits.sequence_tokens_max,
            precision=manifest.precision.value,
            family=manifest.family,
            artifact_path=str(folder),
        )
        self.server = ReplicaServer(self._make_loop, facts, cluster_token=token)
        self.announcer = Announcer(directory, cluster_token=token, facts=lambda: self.server.facts)

    async def start(self) -> None:
        await self.server.start()
        self.announcer.start()

    async def stop(self) -> None:
        """Leave in order. Idempotent."""
        self.engine.release()
        await self.announcer.stop()
        await self.server.stop()

    async def kill(self) -> None:
        """Die as a process does: connections break first, nothing is said."""
        await self.server.disconnect()
        self.engine.die()
        await self.stop()

    def _make_loop(self, sink: Sink) -> EngineLoop:
        self.loop = EngineLoop(
            self.engine,
            GreedySampler(),
            self._tokenizer,
            self._manifest,
            clock=SystemClock(),
            sink=sink,
        )
        return self.loop


class Platform:
    """A frontend and its replicas. `async with`; ports are chosen by the system."""

    def __init__(
        self,
        home: Path,
        *,
        num_replicas: int = 1,
        manifest: Manifest | None = None,
        overrides: dict[str, object] | None = None,
        adjust: Adjust | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.home = home
        self._adjust = adjust
        self._clock = clock
        self.manifest = manifest or tiny_manifest(model=MODEL)
        self._num_replicas = num_replicas
        self._folder = home / "artifacts" / self.manifest.artifact_id
        self.config = Config(home=home, models=(ModelConfig(name=MODEL),)).with_overrides(
            {
                "frontend.grpc_port": 0,
                "frontend.http_port": 0,
                "directory.address": "127.0.0.1:0",
                **(overrides or {}),
            }
        )
        self.replicas: list[TestReplica] = []
        self.addresses: Addresses
        self.frontend: Frontend
        self.stub: inference_pb2_grpc.InferenceStub
        self.admin: admin_pb2_grpc.AdminStub
        self.billing: billing_pb2_grpc.BillingStub
        self.channel: grpc.aio.Channel
        self._has_changed = asyncio.Event()

    async def __aenter__(self) -> "Platform":
        self.config.prepare_home()
        write_tiny_artifact(self._folder, self.manifest)
        trust_key(self.config.trust_dir)
        self.key = demo_key(self.config)
        self.metadata = (("authorization", f"Bearer {self.key}"),)
        self.frontend = Frontend(
            self.config, on_change=self._has_changed.set, adjust=self._adjust, clock=self._clock
        )
        self.addresses = await self.frontend.start()
        self.channel = grpc.aio.insecure_channel(
            self.addresses.grpc, options=[("grpc.use_local_subchannel_pool", 1)]
        )
        self.stub = inference_pb2_grpc.InferenceStub(self.channel)
        self.admin = admin_pb2_grpc.AdminStub(self.channel)
        self.billing = billing_pb2_grpc.BillingStub(self.channel)
        for _ in range(self._num_replicas):
            await self.add_replica()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.channel.close()
        await asyncio.gather(*(replica.stop() for replica in self.replicas))
        await self.frontend.stop()

    async def add_replica(self) -> TestReplica:
        """Start one and wait until the frontend can use it."""
        replica = TestReplica(
            f"r{len(self.replicas)}",
            self._folder,
            self.manifest,
            token=cluster_token(self.config.cluster_token_file),
            directory=self.addresses.directory,
        )
        self.replicas.append(replica)
        await replica.start()
        await self.until(lambda: replica.server.facts.replica_id in self._connected())
        return replica

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until something about the fleet holds; looks after each change of it."""
        while not condition():
            self._has_changed.clear()
            await self._has_changed.wait()

    async def sees_accounts(self) -> None:
        """Wait until the frontend knows what was changed before this call."""
        await asyncio.to_thread(self.frontend.accounts.refresh)

    async def settled(self) -> None:
        """Wait until no answer is open: then every record is closed."""
        await self.frontend.gate.wait_empty()
        await self.frontend.pipeline.wait_settled()

    @property
    def records(self) -> list[UsageRecord]:
        """The requests in the ledger, newest first, once it has all that the log has."""
        ledger = Ledger(SqliteDatabase(self.config.ledger_path))
        try:
            log = LogReader(self.config.meterlog_dir)
            Follower(log, ledger, clock=SystemClock()).catch_up()
            return LedgerReader(ledger).records(limit=10_000)
        finally:
            ledger.close()

    def _connected(self) -> set[str]:
        return {
            endpoint.facts.replica_id
            for endpoint in self.frontend.fleet.endpoints
            if endpoint.is_connected
        }
