"""A replica dies under its streams, over real loopback connections."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import grpc
import grpc.aio
import pytest
from google.rpc.error_details_pb2 import ErrorInfo
from grpc_status import rpc_status

from headrace.serving.domain.usage import Outcome
from headrace.serving.testing.platform import MODEL, Platform
from headrace.v1 import inference_pb2 as pb

ANSWER_TOKENS = 40


def asking(request_id: str = "", *, n: int = 1, prompt: str = "hello world") -> pb.GenerateRequest:
    return pb.GenerateRequest(
        request_id=request_id, model=MODEL, prompt=prompt, max_tokens=ANSWER_TOKENS, n=n
    )


class Reader:
    """A client that reads one answer and may pause within it."""

    def __init__(self, platform: Platform, request: pb.GenerateRequest) -> None:
        self._call = platform.stub.Generate(request, metadata=platform.metadata)
        self.chunks: list[pb.GenerateChunk] = []

    async def reads(self, num_tokens: int) -> None:
        """Read until at least this many tokens are here."""
        while self.num_tokens < num_tokens:
            chunk = await self._call.read()
            assert isinstance(chunk, pb.GenerateChunk), "the answer ended early"
            self.chunks.append(chunk)

    async def finishes(self) -> None:
        while isinstance(chunk := await self._call.read(), pb.GenerateChunk):
            self.chunks.append(chunk)

    @property
    def num_tokens(self) -> int:
        return sum(len(chunk.token_ids) for chunk in self.chunks)

    @property
    def transcript(self) -> list[tuple[list[int], str]]:
        """Tokens and text of each answer, however they were cut into chunks."""
        answers: dict[int, tuple[list[int], str]] = {}
        for chunk in self.chunks[:-1]:
            ids, text = answers.get(chunk.index, ([], ""))
            answers[chunk.index] = ([*ids, *chunk.token_ids], text + chunk.text)
        return [answers[index] for index in sorted(answers)]

    @property
    def done(self) -> pb.Done:
        return self.chunks[-1].done


def play(home: Path, story: Callable[[Platform], Awaitable[None]], *, num_replicas: int) -> None:
    async def run() -> None:
        async with asyncio.timeout(60), Platform(home, num_replicas=num_replicas) as platform:
            await story(platform)

    asyncio.run(run())


def serving(platform: Platform) -> int:
    """Which replica has the one sequence that runs."""
    (busy,) = [
        number for number, replica in enumerate(platform.replicas) if replica.server.num_active
    ]
    return busy


@pytest.mark.parametrize("n", [1, 3], ids=["one answer", "three answers"])
def test_a_stream_survives_its_replica_and_is_charged_once(tmp_path: Path, n: int) -> None:
    """The transcript equals an undisturbed one's to the byte, and so does the charge."""

    async def story(platform: Platform) -> None:
        undisturbed = Reader(platform, asking(n=n))
        await undisturbed.finishes()
        for replica in platform.replicas:
            replica.engine.hold(after_steps=12)
        disturbed = Reader(platform, asking("r1", n=n))
        await disturbed.reads(5 * n)
        victim = platform.replicas[serving(platform)]
        survivor = platform.replicas[1 - serving(platform)]
        survivor.engine.release()
        await victim.kill()
        await disturbed.finishes()

        assert disturbed.transcript == undisturbed.transcript
        assert disturbed.num_tokens == n * ANSWER_TOKENS
        (record,) = [record for record in platform.records if record.request_id == "r1"]
        assert record.outcome is Outcome.OK
        assert record.replicas_tried == 2
        assert record.usage.completion_tokens == n * ANSWER_TOKENS
        assert record.usage.prompt_tokens == undisturbed.done.usage.prompt_tokens
        assert record.charge_nano == disturbed.done.charge.nano

    play(tmp_path, story, num_replicas=2)


def test_a_request_that_had_sent_nothing_is_retried_invisibly(tmp_path: Path) -> None:
    async def story(platform: Platform) -> None:
        for replica in platform.replicas:
            replica.engine.hold()
        reader = Reader(platform, asking("r1"))
        reading = asyncio.create_task(reader.finishes())
        victim, survivor = platform.replicas
        await asyncio.to_thread(victim.engine.wait_until_held)
        survivor.engine.release()
        await victim.kill()
        await reading

        assert reader.num_tokens == ANSWER_TOKENS
        assert platform.records[0].replicas_tried == 2
        assert platform.records[0].usage.completion_tokens == ANSWER_TOKENS

    play(tmp_path, story, num_replicas=2)


def test_an_engine_fault_moves_its_sequences_too(tmp_path: Path) -> None:
    """The process still lives and its channel is open, but its engine is not to be trusted."""

    async def story(platform: Platform) -> None:
        for replica in platform.replicas:
            replica.engine.hold(after_steps=12)
        reader = Reader(platform, asking("r1"))
        await reader.reads(5)
        victim = platform.replicas[serving(platform)]
        platform.replicas[1 - serving(platform)].engine.release()
        victim.engine.die()
        await reader.finishes()

        assert reader.num_tokens == ANSWER_TOKENS
        assert victim.server.failed.is_set()
        assert not victim.server.facts.ready

    play(tmp_path, story, num_replicas=2)


def test_when_the_last_replica_dies_the_caller_is_told_and_not_charged(tmp_path: Path) -> None:
    async def story(platform: Platform) -> None:
        (replica,) = platform.replicas
        replica.engine.hold(after_steps=8)
        reader = Reader(platform, asking("r1"))
        await reader.reads(3)
        await replica.kill()
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await reader.finishes()

        assert failure.value.code() is grpc.StatusCode.INTERNAL
        assert reason_of(failure.value) == "ENGINE_FAULT"
        assert platform.records[0].outcome is Outcome.FAILED
        assert platform.records[0].charge_nano == 0

    play(tmp_path, story, num_replicas=1)


def test_a_replacement_takes_over_while_the_request_waits(tmp_path: Path) -> None:
    """Two seconds are enough for a replica that was about to come."""

    async def story(platform: Platform) -> None:
        (replica,) = platform.replicas
        replica.engine.hold(after_steps=8)
        reader = Reader(platform, asking("r1"))
        await reader.reads(3)
        await asyncio.gather(replica.kill(), platform.add_replica())
        await reader.finishes()

        assert reader.num_tokens == ANSWER_TOKENS

    play(tmp_path, story, num_replicas=1)


def reason_of(error: grpc.aio.AioRpcError) -> str:
    status = rpc_status.from_call(error)  # pyright: ignore[reportArgumentType]
    assert status is not None
    info = ErrorInfo()
    assert status.details[0].Unpack(info)
    return info.reason
