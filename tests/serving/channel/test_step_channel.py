"""The step channel over loopback: what a replica owes its frontends, and what it refuses them."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable
from contextlib import asynccontextmanager

import grpc
import grpc.aio
import pytest

from headrace.serving.channel import client as client_module
from headrace.serving.channel import replica_server as server_module
from headrace.serving.channel.client import ReplicaClient
from headrace.serving.channel.credentials import token_metadata
from headrace.serving.channel.replica_server import ReplicaServer
from headrace.serving.clock import SystemClock
from headrace.serving.domain.request import Sampling, SequenceSpec
from headrace.serving.errors import Draining
from headrace.serving.inbox import Inbox
from headrace.serving.observe import Metrics
from headrace.serving.router.endpoint import Endpoint, ReplicaFacts
from headrace.serving.testing.paced_loop import PacedLoop
from headrace.v1 import step_pb2, step_pb2_grpc

TOKEN = "cluster-secret"
FACTS = ReplicaFacts(
    replica_id="r0", address="", model="m", version="v1", ready=False, context_tokens=1024
)


class WatchedLoop(PacedLoop):
    """Tells when sequences were aborted."""

    def __init__(self, sink: server_module.Sink, *, tokens_per_s: float) -> None:
        super().__init__(sink, tokens_per_s=tokens_per_s, token_id=7, text="x" * 200)
        self.aborted = threading.Event()

    def abort(self, key: Hashable) -> None:
        super().abort(key)
        self.aborted.set()

    async def wait_aborted(self) -> None:
        assert await asyncio.to_thread(self.aborted.wait, 30)


class Replica:
    """A replica server around a paced loop."""

    def __init__(self, *, tokens_per_s: float = 1_000, port: int = 0) -> None:
        self.loop: WatchedLoop

        def make_loop(sink: server_module.Sink) -> WatchedLoop:
            self.loop = WatchedLoop(sink, tokens_per_s=tokens_per_s)
            return self.loop

        self.server = ReplicaServer(make_loop, FACTS, cluster_token=TOKEN, port=port)


@asynccontextmanager
async def serving(**how: float) -> AsyncIterator[Replica]:
    replica = Replica(**how)  # pyright: ignore[reportArgumentType]
    await replica.server.start()
    try:
        yield replica
    finally:
        await replica.server.stop()


@asynccontextmanager
async def connected(facts: ReplicaFacts) -> AsyncIterator[ReplicaClient]:
    """A frontend's client whose channel is up."""
    changed = asyncio.Event()
    client = ReplicaClient(
        Endpoint(facts),
        cluster_token=TOKEN,
        clock=SystemClock(),
        metrics=Metrics(),
        on_change=changed.set,
    )
    client.start()
    await changed.wait()
    try:
        yield client
    finally:
        await client.close()


def play(story: Callable[[], Awaitable[None]]) -> None:
    async def run() -> None:
        async with asyncio.timeout(60):
            await story()

    asyncio.run(run())


def spec(max_tokens: int = 5) -> SequenceSpec:
    return SequenceSpec(prompt_ids=[1, 2, 3], sampling=Sampling(max_tokens=max_tokens))


async def whole(inbox: Inbox) -> list[int]:
    """The tokens of answer 0, until it finishes."""
    ids: list[int] = []
    while True:
        for delta in (await inbox.take()).values():
            ids += delta.token_ids
            if delta.finish is not None:
                return ids
        assert inbox.lost is None, inbox.lost


def raw_call(channel: grpc.aio.Channel, token: str = TOKEN) -> "grpc.aio.StreamStreamCall":
    return step_pb2_grpc.StepChannelStub(channel).Connect(metadata=token_metadata(token))


async def everything_of(call: "grpc.aio.StreamStreamCall") -> None:
    while isinstance(await call.read(), step_pb2.FromReplica):
        pass


def submit(sequence: int, *, max_tokens: int = 5) -> step_pb2.Submit:
    sampling = step_pb2.StepSampling(max_tokens=max_tokens, logprobs=-1)
    return step_pb2.Submit(sequence=sequence, prompt_ids=[1, 2, 3], sampling=sampling)


def test_many_sequences_share_one_stream() -> None:
    async def story() -> None:
        async with serving() as replica, connected(replica.server.facts) as client:
            inboxes = [Inbox() for _ in range(50)]
            for inbox in inboxes:
                client.submit(spec(), inbox=inbox, index=0)

            assert await asyncio.gather(*map(whole, inboxes)) == [[7] * 5] * 50
            assert client.num_open == 0
            assert replica.server.num_active == 0

    play(story)


def test_a_frontend_without_the_cluster_token_gets_nothing() -> None:
    async def story() -> None:
        async with (
            serving() as replica,
            grpc.aio.insecure_channel(replica.server.facts.address) as channel,
        ):
            with pytest.raises(grpc.aio.AioRpcError) as refusal:
                await raw_call(channel, "wrong").read()

            assert refusal.value.code() is grpc.StatusCode.UNAUTHENTICATED

    play(story)


def test_when_a_frontend_goes_its_sequences_are_aborted() -> None:
    async def story() -> None:
        async with serving() as replica:
            async with connected(replica.server.facts) as client:
                inbox = Inbox()
                client.submit(spec(1_000_000), inbox=inbox, index=0)
                await inbox.take()
            await replica.loop.wait_aborted()

            assert inbox.lost == "the channel was closed"
            assert replica.loop.load().running == 0

    play(story)


def test_a_frontend_that_does_not_read_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tokens must not pile up in the replica: 400 sequences of 200 bytes a step, never read."""
    monkeypatch.setattr(server_module, "WRITE_S_MAX", 0.05)
    monkeypatch.setattr(server_module, "HEARTBEAT_S", 0.02)

    async def story() -> None:
        async with (
            serving(tokens_per_s=0) as replica,
            grpc.aio.insecure_channel(replica.server.facts.address) as channel,
        ):
            call = raw_call(channel)
            submits = [submit(number, max_tokens=1_000_000) for number in range(400)]
            await call.write(step_pb2.ToReplica(submit=submits))
            await replica.loop.wait_aborted()
            assert replica.server.num_active == 0

            # It is told, should it ever read again.
            with pytest.raises(grpc.aio.AioRpcError, match="has not read"):
                await everything_of(call)

    play(story)


def test_a_quiet_channel_carries_heartbeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "HEARTBEAT_S", 0.01)

    async def story() -> None:
        async with (
            serving() as replica,
            grpc.aio.insecure_channel(replica.server.facts.address) as channel,
        ):
            call = raw_call(channel)
            hello, load, beat, another = [await call.read() for _ in range(4)]

            assert hello.hello.replica_id == "r0"
            for message in (load, beat, another):
                assert message.step.load.rows_max > 0
                assert not message.step.deltas

    play(story)


def test_a_silent_replica_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that vanished sends no FIN; only its silence tells."""
    monkeypatch.setattr(client_module, "LISTEN_S", 0.05)
    monkeypatch.setattr(server_module, "HEARTBEAT_S", 30)

    async def story() -> None:
        async with (
            serving(tokens_per_s=0.01) as replica,
            connected(replica.server.facts) as client,
        ):
            inbox = Inbox()
            client.submit(spec(), inbox=inbox, index=0)
            while inbox.lost is None:
                await inbox.take()

            assert "silent" in inbox.lost

    play(story)


def test_a_client_connects_again_when_its_replica_is_back() -> None:
    async def story() -> None:
        async with serving() as replica:
            facts = replica.server.facts
            changed = asyncio.Event()
            client = ReplicaClient(
                Endpoint(facts),
                cluster_token=TOKEN,
                clock=SystemClock(),
                metrics=Metrics(),
                on_change=changed.set,
            )
            client.start()
            await changed.wait()
            changed.clear()
            await replica.server.stop()
            await changed.wait()
            assert not client.endpoint.is_connected

            changed.clear()
            async with serving(port=int(facts.address.rpartition(":")[2])):
                await changed.wait()
                assert client.endpoint.is_connected
                inbox = Inbox()
                client.submit(spec(), inbox=inbox, index=0)
                assert await whole(inbox) == [7] * 5
                await client.close()

    play(story)


def test_what_is_said_in_one_turn_travels_together() -> None:
    async def story() -> None:
        messages: asyncio.Queue[step_pb2.ToReplica] = asyncio.Queue()

        class Recorder(step_pb2_grpc.StepChannelServicer):
            async def Connect(
                self, request_iterator: object, context: grpc.aio.ServicerContext
            ) -> None:
                hello = step_pb2.Hello(replica_id="r0", model="m", version="v1")
                await context.write(step_pb2.FromReplica(hello=hello))
                await context.write(step_pb2.FromReplica(step=step_pb2.StepResult()))
                while isinstance(message := await context.read(), step_pb2.ToReplica):
                    messages.put_nowait(message)

        server = grpc.aio.server()
        step_pb2_grpc.add_StepChannelServicer_to_server(Recorder(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        facts = ReplicaFacts(
            replica_id="r0",
            address=f"127.0.0.1:{port}",
            model="m",
            version="v1",
            ready=True,
            context_tokens=10,
        )
        async with connected(facts) as client:
            first = client.submit(spec(), inbox=Inbox(), index=0)
            client.submit(spec(), inbox=Inbox(), index=0)
            client.abort(first)
            message = await messages.get()

            assert [each.sequence for each in message.submit] == [1, 2]
            assert list(message.abort) == [1]
        await server.stop(None)

    play(story)


def test_a_draining_replica_finishes_what_it_has_and_takes_nothing_new() -> None:
    async def story() -> None:
        async with serving(tokens_per_s=200) as replica, connected(replica.server.facts) as client:
            running = Inbox()
            client.submit(spec(20), inbox=running, index=0)
            await running.take()
            draining = asyncio.create_task(replica.server.drain(30))
            while not client.endpoint.load.draining:
                await running.take()
            late = Inbox()
            client.submit(spec(), inbox=late, index=0)
            refused = (await late.take())[0]

            assert isinstance(refused.error, Draining)
            assert await draining
            assert not replica.server.facts.ready

    play(story)


def test_a_drain_that_takes_too_long_says_so() -> None:
    async def story() -> None:
        async with serving() as replica, connected(replica.server.facts) as client:
            inbox = Inbox()
            client.submit(spec(1_000_000), inbox=inbox, index=0)
            await inbox.take()

            assert not await replica.server.drain(0.01)

    play(story)


@pytest.mark.parametrize(
    ("submits", "reason"),
    [
        pytest.param([submit(1, max_tokens=1000)] * 2, "ENGINE_FAULT", id="a number in use"),
        pytest.param([step_pb2.Submit(sequence=1)], "INVALID_REQUEST", id="no prompt"),
    ],
)
def test_a_submit_that_makes_no_sense_harms_only_itself(
    submits: list[step_pb2.Submit], reason: str
) -> None:
    async def story() -> None:
        async with (
            serving(tokens_per_s=0.01) as replica,
            grpc.aio.insecure_channel(replica.server.facts.address) as channel,
        ):
            call = raw_call(channel)
            await call.write(step_pb2.ToReplica(submit=submits))
            reasons = []
            while not reasons:
                message = await call.read()
                reasons += [d.error.reason for d in message.step.deltas if d.finish == "error"]

            assert reasons == [reason]

    play(story)
