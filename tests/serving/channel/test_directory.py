"""Replicas come and go, and so does the directory; nobody who serves notices."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import grpc
import grpc.aio
import pytest

from headrace.serving.channel import directory as module
from headrace.serving.channel.credentials import token_metadata
from headrace.serving.channel.directory import Announcer, DirectoryServer, Watcher
from headrace.serving.router.endpoint import ReplicaFacts
from headrace.v1 import directory_pb2, directory_pb2_grpc

TOKEN = "cluster-secret"
FACTS = ReplicaFacts(
    replica_id="r0", address="127.0.0.1:1", model="m", version="v1", ready=True, context_tokens=10
)


class Frontend:
    """Follows the directory and remembers what it heard."""

    def __init__(self, address: str) -> None:
        self.set: list[ReplicaFacts] | None = None
        self.num_sets = 0
        self._heard = asyncio.Event()
        self.watcher = Watcher(address, cluster_token=TOKEN, on_set=self._take)
        self.watcher.start()

    def _take(self, replicas: Sequence[ReplicaFacts]) -> None:
        self.set = list(replicas)
        self.num_sets += 1
        self._heard.set()

    async def hears(self, condition: Callable[[list[ReplicaFacts]], bool]) -> None:
        while self.set is None or not condition(self.set):
            self._heard.clear()
            await self._heard.wait()


@asynccontextmanager
async def directory(address: str = "127.0.0.1:0") -> AsyncIterator[str]:
    server = DirectoryServer(cluster_token=TOKEN, address=address)
    where = await server.start()
    try:
        yield where
    finally:
        await server.stop()


def play(story: Callable[[], Awaitable[None]]) -> None:
    async def run() -> None:
        async with asyncio.timeout(60):
            await story()

    asyncio.run(run())


def announcer(address: str, facts: ReplicaFacts = FACTS) -> Announcer:
    made = Announcer(address, cluster_token=TOKEN, facts=lambda: facts)
    made.start()
    return made


def test_a_frontend_learns_who_is_there_and_who_left() -> None:
    async def story() -> None:
        async with directory() as address:
            frontend = Frontend(address)
            await frontend.hears(lambda replicas: replicas == [])
            one, two = announcer(address), announcer(address, replace(FACTS, replica_id="r1"))
            await frontend.hears(lambda replicas: {r.replica_id for r in replicas} == {"r0", "r1"})
            await one.stop()
            await frontend.hears(lambda replicas: {r.replica_id for r in replicas} == {"r1"})
            await two.stop()
            await frontend.watcher.stop()

    play(story)


def test_readiness_follows_the_announcements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ANNOUNCE_S", 0.01)

    async def story() -> None:
        async with directory() as address:
            frontend = Frontend(address)
            now = FACTS
            made = Announcer(address, cluster_token=TOKEN, facts=lambda: now)
            made.start()
            await frontend.hears(lambda replicas: replicas == [FACTS])
            sets = frontend.num_sets
            now = replace(FACTS, ready=False)
            await frontend.hears(lambda replicas: replicas == [now])

            assert frontend.num_sets == sets + 1, "an announcement without news is not repeated"
            await made.stop()
            await frontend.watcher.stop()

    play(story)


def test_a_silent_replica_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SILENCE_S", 0.2)
    monkeypatch.setattr(module, "ANNOUNCE_S", 30)

    async def story() -> None:
        async with directory() as address:
            frontend = Frontend(address)
            made = announcer(address)
            await frontend.hears(lambda replicas: replicas == [FACTS])
            await frontend.hears(lambda replicas: replicas == [])
            await made.stop()
            await frontend.watcher.stop()

    play(story)


def test_while_the_directory_is_away_the_last_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_S_MAX", 0.1)

    async def story() -> None:
        async with directory() as address:
            frontend = Frontend(address)
            made = announcer(address)
            await frontend.hears(lambda replicas: replicas == [FACTS])
        # The stream of the announcer ended with the directory, and nobody was told so.
        assert frontend.set == [FACTS]

        async with directory(address):
            newcomer = announcer(address, replace(FACTS, replica_id="r1"))
            await frontend.hears(lambda replicas: {r.replica_id for r in replicas} == {"r0", "r1"})
            await newcomer.stop()
            await made.stop()
            await frontend.watcher.stop()

    play(story)


def test_a_replica_that_reconnects_is_not_ended_by_its_old_stream() -> None:
    async def story() -> None:
        async with directory() as address:
            frontend = Frontend(address)
            old = announcer(address)
            await frontend.hears(lambda replicas: replicas == [FACTS])
            moved = replace(FACTS, address="127.0.0.1:2")
            new = announcer(address, moved)
            await frontend.hears(lambda replicas: replicas == [moved])
            await old.stop()
            other = announcer(address, replace(FACTS, replica_id="r1"))
            await frontend.hears(lambda replicas: len(replicas) == 2)

            assert frontend.set is not None
            assert moved in frontend.set
            for each in (new, other):
                await each.stop()
            await frontend.watcher.stop()

    play(story)


async def refusal_of(call: Awaitable[object]) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await call
    return refusal.value.code()


def test_strangers_and_nonsense_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REPLICAS_MAX", 1)

    async def story() -> None:
        async with directory() as address, grpc.aio.insecure_channel(address) as channel:
            stub = directory_pb2_grpc.DirectoryStub(channel)
            ours, wrong = token_metadata(TOKEN), token_metadata("wrong")
            request = directory_pb2.WatchRequest()
            replica = directory_pb2.Replica

            assert await refusal_of(stub.Watch(request, metadata=wrong).read()) is (
                grpc.StatusCode.UNAUTHENTICATED
            )
            for announcements, code in (
                ([replica(replica_id="")], grpc.StatusCode.INVALID_ARGUMENT),
                (
                    [replica(replica_id="a", address="x"), replica(replica_id="b", address="x")],
                    grpc.StatusCode.INVALID_ARGUMENT,
                ),
            ):
                call = stub.Announce(iter(announcements), metadata=ours)
                assert await refusal_of(call) is code
            first = announcer(address)
            frontend = Frontend(address)
            await frontend.hears(lambda replicas: replicas == [FACTS])
            full = stub.Announce(iter([replica(replica_id="z", address="x")]), metadata=ours)
            assert await refusal_of(full) is grpc.StatusCode.RESOURCE_EXHAUSTED
            await first.stop()
            await frontend.watcher.stop()

    play(story)
