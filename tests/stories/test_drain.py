"""Something shuts down, and no stream is cut."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from headrace.serving.domain.record import Settlement
from headrace.serving.domain.usage import Outcome
from headrace.serving.frontend import server
from headrace.serving.testing.platform import MODEL, Platform
from headrace.serving.tracing import SpanEnd, SpanStart
from headrace.v1 import inference_pb2 as pb


def play(
    home: Path, story: Callable[[Platform], Awaitable[None]], *, num_replicas: int = 1
) -> None:
    async def run() -> None:
        async with asyncio.timeout(60), Platform(home, num_replicas=num_replicas) as platform:
            await story(platform)

    asyncio.run(run())


def asking(request_id: str) -> pb.GenerateRequest:
    return pb.GenerateRequest(request_id=request_id, model=MODEL, prompt="hello", max_tokens=20)


async def rest_of(call: object) -> list[pb.GenerateChunk]:
    assert isinstance(call, grpc.aio.UnaryStreamCall)
    chunks = []
    while isinstance(chunk := await call.read(), pb.GenerateChunk):
        chunks.append(chunk)
    return chunks


def test_a_draining_frontend_finishes_its_streams_and_takes_no_new_ones(tmp_path: Path) -> None:
    async def story(platform: Platform) -> None:
        (replica,) = platform.replicas
        replica.engine.hold(after_steps=5)
        call = platform.stub.Generate(asking("open"), metadata=platform.metadata)
        assert isinstance(await call.read(), pb.GenerateChunk)
        draining = asyncio.create_task(platform.frontend.drain(30))
        health = health_pb2_grpc.HealthStub(platform.channel)
        async for answer in health.Watch(health_pb2.HealthCheckRequest()):
            if answer.status == health_pb2.HealthCheckResponse.NOT_SERVING:
                break

        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await platform.stub.GenerateUnary(asking("late"), metadata=platform.metadata)
        replica.engine.release()
        chunks = await rest_of(call)

        assert refusal.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "shutting down" in (refusal.value.details() or "")
        assert chunks[-1].done.usage.completion_tokens == 20
        assert await draining

    play(tmp_path, story)


def test_a_frontend_that_may_not_wait_cuts_and_settles_what_was_sent(tmp_path: Path) -> None:
    async def story(platform: Platform) -> None:
        (replica,) = platform.replicas
        replica.engine.hold(after_steps=5)
        call = platform.stub.Generate(asking("cut"), metadata=platform.metadata)
        assert isinstance(await call.read(), pb.GenerateChunk)
        assert not await platform.frontend.drain(0)
        await platform.frontend.stop()

        (record,) = platform.records
        assert record.outcome is Outcome.CANCELLED
        assert 1 <= record.usage.completion_tokens <= 5

    play(tmp_path, story)


@pytest.mark.parametrize("is_keyed", [False, True])
def test_what_was_cut_is_settled_before_what_it_needs_is_closed(
    tmp_path: Path, is_keyed: bool
) -> None:
    """However slowly: budgets are given back after the charges, and keys wait for their runs."""

    async def story(platform: Platform) -> None:
        (replica,) = platform.replicas
        frontend, meter = platform.frontend, platform.frontend.books.meter
        replica.engine.hold(after_steps=5)
        key = (("idempotency-key", "a-key-of-the-caller"),) if is_keyed else ()
        metadata = (*platform.metadata, *key)
        call = platform.stub.Generate(asking("cut"), metadata=metadata)
        assert isinstance(await call.read(), pb.GenerateChunk)
        settling, has_settled = meter.settle, False

        async def slowly(settlement: Settlement) -> None:
            nonlocal has_settled
            for _ in range(200):
                await asyncio.sleep(0)
            await settling(settlement)
            has_settled = True

        meter.settle = slowly
        num_open: list[int] = []
        frontend.jobs._stack.callback(lambda: num_open.append(frontend.gate.num_open))
        returning, returned_after = frontend.quota.leases.close, []

        async def returns() -> None:
            returned_after.append(has_settled)
            await returning()

        frontend.quota.leases.close = returns
        await frontend.stop()

        assert (num_open, returned_after) == ([0], [True])

    play(tmp_path, story)


class FakeTracer:
    """Counts the spans that end while it is open; those that end later are lost."""

    def __init__(self) -> None:
        self.is_closed = False
        self.num_started = self.num_sent = 0

    def start(self, start: SpanStart, metadata: Mapping[str, str]) -> "FakeTracer":
        self.num_started += 1
        return self

    def first_token(self, ttft_s: float) -> None:
        pass

    def end(self, result: SpanEnd) -> None:
        self.num_sent += not self.is_closed

    def close(self) -> None:
        self.is_closed = True


def test_work_that_outlives_its_call_is_in_the_traces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a key stands for runs until the frontend ends it, and its span ends with it."""
    tracer = FakeTracer()
    monkeypatch.setattr(server, "tracer", lambda *_, **__: tracer)

    async def story(platform: Platform) -> None:
        (replica,) = platform.replicas
        replica.engine.hold(after_steps=5)
        keyed = (*platform.metadata, ("idempotency-key", "a-key-of-the-caller"))
        call = platform.stub.Generate(asking("keyed"), metadata=keyed)
        assert isinstance(await call.read(), pb.GenerateChunk)
        was_closed: list[bool] = []
        platform.frontend.jobs._stack.callback(lambda: was_closed.append(tracer.is_closed))
        await platform.frontend.stop()

        assert (was_closed, tracer.is_closed) == ([False], True)
        assert tracer.num_sent == tracer.num_started == 1

    play(tmp_path, story)


def test_a_draining_replica_keeps_its_streams_and_newcomers_go_elsewhere(tmp_path: Path) -> None:
    """What a rolling upgrade does to each replica in turn."""

    async def story(platform: Platform) -> None:
        leaving, staying = platform.replicas
        leaving.engine.hold(after_steps=5)
        call = platform.stub.Generate(asking("old"), metadata=platform.metadata)
        assert isinstance(await call.read(), pb.GenerateChunk)
        assert leaving.server.num_active == 1
        draining = asyncio.create_task(leaving.server.drain(30))
        (endpoint,) = [e for e in platform.frontend.fleet.endpoints if e.facts.replica_id == "r0"]
        await platform.until(lambda: endpoint.load.draining)

        newcomer = await platform.stub.GenerateUnary(asking("new"), metadata=platform.metadata)
        leaving.engine.release()
        chunks = await rest_of(call)
        assert await draining
        await leaving.stop()

        assert newcomer.usage.completion_tokens == 20
        assert staying.loop.load().completion_tokens_total == 20
        assert chunks[-1].done.usage.completion_tokens == 20
        assert all(record.replicas_tried == 1 for record in platform.records)

    play(tmp_path, story, num_replicas=2)
