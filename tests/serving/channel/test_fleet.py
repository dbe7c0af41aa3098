"""Which replicas a frontend believes in, and for how long."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from headrace.serving.channel import fleet as module
from headrace.serving.channel.fleet import ReplicaFleet
from headrace.serving.channel.replica_server import ReplicaServer
from headrace.serving.clock import SystemClock
from headrace.serving.domain.generate import Generate
from headrace.serving.domain.record import Caller
from headrace.serving.domain.request import Sampling
from headrace.serving.domain.usage import Price
from headrace.serving.errors import DeadlineExceeded, ModelNotFound, Overloaded
from headrace.serving.observe import Metrics
from headrace.serving.router.endpoint import ReplicaFacts
from headrace.serving.testing.paced_loop import PacedLoop

TOKEN = "cluster-secret"
FACTS = ReplicaFacts(
    replica_id="r0", address="", model="m", version="v1", ready=False, context_tokens=1024
)
REQUEST = Generate(
    caller=Caller("t", "k"),
    request_id="r1",
    model="m",
    version="v1",
    prompt_ids=[1, 2, 3],
    sampling=Sampling(max_tokens=1),
    price=Price.text(
        version="p", prompt_nano_per_mtok=1, cached_nano_per_mtok=1, completion_nano_per_mtok=1
    ),
    accepted_unix_ms=0,
    accepted_ms=0,
)


class Story:
    """A fleet, and replicas to put into it."""

    def __init__(self, *, replica_wait_s: float = 30) -> None:
        self.changed = asyncio.Event()
        self.fleet = ReplicaFleet(
            cluster_token=TOKEN,
            clock=SystemClock(),
            metrics=Metrics(),
            expected=["m"],
            replica_wait_s=replica_wait_s,
            on_change=self.changed.set,
        )
        self.servers: list[ReplicaServer] = []

    async def starts(self, **changes: str) -> ReplicaFacts:
        server = ReplicaServer(
            lambda sink: PacedLoop(sink, tokens_per_s=100, token_id=1, text="x"),
            replace(FACTS, **changes),  # pyright: ignore[reportArgumentType]
            cluster_token=TOKEN,
        )
        await server.start()
        self.servers.append(server)
        return server.facts

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self.changed.clear()
            await self.changed.wait()

    async def ends(self) -> None:
        await self.fleet.close()
        for server in self.servers:
            await server.stop()


def play(act: Callable[[Story], Awaitable[None]], *, replica_wait_s: float = 30) -> None:
    async def run() -> None:
        async with asyncio.timeout(60):
            story = Story(replica_wait_s=replica_wait_s)
            try:
                await act(story)
            finally:
                await story.ends()

    asyncio.run(run())


def test_a_request_waits_for_the_first_replica() -> None:
    async def act(story: Story) -> None:
        placing = asyncio.create_task(story.fleet.place(REQUEST))
        await asyncio.sleep(0)
        story.fleet.update([await story.starts()])

        assert (await placing).replica.replica_id == "r0"

    play(act)


def test_it_does_not_wait_for_ever() -> None:
    async def act(story: Story) -> None:
        with pytest.raises(Overloaded, match="No replica of m can take") as refusal:
            await story.fleet.place(REQUEST)
        assert refusal.value.retry_after_ms

    play(act, replica_wait_s=0.01)


def test_an_answer_under_way_waits_longer_for_the_lost_replica_s_successor() -> None:
    """With one replica, the default, its successor is all there is to go on with."""

    async def act(story: Story) -> None:
        placing = asyncio.create_task(story.fleet.place(REQUEST, without={"lost"}))
        with pytest.raises(Overloaded):
            await story.fleet.place(REQUEST)
        story.fleet.update([await story.starts()])

        assert (await placing).replica.replica_id == "r0"

    play(act, replica_wait_s=0.01)


def test_nor_past_its_deadline() -> None:
    async def act(story: Story) -> None:
        late = replace(REQUEST, deadline_ms=SystemClock().monotonic_ms() + 10)
        with pytest.raises(DeadlineExceeded):
            await story.fleet.place(late)

    play(act)


def test_an_unknown_name_is_refused_at_once_and_an_expected_one_is_waited_for() -> None:
    async def act(story: Story) -> None:
        with pytest.raises(ModelNotFound, match="No model 'other'") as refusal:
            await story.fleet.find("other", deadline_ms=None)
        assert refusal.value.why == "Served are: m."

        finding = asyncio.create_task(story.fleet.find("m", deadline_ms=None))
        await asyncio.sleep(0)
        story.fleet.update([await story.starts()])
        assert (await finding).newest.version == "v1"

    play(act)


def test_a_replica_that_a_fresh_directory_does_not_know_yet_goes_on_serving() -> None:
    async def act(story: Story) -> None:
        story.fleet.update([await story.starts()])
        await story.fleet.place(REQUEST)
        story.fleet.update([])

        assert (await story.fleet.place(REQUEST)).replica.replica_id == "r0"

    play(act)


def test_after_a_grace_it_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ABSENT_GRACE_MS", -1.0)

    async def act(story: Story) -> None:
        story.fleet.update([await story.starts()])
        await story.fleet.place(REQUEST)
        story.fleet.update([])

        assert story.fleet.endpoints == []

    play(act)


def test_one_that_left_the_directory_and_hung_up_is_gone() -> None:
    async def act(story: Story) -> None:
        story.fleet.update([await story.starts()])
        await story.fleet.place(REQUEST)
        story.fleet.update([])
        await story.servers[0].stop()
        await story.until(lambda: not story.fleet.endpoints)

    play(act)


def test_the_newest_version_is_what_the_model_is() -> None:
    async def act(story: Story) -> None:
        old, new = await story.starts(), await story.starts(replica_id="r1", version="v2")
        story.fleet.update([old, new])
        await story.until(lambda: _ready(story) == 2)
        served = story.fleet.model("m")

        assert served is not None
        assert served.newest.version == "v2"
        assert [each.name for each in story.fleet.models()] == ["m"]

    play(act)


def _ready(story: Story) -> int:
    served = story.fleet.model("m")
    return served.replicas_ready if served else 0
