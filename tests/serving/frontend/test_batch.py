"""Batches over a real connection: what goes in, what comes out, and what it costs."""

import asyncio
import errno
import itertools
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.rpc.error_details_pb2 import BadRequest
from google.rpc.status_pb2 import Status

from headrace.serving.domain.limit import Metric
from headrace.serving.domain.usage import Outcome
from headrace.serving.errors import (
    AccountsUnavailable,
    LedgerUnavailable,
    Overloaded,
    QuotaUnavailable,
    ServingError,
)
from headrace.serving.frontend import batch_results
from headrace.serving.frontend.status import DETAILS_KEY
from headrace.serving.jobs import batch_files
from headrace.serving.testing.clock import LeapingClock
from headrace.serving.testing.fake_adjuster import FakeAdjuster
from headrace.serving.testing.platform import MODEL, Platform
from headrace.serving.testing.tenants import key_of
from headrace.v1 import batch_pb2 as pb
from headrace.v1 import batch_pb2_grpc, inference_pb2

FINAL = {
    pb.BATCH_STATE_CANCELLED,
    pb.BATCH_STATE_COMPLETED,
    pb.BATCH_STATE_EXPIRED,
    pb.BATCH_STATE_FAILED,
}


class Customer:
    """Uses the Batch service of a platform with one key."""

    def __init__(self, platform: Platform, key: str | None = None) -> None:
        self._runner = platform.frontend.jobs.batches
        self.stub = batch_pb2_grpc.BatchStub(platform.channel)
        self.metadata = (("authorization", f"Bearer {key or platform.key}"),)

    async def submits(self, lines: Iterable[object], *, part_bytes: int = 1 << 20) -> pb.BatchInfo:
        raw = "\n".join(each if isinstance(each, str) else json.dumps(each) for each in lines)
        data = raw.encode("utf-8", "surrogatepass")

        async def parts() -> AsyncIterator[pb.CreateBatchRequest]:
            yield pb.CreateBatchRequest(options=pb.BatchOptions(model=MODEL))
            for start in range(0, len(data), part_bytes):
                yield pb.CreateBatchRequest(jsonl=data[start : start + part_bytes])

        return await self.stub.Create(parts(), metadata=self.metadata)

    async def looks(self, batch_id: str) -> pb.BatchInfo:
        return await self.stub.Get(pb.GetBatchRequest(batch_id=batch_id), metadata=self.metadata)

    async def waits(
        self, batch_id: str, until: Callable[[pb.BatchInfo], bool] = lambda i: i.state in FINAL
    ) -> pb.BatchInfo:
        while True:
            seen = self._runner.progress
            if until(info := await self.looks(batch_id)):
                return info
            await self._runner.progressed(seen)

    async def cancels(self, batch_id: str) -> pb.BatchInfo:
        request = pb.CancelBatchRequest(batch_id=batch_id)
        return await self.stub.Cancel(request, metadata=self.metadata)

    async def results(self, batch_id: str) -> list[dict[str, Any]]:
        raw = b""
        request = pb.BatchResultsRequest(batch_id=batch_id)
        async for part in self.stub.Results(request, metadata=self.metadata):
            raw += part.jsonl
        return [json.loads(line) for line in raw.splitlines()]


def _has_done(num_lines: int) -> Callable[[pb.BatchInfo], bool]:
    return lambda info: info.counts.succeeded >= num_lines


def line(number: int, **fields: object) -> dict[str, object]:
    return {"custom_id": f"c{number}", "prompt": "hello world", "max_tokens": 5} | fields


def play(home: Path, story: Callable[[Platform], Awaitable[None]], **options: object) -> None:
    async def run() -> None:
        platform = Platform(home, **options)  # pyright: ignore[reportArgumentType]
        async with asyncio.timeout(60), platform:
            await story(platform)

    asyncio.run(run())


async def refusal_of(call: Awaitable[object]) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await call
    return failure.value


def field_of(error: grpc.aio.AioRpcError) -> str:
    trailers = error.trailing_metadata()
    assert trailers is not None
    for packed in Status.FromString(trailers[DETAILS_KEY]).details:  # pyright: ignore[reportArgumentType]
        bad = BadRequest()
        if packed.Unpack(bad):
            return bad.field_violations[0].field
    raise AssertionError("no field is blamed")


def test_every_line_has_one_result_at_half_the_price(tmp_path: Path) -> None:
    async def story(platform: Platform) -> None:
        customer = Customer(platform)
        full = await platform.stub.GenerateUnary(
            inference_pb2.GenerateRequest(model=MODEL, prompt="other text", max_tokens=5),
            metadata=platform.metadata,
        )
        batch = await customer.submits(
            [line(1, prompt="other text")] + [line(number) for number in range(2, 21)]
        )
        assert batch.counts.lines == 20
        ended = await customer.waits(batch.batch_id)
        results = await customer.results(batch.batch_id)

        assert ended.state == pb.BATCH_STATE_COMPLETED
        assert ended.counts.succeeded == 20
        assert {each["custom_id"] for each in results} == {f"c{n}" for n in range(1, 21)}
        records = {each.request_id: each for each in platform.records}
        for each in results:
            record = records[each["request_id"]]
            assert each["request_id"] == f"{batch.batch_id}.{each['line']}"
            assert record.charge_nano == each["response"]["charge_nano"]
            assert record.price_version == "demo-1"
        first = next(each for each in results if each["line"] == 1)["response"]
        assert first["choices"][0]["text"] == full.choices[0].text
        usage = full.usage
        assert first["usage"]["completion_tokens"] == usage.completion_tokens
        if first["usage"]["cached_tokens"] == usage.cached_tokens:
            assert first["charge_nano"] == -(-full.charge.nano // 2)
        total = sum(each["response"]["charge_nano"] for each in results)
        assert (
            ended.charge.nano
            == total
            == sum(
                record.charge_nano for record in platform.records if "batch_" in record.request_id
            )
        )

    play(tmp_path, story)


def test_openai_lines_and_messages_are_understood(tmp_path: Path) -> None:
    async def story(platform: Platform) -> None:
        customer = Customer(platform)
        chat = [{"role": "user", "content": "hello"}]
        batch = await customer.submits(
            [
                {"custom_id": "ours", "model": MODEL, "messages": chat, "max_tokens": 3},
                {
                    "custom_id": "theirs",
                    "method": "POST",
                    "url": "/v1/chat/completions",
                    "body": {"model": MODEL, "messages": chat, "max_completion_tokens": 3},
                },
            ]
        )
        await customer.waits(batch.batch_id)
        ours, theirs = sorted(await customer.results(batch.batch_id), key=lambda r: r["line"])

        assert ours["response"]["choices"] == theirs["response"]["choices"]

    play(tmp_path, story)


def test_request_messages_make_a_batch_too(tmp_path: Path) -> None:
    async def story(platform: Platform) -> None:
        customer = Customer(platform)

        async def parts() -> AsyncIterator[pb.CreateBatchRequest]:
            request = inference_pb2.GenerateRequest(model=MODEL, prompt="hello", max_tokens=2)
            for number in range(3):
                yield pb.CreateBatchRequest(
                    line=pb.BatchLine(custom_id=f"m{number}", request=request)
                )

        batch = await customer.stub.Create(parts(), metadata=customer.metadata)
        ended = await customer.waits(batch.batch_id)

        assert (ended.state, ended.counts.succeeded) == (pb.BATCH_STATE_COMPLETED, 3)

    play(tmp_path, story)


BAD_LINES = [
    pytest.param("{", "line 2: line", id="no JSON"),
    pytest.param("[]", "line 2: line", id="no object"),
    pytest.param("", "jsonl", id="empty line"),
    pytest.param('{"a": 1, "a": 1}', "line 2: line", id="a key twice"),
    pytest.param(line(2, colour="red"), "line 2: line", id="unknown field"),
    pytest.param(line(2, temperature="hot"), "line 2: temperature", id="text for a number"),
    pytest.param(line(2, temperature=9), "line 2: sampling.temperature", id="out of range"),
    pytest.param(line(2, max_tokens=True), "line 2: max_tokens", id="truth for a number"),
    pytest.param(line(2, max_tokens=1 << 40), "line 2: max_tokens", id="number too large"),
    pytest.param(line(2, messages=[]), "line 2: prompt", id="two inputs"),
    pytest.param(line(2, custom_id=""), "line 2: custom_id", id="no id"),
    pytest.param(line(2, custom_id="\ud800"), "line 2: custom_id", id="id that is no Unicode"),
    pytest.param(line(1), "jsonl", id="an id twice"),
    pytest.param(line(2, model="no"), "line 2: model", id="unknown model"),
    pytest.param(line(2, prompt="\ud800"), "line 2: prompt", id="prompt that is no Unicode"),
    pytest.param("9" * 5_000, "line 2: line", id="a number without end"),
    pytest.param("[" * 100_000, "line 2: line", id="nested without end"),
    pytest.param("x" * (1 << 20), "line 2: line", id="a megabyte"),
]


@pytest.mark.parametrize(("bad", "field"), BAD_LINES)
def test_a_line_that_cannot_be_run_is_named_and_nothing_is_kept(
    tmp_path: Path, bad: object, field: str
) -> None:
    async def story(platform: Platform) -> None:
        customer = Customer(platform)
        error = await refusal_of(customer.submits([line(1), bad, line(3)]))

        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert field_of(error) == field
        assert "ine 2" in (error.details() or "")
        listed = await customer.stub.List(pb.ListBatchesRequest(), metadata=customer.metadata)
        assert not listed.batches
        assert not [entry for entry in (tmp_path / "batches").iterdir() if entry.is_dir()]

    play(tmp_path, story)


def test_lines_may_be_cut_anywhere(tmp_path: Path) -> None:
    async def story(platform: Platform) -> None:
        customer = Customer(platform)
        batch = await customer.submits([line(n, prompt="héllo") for n in range(3)], part_bytes=7)

        assert batch.counts.lines == 3

    play(tmp_path, story)


def test_a_line_that_fails_says_why_and_costs_nothing(tmp_path: Path) -> None:
    async def story(platform: Platform) -> None:
        customer = Customer(platform)
        batch = await customer.submits([line(1, prompt="x " * 4_000), line(2)])
        ended = await customer.waits(batch.batch_id)
        results = {each["line"]: each for each in await customer.results(batch.batch_id)}

        assert (ended.counts.failed, ended.counts.succeeded) == (1, 1)
        assert results[1]["error"]["reason"] == "PROMPT_TOO_LONG"
        assert ended.charge.nano == results[2]["response"]["charge_nano"]

    play(tmp_path, story)


def test_cancel_stops_running_lines_uncharged(tmp_path: Path) -> None:
    async def story(platform: Platform) -> None:
        customer = Customer(platform)
        (replica,) = platform.replicas
        replica.engine.hold(after_steps=6)
        batch = await customer.submits([line(n, max_tokens=400) for n in range(40)])
        await asyncio.to_thread(replica.engine.wait_until_held)
        assert (await customer.cancels(batch.batch_id)).state == pb.BATCH_STATE_CANCELLING
        ended = await customer.waits(batch.batch_id)
        replica.engine.release()
        results = await customer.results(batch.batch_id)

        assert ended.state == pb.BATCH_STATE_CANCELLED
        assert ended.counts.cancelled == 40
        assert sorted(each["line"] for each in results) == list(range(1, 41))
        assert {each["status"] for each in results} == {"cancelled"}
        assert sum(record.charge_nano for record in platform.records) == 0
        # Again it changes nothing.
        assert (await customer.cancels(batch.batch_id)).state == pb.BATCH_STATE_CANCELLED

    play(tmp_path, story, adjust=FakeAdjuster())


def test_what_is_not_done_in_the_window_expires_unpaid(tmp_path: Path) -> None:
    clock = LeapingClock()

    async def story(platform: Platform) -> None:
        customer = Customer(platform)
        (replica,) = platform.replicas
        replica.engine.hold(after_steps=6)
        batch = await customer.submits([line(n, max_tokens=400) for n in range(20)])
        await asyncio.to_thread(replica.engine.wait_until_held)
        clock.ahead_s = 24 * 3600 + 1
        ended = await customer.waits(batch.batch_id)
        replica.engine.release()
        results = await customer.results(batch.batch_id)

        assert ended.state == pb.BATCH_STATE_EXPIRED
        assert ended.counts.expired == len(results) == 20
        assert results[0]["error"]["reason"] == "DEADLINE_EXCEEDED"
        assert sum(record.charge_nano for record in platform.records) == 0

    play(tmp_path, story, clock=clock)


def test_a_batch_is_its_projects_own(tmp_path: Path) -> None:
    other_key = key_of(tmp_path, "globex")

    async def story(platform: Platform) -> None:
        mine, other = Customer(platform), Customer(platform, other_key)
        batch = await mine.submits([line(1)])
        name = batch.batch_id
        await mine.waits(name)

        for call in (
            other.looks(name),
            other.cancels(name),
            other.results(name),
            other.stub.Delete(pb.DeleteBatchRequest(batch_id=name), metadata=other.metadata),
        ):
            assert (await refusal_of(call)).code() is grpc.StatusCode.NOT_FOUND
        listed = await other.stub.List(pb.ListBatchesRequest(), metadata=other.metadata)
        assert not listed.batches
        error = await refusal_of(mine.stub.Get(pb.GetBatchRequest(batch_id=name)))
        assert error.code() is grpc.StatusCode.UNAUTHENTICATED

    play(tmp_path, story)


def test_files_are_private_and_go_with_delete_or_after_their_time(tmp_path: Path) -> None:
    clock = LeapingClock()

    async def story(platform: Platform) -> None:
        customer = Customer(platform)
        first, second = [await customer.submits([line(1)]) for _ in range(2)]
        await customer.waits(first.batch_id)
        await customer.waits(second.batch_id)
        folders = [tmp_path / "batches" / each.batch_id for each in (first, second)]
        for path in (folders[0] / "requests", folders[0] / "results.jsonl"):
            assert path.stat().st_mode & 0o077 == 0
        request = pb.DeleteBatchRequest(batch_id=first.batch_id)
        await customer.stub.Delete(request, metadata=customer.metadata)
        assert [folder.exists() for folder in folders] == [False, True]
        clock.ahead_s = 30 * 86_400 + 60
        await platform.frontend.jobs.batches._sweep()

        assert not folders[1].exists()
        assert (await refusal_of(customer.looks(second.batch_id))).code() is (
            grpc.StatusCode.NOT_FOUND
        )
        assert len(platform.records) == 2, "what it cost stays on record"

    play(tmp_path, story, clock=clock)


def test_a_batch_that_runs_is_not_deleted(tmp_path: Path) -> None:
    async def story(platform: Platform) -> None:
        customer = Customer(platform)
        platform.replicas[0].engine.hold()
        batch = await customer.submits([line(1)])
        request = pb.DeleteBatchRequest(batch_id=batch.batch_id)
        error = await refusal_of(customer.stub.Delete(request, metadata=customer.metadata))
        platform.replicas[0].engine.release()

        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT

    play(tmp_path, story)


def test_results_go_on_where_a_reader_left_off(tmp_path: Path) -> None:
    async def story(platform: Platform) -> None:
        customer = Customer(platform)
        batch = await customer.submits([line(n) for n in range(10)])
        ended = await customer.waits(batch.batch_id)
        request = pb.BatchResultsRequest(batch_id=batch.batch_id)
        parts = [p async for p in customer.stub.Results(request, metadata=customer.metadata)]
        whole = b"".join(part.jsonl for part in parts)
        request.offset = 100
        rest = [p async for p in customer.stub.Results(request, metadata=customer.metadata)]
        request.offset = ended.results_bytes + 1
        error = await refusal_of(
            _drained(customer.stub.Results(request, metadata=customer.metadata))
        )

        assert len(whole) == ended.results_bytes == parts[-1].next_offset
        assert b"".join(part.jsonl for part in rest) == whole[100:]
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT

    play(tmp_path, story)


async def _drained(call: Any) -> None:
    async for _ in call:
        pass


def test_rows_stay_free_for_those_who_cannot_wait(tmp_path: Path) -> None:
    """Of 8 rows lines take 6: a request that comes now is answered beside them."""

    async def story(platform: Platform) -> None:
        customer = Customer(platform)
        (replica,) = platform.replicas
        batch = await customer.submits([line(n, max_tokens=200) for n in range(30)])
        answer = await platform.stub.GenerateUnary(
            inference_pb2.GenerateRequest(model=MODEL, prompt="hi", max_tokens=20),
            metadata=platform.metadata,
        )
        assert answer.usage.completion_tokens == 20
        assert (await customer.looks(batch.batch_id)).state == pb.BATCH_STATE_RUNNING
        await customer.waits(batch.batch_id)

        assert max(len(step) for step in replica.engine.steps) <= 7

    play(tmp_path, story)


def test_a_batch_that_is_refused_for_now_waits_as_long_as_it_is_told(tmp_path: Path) -> None:
    """At least: each time that it is refused again it waits twice as long."""

    async def story(platform: Platform) -> None:
        customer = Customer(platform)
        runner = platform.frontend.jobs.batches
        real = runner._prepare
        refused_s: list[float] = []

        async def prepare(*args: Any, **options: Any) -> Any:
            if len(refused_s) < 3:
                refused_s.append(asyncio.get_running_loop().time())
                raise Overloaded("Full.", why="It is.", fix="Wait.", retry_after_ms=100)
            return await real(*args, **options)

        runner._prepare = prepare
        batch = await customer.submits([line(1)])
        ended = await customer.waits(batch.batch_id)

        assert ended.counts.succeeded == 1
        gaps_s = [later - first for first, later in itertools.pairwise(refused_s)]
        assert gaps_s[0] >= 0.09
        assert gaps_s[1] >= 0.19, "and twice as long the next time"

    play(tmp_path, story)


@pytest.mark.parametrize("away", [QuotaUnavailable, AccountsUnavailable, LedgerUnavailable])
def test_lines_outlast_what_is_away(tmp_path: Path, away: type[ServingError]) -> None:
    async def story(platform: Platform) -> None:
        customer = Customer(platform)
        refused = _refusing(platform, away, times=6)
        batch = await customer.submits([line(n) for n in range(20)])
        ended = await customer.waits(batch.batch_id)

        assert len(refused) == 6
        assert (ended.counts.succeeded, ended.counts.failed) == (20, 0)

    play(tmp_path, story)


def test_no_new_line_starts_while_one_waits(tmp_path: Path) -> None:
    """So that the lines in memory stay as few as may run at once, and one."""

    async def story(platform: Platform) -> None:
        customer = Customer(platform)
        refused = _refusing(platform, Overloaded, times=9)
        batch = await customer.submits([line(n) for n in range(20)])
        ended = await customer.waits(batch.batch_id)

        assert len(refused) == 9
        assert len(set(refused)) <= 3 + 1
        assert ended.counts.succeeded == 20

    play(tmp_path, story, overrides={"batch.lines_running_max": 3})


def _refusing(platform: Platform, error: type[ServingError], *, times: int) -> list[str]:
    """Refuse the first lines that are tried, briefly; their request ids."""
    runner = platform.frontend.jobs.batches
    real, refused = runner._prepare, []

    async def prepare(*args: Any, request_id: str, **options: Any) -> Any:
        if len(refused) < times:
            refused.append(request_id)
            raise error("Not now.", why="It is away.", fix="Wait.", retry_after_ms=1)
        return await real(*args, request_id=request_id, **options)

    runner._prepare = prepare
    return refused


@pytest.mark.parametrize(
    ("metric", "options", "reason"),
    [
        (Metric.INPUT_TOKENS, {}, "QUOTA_EXCEEDED"),
        (Metric.KV_TOKENS, {}, "CONCURRENCY_EXCEEDED"),
        (Metric.BUDGET_TOTAL, {"hard": True}, "BUDGET_EXHAUSTED"),
    ],
)
def test_a_line_that_never_fits_a_limit_fails_at_once(
    tmp_path: Path, metric: Metric, options: dict[str, object], reason: str
) -> None:
    async def story(platform: Platform) -> None:
        customer = Customer(platform)
        batch = await customer.submits([line(n) for n in range(3)])
        ended = await customer.waits(batch.batch_id)
        results = await customer.results(batch.batch_id)

        assert (ended.state, ended.counts.failed) == (pb.BATCH_STATE_COMPLETED, 3)
        assert {each["error"]["reason"] for each in results} == {reason}

    limit = {"subject": "organisation:demo", "metric": metric, "limit": 1} | options
    play(tmp_path, story, overrides={"limits": [limit]})


def test_lines_that_wait_for_their_limit_keep_nobody_waiting(tmp_path: Path) -> None:
    """There is one place, and the first tenant has used up its minute."""
    other_key = key_of(tmp_path, "globex")

    async def story(platform: Platform) -> None:
        slow, other = Customer(platform), Customer(platform, other_key)
        first = await slow.submits([line(n) for n in range(5)])
        await slow.waits(first.batch_id, _has_done(1))
        async with asyncio.timeout(10):
            second = await other.submits([line(n) for n in range(5)])
            ended = await other.waits(second.batch_id)

        assert ended.counts.succeeded == 5
        assert (await slow.looks(first.batch_id)).counts.succeeded == 1
        assert (await slow.looks(first.batch_id)).state == pb.BATCH_STATE_RUNNING

    limit = {"subject": "organisation:demo", "metric": "requests_per_min", "limit": 1}
    play(tmp_path, story, overrides={"limits": [limit], "batch.lines_running_max": 1})


def test_a_draining_frontend_finishes_its_lines_and_starts_none(tmp_path: Path) -> None:
    async def story(platform: Platform) -> None:
        customer = Customer(platform)
        (replica,), runner = platform.replicas, platform.frontend.jobs.batches
        enter, entered = runner.enter, []

        async def noted(model: str) -> int:
            entered.append(place := await enter(model))
            return place

        runner.enter = noted
        replica.engine.hold(after_steps=6)
        await customer.submits([line(n, max_tokens=20) for n in range(100)])
        await asyncio.to_thread(replica.engine.wait_until_held)
        draining = asyncio.create_task(platform.frontend.drain(30))
        await asyncio.sleep(0)
        num_before = len(entered)
        replica.engine.release()

        assert await draining
        await platform.frontend.stop()
        assert len(entered) == num_before > 0
        assert [each.outcome for each in platform.records] == [Outcome.OK] * num_before

    play(tmp_path, story)


def test_a_drain_does_not_wait_for_a_line_that_outlasts_it(tmp_path: Path) -> None:
    async def story(platform: Platform) -> None:
        customer = Customer(platform)
        (replica,) = platform.replicas
        replica.engine.hold(after_steps=6)
        await customer.submits([line(1, max_tokens=20)])
        await asyncio.to_thread(replica.engine.wait_until_held)

        assert not await platform.frontend.drain(0)

    play(tmp_path, story)


def test_a_callers_own_request_cannot_pass_for_a_line(tmp_path: Path) -> None:
    """Its charge would be given back when the line comes to run."""

    async def story(platform: Platform) -> None:
        name = f"batch_{'0' * 32}.7"
        error = await refusal_of(
            platform.stub.GenerateUnary(
                inference_pb2.GenerateRequest(model=MODEL, prompt="hi", request_id=name),
                metadata=platform.metadata,
            )
        )

        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT

    play(tmp_path, story)


def test_the_next_frontend_goes_on_where_one_stopped(tmp_path: Path) -> None:
    batches: list[str] = []

    async def before(platform: Platform) -> None:
        customer = Customer(platform)
        batch = await customer.submits([line(n, max_tokens=100) for n in range(60)])
        batches.append(batch.batch_id)
        await customer.waits(batch.batch_id, _has_done(5))

    async def after(platform: Platform) -> None:
        customer = Customer(platform)
        ended = await customer.waits(batches[0])
        results = await customer.results(batches[0])

        assert ended.state == pb.BATCH_STATE_COMPLETED
        assert sorted(each["line"] for each in results) == list(range(1, 61))
        paid = sum(record.charge_nano for record in platform.records)
        assert paid - adjuster.given_back_nano == ended.charge.nano

    adjuster = FakeAdjuster()
    play(tmp_path, before, adjust=adjuster)
    play(tmp_path, after, adjust=adjuster)


def test_a_defect_of_ours_under_a_line_makes_it_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had been settled by then; the other lines go on."""
    adjuster = FakeAdjuster()

    async def story(platform: Platform) -> None:
        customer = Customer(platform)
        monkeypatch.setattr(batch_results, "succeeded", _losing(2))
        batch = await customer.submits([line(n) for n in range(1, 4)])
        ended = await customer.waits(batch.batch_id)
        results = {each["line"]: each for each in await customer.results(batch.batch_id)}

        assert ended.counts.succeeded == 2
        assert results[2]["status"] == "failed"
        assert adjuster.request_ids == {f"{batch.batch_id}.2"}
        paid = sum(record.charge_nano for record in platform.records)
        assert paid - adjuster.given_back_nano == ended.charge.nano

    play(tmp_path, story, adjust=adjuster)


def test_a_line_whose_result_was_lost_runs_again_and_is_charged_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first frontend settles lines while its disk takes no results, and then stops."""
    adjuster = FakeAdjuster()
    batches: list[str] = []

    has_settled = threading.Event()

    def takes_nothing(*_: object, **__: object) -> int:
        has_settled.set()
        raise OSError(errno.ENOSPC, "No space left on device")

    async def before(platform: Platform) -> None:
        customer = Customer(platform)
        batches.append((await customer.submits([line(n) for n in range(1, 6)])).batch_id)
        assert await asyncio.to_thread(has_settled.wait, 30)
        assert await platform.frontend.drain(30)

    async def after(platform: Platform) -> None:
        customer = Customer(platform)
        ended = await customer.waits(batches[0])
        results = await customer.results(batches[0])

        assert ended.counts.succeeded == len(results) == 5
        lost = {record.request_id for record in platform.records} - {
            each["request_id"] for each in results
        }
        assert adjuster.request_ids == {name for name in lost if "#" not in name} != set()
        paid = sum(record.charge_nano for record in platform.records)
        assert paid - adjuster.given_back_nano == ended.charge.nano

    with monkeypatch.context() as patch:
        patch.setattr(batch_files, "append_results", takes_nothing)
        play(tmp_path, before, adjust=adjuster)
    play(tmp_path, after, adjust=adjuster)


def _losing(number: int) -> Callable[..., object]:
    real = batch_results.succeeded

    def succeeded(line: int, *args: Any) -> object:
        if line == number:
            raise RuntimeError("a defect between settlement and result")
        return real(line, *args)

    return succeeded


def test_replicas_that_die_under_a_batch_lose_no_line(tmp_path: Path) -> None:
    async def story(platform: Platform) -> None:
        customer = Customer(platform)
        batch = await customer.submits([line(n, max_tokens=60) for n in range(80)])
        for victim in (0, 1):
            await customer.waits(batch.batch_id, _has_done(10 * (victim + 1)))
            await platform.replicas[victim].kill()
            await platform.add_replica()
        ended = await customer.waits(batch.batch_id)

        assert ended.counts.succeeded == 80
        whole = [r for r in platform.records if r.outcome is Outcome.OK]
        assert sum(record.charge_nano for record in whole) == ended.charge.nano

    play(tmp_path, story, num_replicas=2)
