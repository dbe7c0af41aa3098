"""A replica announces itself, says when it is sick, and leaves only when its streams are done."""

import asyncio
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import grpc.aio
import pytest

from headrace.deploy.replica import HUNG_S, Loaded, Replica, Wiring
from headrace.deploy.rollout import EnginePlan
from headrace.serving.admission.key_store import cluster_token
from headrace.serving.channel.credentials import token_metadata
from headrace.serving.channel.directory import DirectoryServer, Watcher
from headrace.serving.engine.base import Logits, Row
from headrace.serving.errors import EngineFault
from headrace.serving.router.endpoint import ReplicaFacts
from headrace.serving.testing.clock import ManualClock
from headrace.serving.testing.greedy_sampler import GreedySampler
from headrace.serving.testing.scripted_engine import ScriptedEngine, chained, tiny_limits
from headrace.serving.testing.tiny_tokenizer import tiny_manifest, tiny_tokenizer
from headrace.v1 import step_pb2, step_pb2_grpc

PLAN = EnginePlan(
    model="tiny",
    artifact="/nowhere",
    rows_max=4,
    batch_tokens_max=16,
    prefill_tokens_max=16,
    kv_tokens=512,
    waiting_max=8,
    threads=1,
)


class GatedEngine(ScriptedEngine):
    """Each step waits until it is let through."""

    def __init__(self, vocab: int) -> None:
        super().__init__(tiny_limits(vocab=vocab), chained(vocab))
        self.gate = threading.Semaphore(0)
        self.entered = threading.Semaphore(0)

    def step(self, rows: Sequence[Row]) -> Logits:
        self.entered.release()
        self.gate.acquire()
        return super().step(rows)


class House:
    """A directory, one replica, and a frontend's channel to it."""

    def __init__(self, home: Path) -> None:
        self.token_path = home / "token"
        self.token = cluster_token(self.token_path)
        self.tokenizer = tiny_tokenizer()
        self.engine = GatedEngine(self.tokenizer.vocab_size)
        self.clock = ManualClock()
        self.directory = DirectoryServer(cluster_token=self.token, address="127.0.0.1:0")
        self.sets: asyncio.Queue[Sequence[ReplicaFacts]] = asyncio.Queue()
        self.watcher: Watcher
        self.replica: Replica

    async def open(self) -> None:
        address = await self.directory.start()
        wiring = Wiring(directory=address, cluster_token_path=str(self.token_path))
        self.replica = Replica(PLAN, wiring, load=self._load, clock=self.clock)
        await self.replica.start("r1")
        self.watcher = Watcher(address, cluster_token=self.token, on_set=self.sets.put_nowait)
        self.watcher.start()
        await self.until_known(1)

    async def until_known(self, num_replicas: int) -> None:
        """Until the directory names so many replicas."""
        async with asyncio.timeout(30):
            while len(await self.sets.get()) != num_replicas:
                pass

    async def close(self) -> None:
        self.engine.gate.release(1000)
        await self.replica.stop(0)
        await self.watcher.stop()
        await self.directory.stop()

    @asynccontextmanager
    async def stream(self, max_tokens: int) -> AsyncIterator["grpc.aio.StreamStreamCall"]:
        """One running sequence."""
        facts = self.directory.directory.replicas[0]
        async with grpc.aio.insecure_channel(facts.address) as channel:
            stub = step_pb2_grpc.StepChannelStub(channel)
            call = stub.Connect(metadata=token_metadata(self.token))
            sampling = step_pb2.StepSampling(max_tokens=max_tokens, ignore_eos=True, logprobs=-1)
            submit = step_pb2.Submit(sequence=1, prompt_ids=[5, 6, 7], sampling=sampling)
            await call.write(step_pb2.ToReplica(submit=[submit]))
            await asyncio.to_thread(self.engine.entered.acquire)
            yield call
            call.cancel()

    def _load(self, plan: EnginePlan) -> Loaded:
        return Loaded(
            engine=self.engine,
            sampler=GreedySampler(),
            tokenizer=self.tokenizer,
            manifest=tiny_manifest(self.tokenizer.vocab_size),
        )


async def read_to_the_end(call: "grpc.aio.StreamStreamCall") -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


@asynccontextmanager
async def a_house(home: Path) -> AsyncIterator[House]:
    house = House(home)
    await house.open()
    try:
        yield house
    finally:
        await house.close()


def test_a_replica_that_has_loaded_is_in_the_directory(tmp_path: Path) -> None:
    async def story() -> None:
        async with a_house(tmp_path) as house:
            facts = house.directory.directory.replicas[0]
            house.replica.check()

            assert (facts.replica_id, facts.model, facts.ready) == ("r1", "tiny", True)
            assert facts.version == "0" * 64

    asyncio.run(story())


def test_a_replica_that_stops_leaves_the_directory(tmp_path: Path) -> None:
    async def story() -> None:
        async with a_house(tmp_path) as house:
            await house.replica.stop(drain_s=5)
            await house.until_known(0)

            assert house.engine.is_closed

    asyncio.run(story())


def test_a_replica_leaves_only_when_its_streams_are_done(tmp_path: Path) -> None:
    """A rolling upgrade ends old replicas under load; nobody may notice."""

    async def story() -> None:
        async with a_house(tmp_path) as house, house.stream(max_tokens=3) as call:
            stopping = asyncio.create_task(house.replica.stop(drain_s=60))
            tokens: list[int] = []
            finish = ""
            house.engine.gate.release(1000)
            while not finish:
                message = await call.read()
                for delta in message.step.deltas:
                    tokens += delta.token_ids
                    finish = delta.finish
            await stopping

            assert len(tokens) == 3
            assert finish == "length"

    asyncio.run(story())


def test_a_stream_that_outlasts_the_drain_is_cut_off(tmp_path: Path) -> None:
    """The drain is bounded; the frontend goes on with such a stream on another replica."""

    async def story() -> None:
        async with a_house(tmp_path) as house, house.stream(max_tokens=3) as call:
            stopping = asyncio.create_task(house.replica.stop(drain_s=0))
            with pytest.raises(grpc.aio.AioRpcError) as cut:
                await read_to_the_end(call)
            house.engine.gate.release(1000)
            await stopping

            assert cut.value.code() is grpc.StatusCode.UNAVAILABLE

    asyncio.run(story())


def test_a_step_that_hangs_makes_the_replica_sick(tmp_path: Path) -> None:
    """A hung device neither fails nor finishes; only time tells."""

    async def story() -> None:
        async with a_house(tmp_path) as house, house.stream(max_tokens=3):
            house.replica.check()
            house.clock.advance(seconds=HUNG_S - 1)
            house.replica.check()
            house.clock.advance(seconds=2)
            with pytest.raises(EngineFault, match="has run for 31 s"):
                house.replica.check()

    asyncio.run(story())


def test_an_idle_replica_is_well_however_long_it_waits(tmp_path: Path) -> None:
    async def story() -> None:
        async with a_house(tmp_path) as house:
            house.clock.advance(seconds=86_400)
            house.replica.check()
            house.clock.advance(seconds=86_400)
            house.replica.check()

    asyncio.run(story())


def test_a_failed_engine_makes_the_replica_sick(tmp_path: Path) -> None:
    async def story() -> None:
        async with a_house(tmp_path) as house, house.stream(max_tokens=3) as call:
            house.engine.fault_at_step = 0
            house.engine.gate.release(1000)
            while not (await call.read()).step.deltas:
                pass
            with pytest.raises(EngineFault, match="has failed"):
                house.replica.check()

    asyncio.run(story())


@pytest.mark.parametrize("module", ["replica", "frontend_main"])
def test_serving_processes_never_import_torch(module: str) -> None:
    """It would cost 300 MB and two seconds in each of them."""
    code = (
        f"import sys, headrace.deploy.{module}\n"
        "heavy = {'torch', 'transformers', 'onnx', 'pandas', 'pyarrow'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert ran.stdout == "[]\n"
