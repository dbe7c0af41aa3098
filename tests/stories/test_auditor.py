"""An auditor compares four books: the clients', the records, the engines' and the metrics'.

For every request and every way it can end:

    engine tokens  >=  arrived at the frontend  >=  recorded  =  charged for, unless it is free

* engine - arrived: handed to a channel that broke or to a sequence that was aborted meanwhile;
* arrived - recorded: never delivered, because the caller had gone.

Both are ours to bear. For an answer that was delivered whole they are zero, whatever replicas died
under it: then client, record and engine agree to the token.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import grpc.aio
import pytest

from headrace.serving.domain.record import UsageRecord
from headrace.serving.domain.usage import Outcome
from headrace.serving.request_run import Run
from headrace.serving.testing.platform import MODEL, Platform
from headrace.v1 import inference_pb2 as pb

PROMPTS = ("hello", "hello world", "the world in the hello " * 8, "true " * 30)
CLIENTS = 12


@dataclass(slots=True)
class Book:
    """One request as its client saw it."""

    request: pb.GenerateRequest
    token_ids: list[list[int]]
    last_chunk_tokens: int = 0
    done: pb.Done | None = None
    is_hasty: bool = False
    """It allows so little time that it may be over before the server reads it."""


class Crowd:
    """Clients with a will of their own, seeded."""

    def __init__(self, platform: Platform, seed: int) -> None:
        self.random = random.Random(seed)
        self.platform = platform
        self.books: dict[str, Book] = {}
        self._num_finished = 0
        self._progress = asyncio.Condition()

    async def works(self, work: list[Awaitable[None]]) -> None:
        """Do all of it, CLIENTS at a time."""
        room = asyncio.Semaphore(CLIENTS)

        async def one(job: Awaitable[None]) -> None:
            async with room:
                await job
            async with self._progress:
                self._num_finished += 1
                self._progress.notify_all()

        await asyncio.gather(*map(one, work))

    async def has_finished(self, num_requests: int) -> None:
        async with self._progress:
            await self._progress.wait_for(lambda: self._num_finished >= num_requests)

    def request(self, number: int) -> pb.GenerateRequest:
        return pb.GenerateRequest(
            request_id=f"q{number}",
            model=MODEL,
            prompt=self.random.choice(PROMPTS),
            max_tokens=self.random.randint(1, 60),
            n=self.random.choice((1, 1, 1, 2, 3)),
        )

    async def listens(
        self,
        request: pb.GenerateRequest,
        *,
        hangs_up_after: int | None = None,
        timeout_s: float | None = None,
    ) -> None:
        book = Book(request, [[] for _ in range(request.n)], is_hasty=timeout_s is not None)
        self.books[request.request_id] = book
        call = self.platform.stub.Generate(
            request, metadata=self.platform.metadata, timeout=timeout_s
        )
        with suppress(grpc.aio.AioRpcError):
            async for chunk in call:
                if chunk.HasField("done"):
                    book.done = chunk.done
                    return
                book.token_ids[chunk.index] += chunk.token_ids
                book.last_chunk_tokens = len(chunk.token_ids)
                if hangs_up_after is not None and self.received(book) >= hangs_up_after:
                    call.cancel()
                    return

    async def asks_for_one_message(self, request: pb.GenerateRequest) -> None:
        book = Book(request, [[] for _ in range(request.n)])
        self.books[request.request_id] = book
        answer = await self.platform.stub.GenerateUnary(request, metadata=self.platform.metadata)
        book.token_ids = [list(choice.token_ids) for choice in answer.choices]
        book.done = pb.Done(usage=answer.usage, charge=answer.charge)

    def misbehaves(self, request: pb.GenerateRequest) -> Awaitable[None]:
        """One client's way with one request."""
        match self.random.choices(("stays", "leaves", "late", "bad", "unary"), (10, 4, 3, 2, 2)):
            case ["leaves"]:
                return self.listens(request, hangs_up_after=self.random.randint(1, 40))
            case ["late"]:
                return self.listens(request, timeout_s=self.random.uniform(0.005, 0.08))
            case ["bad"]:
                request.n = 99
                return self.listens(request)
            case ["unary"]:
                return self.asks_for_one_message(request)
            case _:
                return self.listens(request)

    def received(self, book: Book) -> int:
        return sum(map(len, book.token_ids))


class Auditor:
    """Counts what arrives at the frontend, request by request."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.arrived: Counter[str] = Counter()
        stop = Run.stop

        def counted(run: Run) -> None:
            self.arrived[run.request.request_id] += run.num_arrived
            stop(run)

        monkeypatch.setattr(Run, "stop", counted)

    def compares(self, crowd: Crowd, records: list[UsageRecord]) -> Counter[Outcome]:
        """Every book of a request with its one record; returns how the requests ended."""
        by_id: dict[str, UsageRecord] = {}
        for record in records:
            request_id = record.request_id.partition("#")[0]
            assert request_id not in by_id, "a request leaves one record"
            by_id[request_id] = record
        assert by_id.keys() <= crowd.books.keys()
        for request_id, book in crowd.books.items():
            if request_id in by_id:
                self._compare_one(book, by_id[request_id], crowd)
            else:
                # gRPC ends a call whose deadline passes before our code has begun with it.
                assert book.is_hasty, "every request that reaches us leaves a record"
                assert not crowd.received(book)
        return Counter(record.outcome for record in by_id.values())

    def _compare_one(self, book: Book, record: UsageRecord, crowd: Crowd) -> None:
        received, arrived = crowd.received(book), self.arrived[book.request.request_id]
        recorded = record.usage.completion_tokens
        price = crowd.platform.config.price_for(MODEL)
        is_charged = record.outcome in (Outcome.OK, Outcome.CANCELLED, Outcome.DEADLINE)
        assert record.charge_nano == (price.charge_nano(record.usage) if is_charged else 0)
        assert record.settled_unix_ms is not None
        assert recorded <= arrived <= book.request.max_tokens * book.request.n
        if record.outcome is Outcome.OK:
            assert recorded == arrived
            # A client that hung up behind the last token got them all and missed the receipt.
            if book.done is not None:
                assert received == recorded == book.done.usage.completion_tokens
                assert book.done.charge.nano == record.charge_nano
        else:
            assert book.done is None
            # Free is at most the chunk that was on its way when the caller went.
            assert received - book.last_chunk_tokens <= recorded


def play(home: Path, story: Callable[[Platform], Awaitable[None]], *, num_replicas: int) -> None:
    async def run() -> None:
        async with asyncio.timeout(150), Platform(home, num_replicas=num_replicas) as platform:
            await story(platform)

    asyncio.run(run())


def test_on_a_calm_day_all_books_agree_to_the_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody leaves and nothing dies: engines, records, clients and metrics are equal."""
    auditor = Auditor(monkeypatch)

    async def story(platform: Platform) -> None:
        crowd = Crowd(platform, seed=1)
        requests = [crowd.request(number) for number in range(80)]
        await crowd.works([crowd.listens(request) for request in requests])
        await platform.settled()
        records = platform.records

        assert auditor.compares(crowd, records) == {Outcome.OK: 80}
        loads = [replica.loop.load() for replica in platform.replicas]
        completion = sum(record.usage.completion_tokens for record in records)
        assert sum(load.completion_tokens_total for load in loads) == completion
        # The engine computes the prompt of each answer, the caller pays it once.
        by_id = {record.request_id: record for record in records}
        prompts = sum(by_id[r.request_id].usage.prompt_tokens * r.n for r in requests)
        assert sum(load.prompt_tokens_total for load in loads) == prompts
        assert _metric(platform, "completion") == completion

    play(tmp_path, story, num_replicas=2)


@pytest.mark.parametrize("seed", [11, 12, 13])
def test_whatever_happens_nothing_is_lost_or_billed_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Clients leave, deadlines pass, requests are bad, and replicas die one after the other."""
    auditor = Auditor(monkeypatch)

    async def story(platform: Platform) -> None:
        crowd = Crowd(platform, seed)
        work = [crowd.misbehaves(crowd.request(number)) for number in range(150)]

        async def grim_reaper() -> None:
            for deaths in range(1, 5):
                await crowd.has_finished(deaths * 25)
                victim = platform.replicas[-1]
                await platform.add_replica()
                await victim.kill()

        reaper = asyncio.create_task(grim_reaper())
        await crowd.works(work)
        await reaper
        await platform.settled()
        records = platform.records

        ends = auditor.compares(crowd, records)
        assert ends[Outcome.OK] > 50
        assert ends[Outcome.REJECTED] > 0
        assert ends[Outcome.FAILED] == 0, "there always was a replica to go on"
        assert any(record.replicas_tried > 1 for record in records), "nobody felt the deaths"
        engines = sum(r.loop.load().completion_tokens_total for r in platform.replicas)
        assert engines >= sum(auditor.arrived.values())
        assert _metric(platform, "completion") == sum(
            record.usage.completion_tokens for record in records
        )

    play(tmp_path, story, num_replicas=2)


def _metric(platform: Platform, kind: str) -> int:
    value = platform.frontend.metrics.registry.get_sample_value(
        "headrace_tokens_total", {"model": MODEL, "kind": kind}
    )
    return int(value or 0)
