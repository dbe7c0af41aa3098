"""One engine and its step channel, and the Ray Serve deployment around them.

Ray Serve places it, asks after its health and tells it to go; tokens never pass through Ray.
Frontends find the replica in the directory and talk to its step channel.
"""

import asyncio
import gc
import hashlib
import os
import sys
import uuid
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path

from headrace.deploy.rollout import EnginePlan
from headrace.serving import log
from headrace.serving.admission.key_store import cluster_token
from headrace.serving.channel.directory import Announcer
from headrace.serving.channel.replica_server import ReplicaServer, Sink
from headrace.serving.clock import Clock, SystemClock
from headrace.serving.domain.artifact import Manifest
from headrace.serving.engine.base import Engine
from headrace.serving.engine.loader import load_engine
from headrace.serving.engine.loop import EngineLoop
from headrace.serving.engine.loop_report import TokenSampler
from headrace.serving.engine.sampler import Sampler
from headrace.serving.errors import EngineFault
from headrace.serving.router.endpoint import ReplicaFacts
from headrace.serving.tokenizer import Tokenizer

HUNG_S = 30.0
"""A step takes milliseconds; one of 512 tokens on a crowded machine a second or two."""


SWITCH_INTERVAL_S = 0.000_5
"""How long the channel's thread may keep the interpreter while the engine's waits for it. At
CPython's own 5 ms one hand-over could cost a whole step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wiring:
    """Where a replica announces itself, and on which interface it listens."""

    directory: str
    cluster_token_path: str
    host: str = "127.0.0.1"

    @property
    def fingerprint(self) -> str:
        """The same for equal wirings, in every process."""
        return hashlib.sha256(repr(astuple(self)).encode()).hexdigest()[:8]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """An engine and what belongs to it, ready to be stepped."""

    engine: Engine
    sampler: TokenSampler
    tokenizer: Tokenizer
    manifest: Manifest


def load_artifact(plan: EnginePlan) -> Loaded:
    """Load what the plan names. Blocks, for a second or two.

    Raises:
        ArtifactError: the artifact is not what was built, or cannot be loaded here.
    """
    folder = Path(plan.artifact)
    engine, manifest = load_engine(
        folder,
        rows_max=plan.rows_max,
        batch_tokens_max=plan.batch_tokens_max,
        kv_tokens=plan.kv_tokens,
        threads=plan.threads,
        allow_unverified=plan.allow_unverified,
    )
    return Loaded(
        engine=engine,
        sampler=Sampler(manifest.decoder.vocab, plan.rows_max, threads=plan.threads),
        tokenizer=Tokenizer.from_folder(folder, manifest),
        manifest=manifest,
    )


class Replica:
    """One engine, its loop, its step channel and its announcement. Owned by one event loop."""

    def __init__(
        self,
        plan: EnginePlan,
        wiring: Wiring,
        *,
        load: Callable[[EnginePlan], Loaded] = load_artifact,
        clock: Clock | None = None,
    ) -> None:
        self._load = load
        self._plan = plan
        self._wiring = wiring
        self._clock = clock or SystemClock()
        self._loop: EngineLoop | None = None
        self._server: ReplicaServer | None = None
        self._announcer: Announcer | None = None
        self._progress = (0, 0.0)
        """Steps the loop had made when it was last seen to move or idle, and when that was."""

    async def start(self, replica_id: str) -> None:
        """Load the artifact, listen, announce.

        Raises:
            ArtifactError: the artifact is not what was built, or cannot be loaded here.
        """
        token = cluster_token(Path(self._wiring.cluster_token_path))
        # Hashing and mapping the weights takes a second: health checks are answered meanwhile.
        loaded = await asyncio.to_thread(self._load, self._plan)
        manifest = loaded.manifest
        facts = ReplicaFacts(
            replica_id=replica_id,
            address="",
            model=self._plan.model,
            version=manifest.artifact_id,
            ready=False,
            context_tokens=manifest.decoder.context_tokens,
            precision=manifest.precision,
            family=manifest.family,
            artifact_path=self._plan.artifact,
        )
        server = self._server = ReplicaServer(
            lambda sink: self._make_loop(loaded, sink),
            facts,
            cluster_token=token,
            host=self._wiring.host,
            clock=self._clock,
        )
        await server.start()
        _settle_interpreter()
        self._progress = (0, self._clock.monotonic_ms())
        self._announcer = Announcer(
            self._wiring.directory, cluster_token=token, facts=lambda: server.facts
        )
        self._announcer.start()

    def check(self) -> None:
        """Return if the engine can work.

        Raises:
            EngineFault: it has failed, or one step has run for longer than `HUNG_S`.
        """
        assert self._loop is not None
        if not self._loop.healthy:
            raise EngineFault(
                f"The engine of {self._plan.model} has failed.",
                why="A failed engine does not recover.",
                fix="Nothing to do: this replica is replaced. If it recurs, see its log.",
            )
        steps, now_ms = self._loop.times.steps, self._clock.monotonic_ms()
        last_steps, since_ms = self._progress
        if steps != last_steps or not self._loop.load().running:
            self._progress = (steps, now_ms)
        elif now_ms - since_ms > HUNG_S * 1000:
            raise EngineFault(
                f"A step of {self._plan.model} has run for {(now_ms - since_ms) / 1000:.0f} s.",
                why=f"A step that takes more than {HUNG_S:.0f} s is taken to hang.",
                fix="Nothing to do: this replica is replaced.",
            )

    def _make_loop(self, loaded: Loaded, sink: Sink) -> EngineLoop:
        self._loop = EngineLoop(
            loaded.engine,
            loaded.sampler,
            loaded.tokenizer,
            loaded.manifest,
            clock=self._clock,
            sink=sink,
            waiting_max=self._plan.waiting_max,
            prefill_tokens_max=self._plan.prefill_tokens_max,
        )
        return self._loop

    async def stop(self, drain_s: float) -> None:
        """Take nothing new, let what runs finish for at most `drain_s`, then leave. Idempotent."""
        server, self._server = self._server, None
        if server is None:
            return
        await server.drain(drain_s)
        if self._announcer is not None:
            await self._announcer.stop()
        await server.stop()


def _settle_interpreter() -> None:
    """Keep the interpreter out of the engine's way, once everything is loaded."""
    # What was loaded stays: the collector need not look at it again with every request.
    gc.collect()
    gc.freeze()
    sys.setswitchinterval(SWITCH_INTERVAL_S)


class EngineReplica:
    """What Ray Serve runs: `Replica`, with the hooks that Serve calls by name."""

    load = staticmethod(load_artifact)

    async def __init__(self, plan: EnginePlan, wiring: Wiring, drain_s: float) -> None:  # pyright: ignore[reportGeneralTypeIssues]
        """Serve awaits it: a replica is ready when it has announced itself."""
        log.setup_logging()
        if wiring.host == "127.0.0.1":
            _keep_serve_on_loopback()
        self._drain_s = drain_s
        self._replica = Replica(plan, wiring, load=self.load)
        await self._replica.start(f"{plan.model}-{uuid.uuid4().hex[:8]}")

    async def check_health(self) -> None:
        """Serve calls it once a second.

        A failed engine ends the process at once: Serve notices a death sooner than three failed
        checks, and the frontends have moved its sequences elsewhere already.
        """
        try:
            self._replica.check()
        except EngineFault as fault:
            log.refused(fault, during="health check")
            os._exit(1)

    async def pid(self) -> int:
        """For operators and tests: which process this is."""
        return os.getpid()

    async def __del__(self) -> None:
        """Serve awaits it before a replica goes, for at most its graceful shutdown time.

        Without it Serve would not know of our streams, which do not pass through it, and would
        end the process under them.
        """
        await self._replica.stop(self._drain_s)


def _keep_serve_on_loopback() -> None:
    """Serve opens a port for calls between deployments on every interface; here, on loopback only.

    Nobody calls it: our tokens do not take that way. It asks for Ray's token, and still a laptop
    has no reason to show it to its network.
    """
    from ray.serve._private import replica as serve_replica

    name = "add_port_to_grpc_server"
    listen = getattr(serve_replica, name)

    def on_loopback(server: object, address: str) -> int:
        return listen(server, address.replace("[::]:", "127.0.0.1:"))

    setattr(serve_replica, name, on_loopback)
