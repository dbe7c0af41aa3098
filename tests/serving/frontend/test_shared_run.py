"""Readers of one answer, each at a pace of its own: all get all of it, within bounds."""

import asyncio
import random

import pytest

from headrace.serving.errors import IdempotencyInFlight
from headrace.serving.frontend import shared_run
from headrace.serving.frontend.shared_run import KeptBytes, SharedRun
from headrace.v1 import inference_pb2 as pb

CHUNKS = 60


@pytest.mark.parametrize("bytes_max", [1 << 20, 2_000, 0], ids=["kept", "partly kept", "not kept"])
@pytest.mark.parametrize("seed", range(8))
def test_every_reader_gets_every_chunk_at_any_pace(seed: int, bytes_max: int) -> None:
    rng = random.Random(seed)
    kept = KeptBytes(bytes_max)
    run = SharedRun(b"", kept=kept, on_abandoned=lambda: None)
    num_kept: list[int] = []

    async def produces() -> None:
        run.begin("r1")
        for number in range(CHUNKS):
            run.put(pb.GenerateChunk(request_id="r1", index=number))
            await run.wanted()
            num_kept.append(len(run._chunks))
        run.finish()

    async def reads(reader: shared_run.Reader) -> list[int]:
        found: list[int] = []
        with reader:
            async for chunk in reader:
                found.append(chunk.index)
                for _ in range(rng.randrange(4)):
                    await asyncio.sleep(0)
        return found

    async def story() -> None:
        reading = [asyncio.ensure_future(reads(run.attach())) for _ in range(3)]
        producing = asyncio.ensure_future(produces())
        for _ in range(rng.randrange(40)):
            await asyncio.sleep(0)
        if run.keeps:
            reading.append(asyncio.ensure_future(reads(run.attach())))
        for found in await asyncio.gather(*reading):
            assert found == list(range(CHUNKS))
        await producing

    asyncio.run(asyncio.wait_for(story(), 10))

    assert kept.held == 0
    if bytes_max == 0:
        assert max(num_kept) <= 1, "the slowest sets the pace"


def test_nothing_is_asked_for_before_somebody_has_sent_what_there_is() -> None:
    """A chunk counts as delivered, and is charged, once the next one is asked for."""

    async def story() -> None:
        run = SharedRun(b"", kept=KeptBytes(), on_abandoned=lambda: None)
        reader = run.attach()
        run.put(pb.GenerateChunk(index=0))
        wanted = asyncio.ensure_future(run.wanted())
        await anext(reader)
        for _ in range(5):
            await asyncio.sleep(0)
        assert not wanted.done(), "it is still being sent"
        assert run.num_taken == 0
        asking = asyncio.ensure_future(anext(reader))
        await wanted
        assert run.num_taken == 1
        run.finish()
        with pytest.raises(StopAsyncIteration):
            await asking

    asyncio.run(story())


def test_the_last_one_that_leaves_ends_it() -> None:
    ended: list[str] = []

    async def story() -> None:
        run = SharedRun(b"", kept=KeptBytes(), on_abandoned=lambda: ended.append("ended"))
        first, second = run.attach(), run.attach()
        run.begin("r1")
        first.leave()
        first.leave()
        assert ended == []
        second.leave()
        assert ended == ["ended"]

    asyncio.run(story())


def test_readers_are_bounded() -> None:
    async def story() -> None:
        run = SharedRun(b"", kept=KeptBytes(), on_abandoned=lambda: None)
        for _ in range(shared_run.READERS_MAX):
            run.attach()
        with pytest.raises(IdempotencyInFlight):
            run.attach()

    asyncio.run(story())
