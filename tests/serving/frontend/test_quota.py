"""Limits over a real connection: what a caller is told, and what stands in the books after it."""

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import aiohttp
import grpc
import grpc.aio
import pytest
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import ErrorInfo, QuotaFailure, RetryInfo
from google.rpc.status_pb2 import Status

from headrace.serving.admission.key_store import cluster_token
from headrace.serving.admission.quota_authority import Standing
from headrace.serving.admission.quota_store import LimitStore
from headrace.serving.channel.quota_service import RemoteAuthority
from headrace.serving.clock import SystemClock
from headrace.serving.domain.limit import Limit, Metric
from headrace.serving.domain.usage import Outcome
from headrace.serving.errors import LedgerUnavailable
from headrace.serving.frontend import quota_parts
from headrace.serving.frontend.status import DETAILS_KEY
from headrace.serving.metering.books import Books
from headrace.serving.testing.platform import MODEL, Platform
from headrace.v1 import inference_pb2 as pb

DEMO = "organisation:demo"


def play(home: Path, story: Callable[[Platform], Awaitable[None]], *limits: dict) -> None:
    async def run() -> None:
        platform = Platform(home, overrides={"limits": list(limits)})
        async with asyncio.timeout(60), platform:
            await story(platform)

    asyncio.run(run())


def asking(request_id: str = "r1", max_tokens: int = 5) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        request_id=request_id, model=MODEL, prompt="hello world", max_tokens=max_tokens
    )


def metadata_of(pairs) -> dict[str, str]:
    return {key: value for key, value in pairs if key.startswith("x-")}


async def refusal_of(call) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await call
    return failure.value


def details(error: grpc.aio.AioRpcError, kind: type[Message]) -> list[Message]:
    trailers = error.trailing_metadata()
    assert trailers is not None
    found = []
    for packed in Status.FromString(trailers[DETAILS_KEY]).details:  # pyright: ignore[reportArgumentType]
        message = kind()
        if packed.Unpack(message):
            found.append(message)
    return found


async def standings(platform: Platform) -> list[Standing]:
    token = cluster_token(platform.config.cluster_token_file)
    authority = RemoteAuthority(platform.addresses.directory, cluster_token=token)
    try:
        return list(await authority.standings())
    finally:
        await authority.close()


def test_every_answer_says_what_is_left_and_a_refusal_says_whose_limit_it_was(tmp_path: Path):
    async def story(platform: Platform) -> None:
        for number in (1, 0):
            call = platform.stub.Generate(asking(f"r{number}"), metadata=platform.metadata)
            told = metadata_of(await call.initial_metadata())
            assert [chunk async for chunk in call][-1].HasField("done")
            assert told["x-ratelimit-limit-requests"] == "2"
            assert told["x-ratelimit-remaining-requests"] == str(number)
            assert told["x-ratelimit-limit-tokens"] == "100000"
            assert told["x-ratelimit-reset-requests"].endswith("s")

        refused = platform.stub.GenerateUnary(asking("r3"), metadata=platform.metadata)
        told = metadata_of(await refused.initial_metadata())
        error = await refusal_of(refused)

        assert told["x-ratelimit-remaining-requests"] == "0"
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        (info,), (failure,) = details(error, ErrorInfo), details(error, QuotaFailure)
        (retry,) = details(error, RetryInfo)
        assert info.reason == "QUOTA_EXCEEDED"
        assert info.metadata["quota_metric"] == "requests_per_min"
        assert info.metadata["quota_limit_value"] == "2"
        assert info.metadata["quota_subject"] == "key:demo0001"
        (violation,) = failure.violations
        assert violation.subject == "key:demo0001"
        assert "2 requests a minute" in violation.description
        assert 0 < retry.retry_delay.ToMilliseconds() <= 30_000

    play(
        tmp_path,
        story,
        {"subject": "key:demo0001", "metric": "requests_per_min", "limit": 2},
        {"subject": DEMO, "metric": "input_tokens_per_min", "limit": 100_000},
        {"subject": DEMO, "metric": "output_tokens_per_min", "limit": 200_000},
    )


def test_who_has_no_limits_is_told_nothing(tmp_path: Path):
    async def story(platform: Platform) -> None:
        call = platform.stub.Generate(asking(), metadata=platform.metadata)
        told = metadata_of(await call.initial_metadata())
        assert [chunk async for chunk in call][-1].HasField("done")
        assert told == {}

    play(tmp_path, story)


def test_a_hard_budget_ends_a_stream_with_its_charge_and_then_refuses_for_good(tmp_path: Path):
    """A prompt token costs 50 nano, one of the answer 200: 1,900 nano are some of both."""

    async def story(platform: Platform) -> None:
        (replica,) = platform.replicas
        replica.engine.hold(after_steps=1)
        call = platform.stub.Generate(asking(max_tokens=500), metadata=platform.metadata)
        received_chunks: list[pb.GenerateChunk] = []
        async for chunk in call:
            received_chunks.append(chunk)
            replica.engine.hold(after_steps=1)  # A chunk a token: nothing gets ahead of us.
        replica.engine.release()
        *chunks, last = received_chunks
        await platform.settled()

        assert chunks[-1].finish_reason == pb.FINISH_REASON_BUDGET
        received = sum(len(chunk.token_ids) for chunk in chunks)
        assert last.done.usage.completion_tokens == received > 0
        assert 1_900 - 200 < last.done.charge.nano <= 1_900
        (record,) = platform.records
        assert (record.outcome, record.charge_nano) == (Outcome.BUDGET, last.done.charge.nano)

        error = await refusal_of(
            platform.stub.GenerateUnary(asking("r2"), metadata=platform.metadata)
        )
        (info,) = details(error, ErrorInfo)
        assert info.reason == "BUDGET_EXHAUSTED"
        assert details(error, RetryInfo) == []

    play(
        tmp_path,
        story,
        {"subject": DEMO, "metric": "budget_nano_total", "limit": 1_900, "hard": True},
    )


def test_a_budget_outlives_its_frontend(tmp_path: Path):
    """Stopped in order, a frontend returns what it leased: the next one has exactly the rest."""
    budget = {"subject": DEMO, "metric": "budget_nano_per_month", "limit": 10_000, "hard": True}
    charged = 0

    async def story(platform: Platform) -> None:
        nonlocal charged
        answer = await platform.stub.GenerateUnary(
            asking(f"r{charged}"), metadata=platform.metadata
        )
        charged += answer.charge.nano
        (before,) = await standings(platform)
        assert before.total == 10_000 * 10**6

    for _ in range(2):
        play(tmp_path, story, budget)

    async def look(platform: Platform) -> None:
        (standing,) = await standings(platform)
        assert (standing.spent, standing.held) == (charged * 10**6, 0)
        assert standing.left == (10_000 - charged) * 10**6

    play(tmp_path, look, budget)


def test_a_killed_frontends_slice_is_given_back_when_its_meter_log_was_read(tmp_path: Path):
    """Killed between a grant and its report: its next life asks the log what was spent of it."""
    budget = {"subject": DEMO, "metric": "budget_nano_total", "limit": 10_000, "hard": True}

    async def dies(platform: Platform) -> None:
        charge = await platform.stub.GenerateUnary(asking(), metadata=platform.metadata)
        assert charge.charge.nano == 1_150
        leases = platform.frontend.quota.leases

        async def says_nothing() -> None:
            assert leases._task is not None
            leases._task.cancel()

        leases.close = says_nothing

    async def succeeds(platform: Platform) -> None:
        (standing,) = await standings(platform)

        assert (standing.spent, standing.held) == (1_150 * 10**6, 0)
        assert standing.left == (10_000 - 1_150) * 10**6
        assert await platform.frontend.quota.resolve_former_lives(lambda _: 0) == 0

    play(tmp_path, dies, budget)
    play(tmp_path, succeeds, budget)


def test_a_slice_comes_back_off_the_loop_and_later_when_the_books_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A busy ledger delays neither the start nor the rounds that readiness depends on."""
    budget = {"subject": DEMO, "metric": "budget_nano_total", "limit": 10_000, "hard": True}
    monkeypatch.setattr(quota_parts, "RESOLVE_RETRY_S", 0.01)
    reading, num_refused, num_read = Books.spent_femto, 0, 0

    def busy_twice(books: Books, **which: str) -> int | None:
        nonlocal num_refused, num_read
        assert threading.current_thread() is not threading.main_thread(), "it blocks the loop"
        if num_refused < 2:
            num_refused += 1
            raise LedgerUnavailable("The ledger is busy.", why="A backup holds it.", fix="Wait.")
        num_read += 1
        return reading(books, **which)

    async def dies(platform: Platform) -> None:
        await platform.stub.GenerateUnary(asking(), metadata=platform.metadata)
        leases = platform.frontend.quota.leases

        async def says_nothing() -> None:
            assert leases._task is not None
            leases._task.cancel()

        leases.close = says_nothing

    async def succeeds(platform: Platform) -> None:
        resolving = platform.frontend.quota._resolving
        assert resolving is not None
        await resolving

        (standing,) = await standings(platform)
        assert (standing.spent, standing.held) == (1_150 * 10**6, 0)
        assert (num_refused, num_read) == (2, 1)

    play(tmp_path, dies, budget)
    monkeypatch.setattr(Books, "spent_femto", busy_twice)
    play(tmp_path, succeeds, budget)


def test_a_spent_soft_budget_warns_and_serves(tmp_path: Path):
    async def story(platform: Platform) -> None:
        told: dict[str, str] = {}
        number = 0
        while "x-budget-warning" not in told:
            number += 1
            call = platform.stub.Generate(asking(f"r{number}"), metadata=platform.metadata)
            told = metadata_of(await call.initial_metadata())
            assert [chunk async for chunk in call][-1].HasField("done")

        assert told["x-budget-warning"] == f"{DEMO} budget_nano_total 1200 is spent"
        async with (
            aiohttp.ClientSession(f"http://{platform.addresses.http}") as http,
            http.get("/metrics") as scrape,
        ):
            text = await scrape.text()
        assert 'headrace_quota_decisions_total{metric="all",result="allowed"}' in text
        warned = 'headrace_quota_decisions_total{metric="budget_nano_total",result="warned"} 1.0'
        assert warned in text

    play(tmp_path, story, {"subject": DEMO, "metric": "budget_nano_total", "limit": 1_200})


def test_a_limit_that_an_operator_sets_holds_within_seconds_and_no_longer_than_set(tmp_path: Path):
    async def story(platform: Platform) -> None:
        store = LimitStore(platform.config.limits_path, clock=SystemClock())
        one = Limit(subject=DEMO, metric=Metric.REQUESTS, limit=1)
        store.set(one)
        number = 0

        async def is_refused() -> bool:
            nonlocal number
            number += 1
            call = platform.stub.GenerateUnary(asking(f"r{number}"), metadata=platform.metadata)
            try:
                await call
            except grpc.aio.AioRpcError:
                return True
            return False

        while not await is_refused():
            pass
        store.remove(one)
        while await is_refused():
            pass

    play(tmp_path, story)


def test_the_configuration_is_followed_and_a_mistake_in_it_changes_nothing(tmp_path: Path):
    async def story(platform: Platform) -> None:
        path = platform.config.home / "config.yaml"

        async def writes(text: str, number: int) -> None:
            path.write_text(text)
            os.utime(path, ns=(number, number))

        async def limits() -> list[int]:
            return [each.total for each in await standings(platform)]

        good = f"limits: [{{subject: '{DEMO}', metric: concurrent_requests, limit: 7}}]\n"
        await writes(good, 10**18)
        while await limits() != [7]:
            pass
        await writes(good.replace("7", "-7"), 2 * 10**18)
        store = LimitStore(platform.config.limits_path, clock=SystemClock())
        store.set(Limit(subject="key:k", metric=Metric.KV_TOKENS, limit=9))
        while 9 not in await limits():
            pass

        assert sorted(await limits()) == [7, 9]

    play(tmp_path, story)
