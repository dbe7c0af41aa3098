"""The public service over a real connection: good calls, bad calls, and what each leaves behind."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path

import aiohttp
import grpc
import grpc.aio
import pytest
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo
from google.rpc.status_pb2 import Status
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from headrace.serving.domain.tier import Tier
from headrace.serving.domain.usage import Outcome, Usage
from headrace.serving.frontend.status import DETAILS_KEY
from headrace.serving.testing.platform import MODEL, Platform
from headrace.v1 import inference_pb2 as pb
from headrace.v1 import usage_pb2


def play(
    home: Path,
    story: Callable[[Platform], Awaitable[None]],
    *,
    num_replicas: int = 1,
    **overrides: object,
) -> None:
    async def run() -> None:
        platform = Platform(
            home,
            num_replicas=num_replicas,
            overrides={key.replace("__", "."): value for key, value in overrides.items()},
        )
        async with asyncio.timeout(60), platform:
            await story(platform)

    asyncio.run(run())


def asking(request_id: str = "r1", **fields: object) -> pb.GenerateRequest:
    values: dict[str, object] = {"model": MODEL, "prompt": "hello world", "max_tokens": 5}
    return pb.GenerateRequest(request_id=request_id, **(values | fields))  # pyright: ignore[reportArgumentType]


async def refusal_of(call: Awaitable[object]) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await call
    return failure.value


async def chunks_of(platform: Platform, request: pb.GenerateRequest) -> list[pb.GenerateChunk]:
    return [c async for c in platform.stub.Generate(request, metadata=platform.metadata)]


def detail(error: grpc.aio.AioRpcError, kind: type[Message]) -> Message:
    trailers = error.trailing_metadata()
    assert trailers is not None
    for packed in Status.FromString(trailers[DETAILS_KEY]).details:  # pyright: ignore[reportArgumentType]
        message = kind()
        if packed.Unpack(message):
            return message
    raise AssertionError(f"no {kind.__name__} in the status")


def reason_of(error: grpc.aio.AioRpcError) -> str:
    info = detail(error, ErrorInfo)
    assert isinstance(info, ErrorInfo)
    return info.reason


def test_a_stream_ends_with_its_charge_and_the_record_agrees(tmp_path: Path) -> None:
    async def story(platform: Platform) -> None:
        *tokens, last = await chunks_of(platform, asking())

        assert [c.usage.completion_tokens for c in tokens][-1] == 5
        assert tokens[-1].finish_reason == pb.FINISH_REASON_LENGTH
        assert not any(c.HasField("done") for c in tokens)
        assert last.done.usage == tokens[-1].usage
        (record,) = platform.records
        assert (record.request_id, record.outcome) == ("r1", Outcome.OK)
        assert record.charge_nano == last.done.charge.nano > 0
        assert record.usage.completion_tokens == 5
        assert record.first_token_unix_ms is not None

    play(tmp_path, story)


def test_one_message_says_the_same_as_the_stream(tmp_path: Path) -> None:
    async def story(platform: Platform) -> None:
        chunks = await chunks_of(platform, asking("s", n=2, logprobs=0))
        whole = await platform.stub.GenerateUnary(
            asking("u", n=2, logprobs=0), metadata=platform.metadata
        )

        for choice in whole.choices:
            mine = [c for c in chunks if c.index == choice.index and not c.HasField("done")]
            assert choice.text == "".join(c.text for c in mine)
            assert list(choice.token_ids) == [t for c in mine for t in c.token_ids]
            assert choice.finish_reason == pb.FINISH_REASON_LENGTH
        assert len(whole.choices) == 2
        assert whole.usage.completion_tokens == 10

    play(tmp_path, story)


def test_the_same_prompt_again_is_charged_as_cached(tmp_path: Path) -> None:
    async def story(platform: Platform) -> None:
        prompt = "hello world " * 20
        first = (await chunks_of(platform, asking("a", prompt=prompt)))[-1].done
        second = (await chunks_of(platform, asking("b", prompt=prompt)))[-1].done

        assert first.usage.cached_tokens == 0
        assert second.usage.cached_tokens > 0
        assert second.usage.prompt_tokens == first.usage.prompt_tokens
        assert second.charge.nano < first.charge.nano

    play(tmp_path, story)


def test_models_are_listed_and_tokens_counted(tmp_path: Path) -> None:
    async def story(platform: Platform) -> None:
        listed = await platform.stub.ListModels(pb.ListModelsRequest(), metadata=platform.metadata)
        model = await platform.stub.GetModel(
            pb.GetModelRequest(model=MODEL), metadata=platform.metadata
        )
        chat = pb.Chat(messages=[pb.Message(role="user", content="hello")])
        count = await platform.stub.CountTokens(
            pb.CountTokensRequest(model=MODEL, chat=chat), metadata=platform.metadata
        )
        whole = await platform.stub.GenerateUnary(
            pb.GenerateRequest(model=MODEL, chat=chat, max_tokens=1), metadata=platform.metadata
        )

        assert list(listed.models) == [model]
        assert (model.version, model.replicas_ready, model.context_tokens) == ("v1", 1, 1024)
        assert model.price.completion_nano_per_mtok == 200_000_000
        assert count.tokens == whole.usage.prompt_tokens
        assert len(platform.records) == 1, "counting leaves no record"

    play(tmp_path, story)


BAD_CALLS = [
    pytest.param(asking(model="no"), "NOT_FOUND", "MODEL_NOT_FOUND", "model", id="unknown model"),
    pytest.param(asking(prompt=""), "INVALID_ARGUMENT", "INVALID_REQUEST", "prompt", id="empty"),
    pytest.param(
        asking(prompt="x " * 4_000), "INVALID_ARGUMENT", "PROMPT_TOO_LONG", "prompt", id="too long"
    ),
    pytest.param(
        asking(json_schema='{"type": 7}'),
        "INVALID_ARGUMENT",
        "INVALID_SCHEMA",
        "json_schema",
        id="bad schema",
    ),
    pytest.param(asking(regex="(["), "INVALID_ARGUMENT", "INVALID_SCHEMA", "regex", id="bad regex"),
    pytest.param(
        asking(sampling=pb.Sampling(temperature=9)),
        "INVALID_ARGUMENT",
        "INVALID_REQUEST",
        "sampling.temperature",
        id="bad temperature",
    ),
]


@pytest.mark.parametrize(("request_", "code", "reason", "field"), BAD_CALLS)
def test_a_bad_call_is_refused_recorded_and_free(
    tmp_path: Path, request_: pb.GenerateRequest, code: str, reason: str, field: str
) -> None:
    async def story(platform: Platform) -> None:
        error = await refusal_of(chunks_of(platform, request_))

        assert error.code().name == code
        assert reason_of(error) == reason
        if code == "INVALID_ARGUMENT":
            bad = detail(error, BadRequest)
            assert isinstance(bad, BadRequest)
            assert bad.field_violations[0].field == field
        (record,) = platform.records
        assert record.request_id.startswith("r1#")
        assert (record.outcome, record.charge_nano) == (Outcome.REJECTED, 0)
        # Nothing of it stays: a good call under the same id is served.
        assert (await chunks_of(platform, asking()))[-1].HasField("done")

    play(tmp_path, story)


@pytest.mark.parametrize(
    "metadata",
    [
        pytest.param((), id="none"),
        pytest.param((("authorization", "Bearer hr_demo0001_" + "x" * 32),), id="wrong"),
        pytest.param((("authorization", "Basic eDp5"),), id="of another scheme"),
    ],
)
def test_without_a_key_there_is_no_service(
    tmp_path: Path, metadata: tuple[tuple[str, str], ...]
) -> None:
    async def story(platform: Platform) -> None:
        calls = (
            platform.stub.GenerateUnary(asking(), metadata=metadata),
            platform.stub.ListModels(pb.ListModelsRequest(), metadata=metadata),
        )
        for call in calls:
            error = await refusal_of(call)
            assert error.code() is grpc.StatusCode.UNAUTHENTICATED
            assert reason_of(error) == "UNAUTHENTICATED"
        assert platform.records == []

    play(tmp_path, story)


def test_a_message_over_the_limit_harms_nobody_else(tmp_path: Path) -> None:
    async def story(platform: Platform) -> None:
        error = await refusal_of(chunks_of(platform, asking(prompt="x" * 100_000)))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED

        assert (await chunks_of(platform, asking()))[-1].HasField("done")

    play(tmp_path, story, frontend__message_bytes_max=50_000)


def test_a_malformed_message_harms_nobody_else(tmp_path: Path) -> None:
    async def story(platform: Platform) -> None:
        raw = platform.channel.unary_unary(
            "/headrace.v1.Inference/GenerateUnary",
            request_serializer=lambda raw: raw,
            response_deserializer=lambda raw: raw,
        )
        for malformed in (b"\xff\xff\xff", b"\x12\x02\xc3\x28"):
            error = await refusal_of(raw(malformed, metadata=platform.metadata))
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "DecodeError" not in (error.details() or "")

        assert (await chunks_of(platform, asking()))[-1].HasField("done")

    play(tmp_path, story)


def test_a_replayed_request_is_not_run_again(tmp_path: Path) -> None:
    async def story(platform: Platform) -> None:
        await chunks_of(platform, asking())
        error = await refusal_of(chunks_of(platform, asking()))

        assert error.code() is grpc.StatusCode.ALREADY_EXISTS
        assert sum(r.usage.completion_tokens for r in platform.records) == 5

    play(tmp_path, story)


def test_a_deadline_ends_the_answer_and_charges_what_was_sent(tmp_path: Path) -> None:
    async def story(platform: Platform) -> None:
        (replica,) = platform.replicas
        replica.engine.hold(after_steps=4)
        received = 0

        async def listen() -> None:
            nonlocal received
            call = platform.stub.Generate(asking(), metadata=platform.metadata, timeout=0.5)
            async for chunk in call:
                received += len(chunk.token_ids)

        error = await refusal_of(listen())
        replica.engine.release()
        await platform.settled()

        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        (record,) = platform.records
        assert record.outcome is Outcome.DEADLINE
        assert record.usage.completion_tokens == received > 0
        assert record.charge_nano > 0

    play(tmp_path, story)


def test_a_client_that_hangs_up_stops_the_engine(tmp_path: Path) -> None:
    async def story(platform: Platform) -> None:
        (replica,) = platform.replicas
        replica.engine.hold(after_steps=4)
        call = platform.stub.Generate(asking(max_tokens=500), metadata=platform.metadata)
        assert isinstance(await call.read(), pb.GenerateChunk)
        call.cancel()
        await platform.settled()
        replica.engine.release()

        (record,) = platform.records
        assert record.outcome is Outcome.CANCELLED
        assert 1 <= record.usage.completion_tokens <= 4
        # The engine is free again: a second request has it to itself.
        assert (await chunks_of(platform, asking("r2")))[-1].HasField("done")
        assert replica.loop.load().running == 0

    play(tmp_path, story)


def test_a_full_frontend_says_when_to_come_back(tmp_path: Path) -> None:
    async def story(platform: Platform) -> None:
        (replica,) = platform.replicas
        replica.engine.hold(after_steps=2)
        call = platform.stub.Generate(asking(), metadata=platform.metadata)
        assert isinstance(await call.read(), pb.GenerateChunk)
        error = await refusal_of(chunks_of(platform, asking("r2")))
        replica.engine.release()
        last = pb.GenerateChunk()

        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert reason_of(error) == "OVERLOADED"
        while isinstance(chunk := await call.read(), pb.GenerateChunk):
            last = chunk
        assert last.HasField("done")
        # The refused one comes again under its own id, and is served.
        assert (await chunks_of(platform, asking("r2")))[-1].HasField("done")

    play(tmp_path, story, frontend__streams_max=1)


def test_a_constrained_answer_obeys(tmp_path: Path) -> None:
    async def story(platform: Platform) -> None:
        options = ["hello", "world"]
        answer = await platform.stub.GenerateUnary(
            asking(choice=pb.Choices(options=options), max_tokens=50), metadata=platform.metadata
        )

        assert answer.choices[0].text in options
        assert answer.choices[0].finish_reason == pb.FINISH_REASON_STOP

    play(tmp_path, story)


def test_health_reflection_and_http_need_no_key(tmp_path: Path) -> None:
    async def story(platform: Platform) -> None:
        health = health_pb2_grpc.HealthStub(platform.channel)
        for service in ("", "headrace.v1.Inference"):
            async for answer in health.Watch(health_pb2.HealthCheckRequest(service=service)):
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    break
        reflection = reflection_pb2_grpc.ServerReflectionStub(platform.channel)
        asked = iter([reflection_pb2.ServerReflectionRequest(list_services="*")])
        async for listed in reflection.ServerReflectionInfo(asked):
            names = {s.name for s in listed.list_services_response.service}
            assert {"headrace.v1.Inference", "grpc.health.v1.Health"} <= names
        await chunks_of(platform, asking())
        async with aiohttp.ClientSession(f"http://{platform.addresses.http}") as http:
            assert await _get(http, "/healthz") == (200, {"status": "alive"})
            assert await _get(http, "/readyz") == (200, {"status": "ready"})
            async with http.get("/metrics") as scrape:
                text = await scrape.text()
        assert 'headrace_requests_total{model="tiny",outcome="ok"} 1.0' in text
        assert 'headrace_tokens_total{kind="completion",model="tiny"} 5.0' in text
        assert 'headrace_replicas_ready{model="tiny"} 1.0' in text

    play(tmp_path, story)


def test_without_a_replica_nothing_is_ready_and_it_says_why(tmp_path: Path) -> None:
    async def story(platform: Platform) -> None:
        health = health_pb2_grpc.HealthStub(platform.channel)
        answer = await health.Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
        async with aiohttp.ClientSession(f"http://{platform.addresses.http}") as http:
            status, body = await _get(http, "/readyz")
            assert (status, body["why"]) == (503, "no replica is ready")
            assert (await _get(http, "/healthz"))[0] == 200

        error = await refusal_of(chunks_of(platform, asking()))
        assert reason_of(error) == "OVERLOADED"

    play(tmp_path, story, num_replicas=0)


def test_a_defect_of_ours_shows_nothing_of_its_inside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def story(platform: Platform) -> None:
        def broken(_: str) -> object:
            raise ZeroDivisionError("a secret path")

        platform.frontend.fleet.model = broken  # pyright: ignore[reportAttributeAccessIssue]
        error = await refusal_of(chunks_of(platform, asking(prompt="my secret prompt")))

        assert error.code() is grpc.StatusCode.INTERNAL
        assert "secret" not in (error.details() or "")

    play(tmp_path, story)
    assert "ZeroDivisionError" in caplog.text
    assert "my secret prompt" not in caplog.text


async def _get(http: aiohttp.ClientSession, path: str) -> tuple[int, dict[str, str]]:
    async with http.get(path) as answer:
        return answer.status, json.loads(await answer.text())


def test_the_tier_decides_the_price_and_comes_back_with_the_receipt(tmp_path: Path) -> None:
    async def story(platform: Platform) -> None:
        *_, standard = await chunks_of(platform, asking("r1"))
        *_, flex = await chunks_of(platform, asking("r2", prompt="other", tier="TIER_FLEX"))
        unary = await platform.stub.GenerateUnary(
            asking("r3", tier="TIER_PRIORITY"), metadata=platform.metadata
        )

        assert standard.done.receipt.tier_served == usage_pb2.TIER_STANDARD
        receipt = flex.done.receipt
        assert (receipt.tier_asked, receipt.tier_served) == (usage_pb2.TIER_FLEX,) * 2
        assert receipt.verdict == "met"
        assert receipt.ttft_us > 0
        assert unary.receipt.tier_served == usage_pb2.TIER_PRIORITY
        for tier, done in ((Tier.STANDARD, standard.done), (Tier.FLEX, flex.done)):
            price = platform.config.price_for(MODEL, tier)
            assert done.charge.nano == price.charge_nano(usage_from(done.usage))

    play(tmp_path, story)


def test_prompt_tokens_that_were_written_to_the_cache_are_counted_apart(tmp_path: Path) -> None:
    """Whole blocks of 8 that the first request computed; the second one reads them."""

    async def story(platform: Platform) -> None:
        prompt = "hello world in the true user system " * 4
        first = (await chunks_of(platform, asking("r1", prompt=prompt)))[-1].usage
        second = (await chunks_of(platform, asking("r2", prompt=prompt)))[-1].usage

        assert first.prompt_tokens == second.prompt_tokens
        assert first.cached_tokens == 0
        assert first.cache_write_tokens == first.prompt_tokens // 8 * 8 > 0
        assert second.cached_tokens == (second.prompt_tokens - 1) // 8 * 8
        assert second.cached_tokens + second.cache_write_tokens <= second.prompt_tokens

    play(tmp_path, story)


def test_a_reserved_request_without_a_lease_spills_to_standard(tmp_path: Path) -> None:
    async def story(platform: Platform) -> None:
        *_, last = await chunks_of(platform, asking(tier="TIER_RESERVED"))

        receipt = last.done.receipt
        assert receipt.tier_asked == usage_pb2.TIER_RESERVED
        assert receipt.tier_served == usage_pb2.TIER_STANDARD

    play(tmp_path, story)


def test_a_reserved_request_without_a_lease_is_refused_where_that_is_configured(
    tmp_path: Path,
) -> None:
    async def story(platform: Platform) -> None:
        error = await refusal_of(chunks_of(platform, asking(tier="TIER_RESERVED")))

        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert reason_of(error) == "TIER_UNAVAILABLE"
        (record,) = platform.records
        assert record.outcome is Outcome.REJECTED

    play(tmp_path, story, tiers__reserved_overflow="refuse")


def test_a_tier_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    async def story(platform: Platform) -> None:
        error = await refusal_of(chunks_of(platform, asking(tier=9)))

        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        violation = detail(error, BadRequest)
        assert isinstance(violation, BadRequest)
        assert violation.field_violations[0].field == "tier"

    play(tmp_path, story)


def usage_from(wire: usage_pb2.Usage) -> Usage:
    return Usage(
        prompt_tokens=wire.prompt_tokens,
        cached_tokens=wire.cached_tokens,
        completion_tokens=wire.completion_tokens,
        reasoning_tokens=wire.reasoning_tokens,
        cache_write_tokens=wire.cache_write_tokens,
    )
