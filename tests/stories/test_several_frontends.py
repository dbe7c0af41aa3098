"""Several frontends share the replicas: one hosts the directory, all watch it."""

import asyncio
from pathlib import Path

from headrace.serving.domain.usage import Outcome
from headrace.serving.testing.platform import MODEL, Platform
from headrace.v1 import inference_pb2 as pb


def second_of(first: Platform, home: Path) -> Platform:
    """A frontend with a home of its own, which knows the first one's directory and token."""
    return Platform(
        home,
        num_replicas=0,
        overrides={
            "directory.address": first.addresses.directory,
            "directory.hosted": False,
            "cluster_token_path": str(first.config.cluster_token_file),
        },
    )


def knows(platform: Platform, *replica_ids: str) -> bool:
    return set(replica_ids) <= {
        endpoint.facts.replica_id
        for endpoint in platform.frontend.fleet.endpoints
        if endpoint.is_connected
    }


async def asks(platform: Platform, request_id: str) -> pb.GenerateResponse:
    request = pb.GenerateRequest(
        request_id=request_id, model=MODEL, prompt="hello world", max_tokens=12
    )
    return await platform.stub.GenerateUnary(request, metadata=platform.metadata)


def test_two_frontends_answer_from_the_same_replicas_and_each_keeps_its_own_book(
    tmp_path: Path,
) -> None:
    """A frontend more is capacity more: it needs no replica of its own."""

    async def story() -> None:
        async with (
            asyncio.timeout(60),
            Platform(tmp_path / "one", num_replicas=2) as first,
            second_of(first, tmp_path / "two") as second,
        ):
            await second.until(lambda: knows(second, "r0", "r1"))
            here, there = await asyncio.gather(asks(first, "here"), asks(second, "there"))
            await asyncio.gather(first.settled(), second.settled())

            assert here.choices[0].token_ids == there.choices[0].token_ids
            assert [record.request_id for record in first.records] == ["here"]
            assert [record.request_id for record in second.records] == ["there"]

    asyncio.run(story())


def test_a_frontend_goes_on_when_the_one_with_the_directory_is_gone(tmp_path: Path) -> None:
    """It keeps the set it heard last, and its channels are its own."""

    async def story() -> None:
        async with (
            asyncio.timeout(60),
            Platform(tmp_path / "one", num_replicas=1) as first,
            second_of(first, tmp_path / "two") as second,
        ):
            await second.until(lambda: knows(second, "r0"))
            await first.frontend.stop()
            answer = await asks(second, "after")
            await second.settled()

            assert len(answer.choices[0].token_ids) == 12
            assert [record.outcome for record in second.records] == [Outcome.OK]

    asyncio.run(story())
