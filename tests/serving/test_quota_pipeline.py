"""What limits do to requests in the real pipeline, however those end."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Collection
from contextlib import aclosing, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from headrace.serving.admission.lease_keeper import LeaseKeeper
from headrace.serving.admission.quota import Quota
from headrace.serving.domain.generate import Chunk, Generate, Settled
from headrace.serving.domain.limit import Limit, Metric
from headrace.serving.domain.record import Caller
from headrace.serving.domain.request import Delta, FinishReason, Sampling, SequenceSpec
from headrace.serving.domain.usage import FEMTO_PER_NANO, Outcome, Price, Usage
from headrace.serving.errors import (
    BudgetExhausted,
    ConcurrencyExceeded,
    DeadlineExceeded,
    EngineFault,
    MeterUnavailable,
    Overloaded,
    ServingError,
)
from headrace.serving.inbox import Inbox
from headrace.serving.observe import Metrics
from headrace.serving.pipeline import Pipeline
from headrace.serving.ports import Placement
from headrace.serving.testing.direct_authority import DirectAuthority
from headrace.serving.testing.fake_meter import FakeMeter
from headrace.serving.testing.virtual_time import VirtualClock, run_virtually

PRICE = Price.text(
    version="p1",
    prompt_nano_per_mtok=1_000_000_000,
    cached_nano_per_mtok=100_000_000,
    completion_nano_per_mtok=2_000_000_000,
)
"""A fresh prompt token is 1,000 nano, a cached one 100, a completion token 2,000."""

REQUEST = Generate(
    caller=Caller("acme", "k1"),
    request_id="r1",
    model="m",
    version="v1",
    prompt_ids=(1, 2, 3, 4),
    sampling=Sampling(max_tokens=8, seed=7),
    price=PRICE,
    accepted_unix_ms=0,
    accepted_ms=0,
)
BUDGET, STOP = FinishReason.BUDGET, FinishReason.STOP


class Replica:
    """A replica that answers by itself, a token each virtual 10 ms, or does what a test says."""

    replica_id, version = "r0", "v1"

    def __init__(self, *, is_scripted: bool) -> None:
        self.is_scripted = is_scripted
        self.running: dict[int, asyncio.Task[None] | None] = {}
        self.inboxes: dict[int, tuple[Inbox, int]] = {}
        self.submitted = asyncio.Event()

    def submit(self, spec: SequenceSpec, *, inbox: Inbox, index: int) -> int:
        sequence = len(self.inboxes)
        self.inboxes[sequence] = (inbox, index)
        answer = self._answer(spec, sequence) if self.is_scripted else None
        self.running[sequence] = answer and asyncio.get_running_loop().create_task(answer)
        self.submitted.set()
        return sequence

    def abort(self, sequence: int) -> None:
        task = self.running.pop(sequence, None)
        if task is not None:
            task.cancel()

    def says(self, *ids: int, index: int = 0, cached: int = 0, finish=None, error=None) -> None:
        delta = Delta(
            token_ids=ids, text="x" * len(ids), cached_tokens=cached, finish=finish, error=error
        )
        for sequence, (inbox, at) in self.inboxes.items():
            if at == index and sequence in self.running:
                inbox.put(index, delta)

    async def _answer(self, spec: SequenceSpec, sequence: int) -> None:
        inbox, index = self.inboxes[sequence]
        rng = random.Random(f"{spec.prompt_ids} {spec.sampling.seed}")
        cached, left = rng.randint(0, len(spec.prompt_ids)), spec.sampling.max_tokens
        while left:
            await asyncio.sleep(0.01)
            ids = (5,) * min(left, rng.choice([1, 1, 1, 2, 4]))
            left -= len(ids)
            finish = None if left else FinishReason.LENGTH
            inbox.put(index, Delta(token_ids=ids, text="x", cached_tokens=cached, finish=finish))
        self.running.pop(sequence, None)


class OneReplica:
    """A fleet of it; full while the test says so."""

    def __init__(self, replica: Replica) -> None:
        self.replica = replica
        self.is_full = False

    async def place(self, request: Generate, *, without: Collection[str] = ()) -> Placement:
        if self.is_full or self.replica.replica_id in without:
            raise Overloaded("Full.", why="It is full.", fix="Retry.", retry_after_ms=100)
        return Placement(self.replica, "it is the one")


class Service:
    """A pipeline with limits, and the verbs of its stories."""

    def __init__(self, home: Path, limits: list[Limit], *, is_scripted: bool = False) -> None:
        clock = VirtualClock()
        self.meter = FakeMeter()
        self.replica = Replica(is_scripted=is_scripted)
        self.fleet = OneReplica(self.replica)
        self.authority = DirectAuthority(home, limits, clock=clock)
        self.leases = LeaseKeeper(self.authority, holder="f", epoch="1", clock=clock)
        self.leases.start()
        self.quota = Quota(clock=clock, leases=self.leases, limits=limits)
        self.pipeline = Pipeline(
            fleet=self.fleet,
            meter=self.meter,
            metrics=Metrics(),
            clock=clock,
            quota=self.quota,
        )

    async def streams(self, request: Generate = REQUEST) -> list[Chunk | Settled]:
        async with aclosing(self.pipeline.generate(request)) as stream:
            return [event async for event in stream]

    async def begins(self, request: Generate = REQUEST) -> "asyncio.Task[list[Chunk | Settled]]":
        self.replica.submitted.clear()
        task = asyncio.create_task(self.streams(request))
        await self.replica.submitted.wait()
        return task

    async def calms(self) -> None:
        for _ in range(20):
            await asyncio.sleep(0)

    async def closes(self) -> int:
        """Femto-currency that the authority knows to be spent in the end."""
        await self.pipeline.wait_settled()
        await self.leases.close()
        standings = self.authority.core.standings()
        self.authority.close()
        return sum(standing.spent for standing in standings)


def play(home: Path, story: Callable[[Service], Awaitable[None]], *limits: Limit) -> None:
    async def run() -> None:
        service = Service(home, list(limits))
        async with asyncio.timeout(3600):
            await story(service)
        await service.closes()

    run_virtually(run())


def budget(nano: int) -> Limit:
    return Limit(subject="organisation:acme", metric=Metric.BUDGET_MONTH, limit=nano, hard=True)


ONE_AT_ONCE = Limit(subject="key:k1", metric=Metric.CONCURRENCY, limit=1)


def test_a_hard_budget_ends_the_stream_normally_and_charges_what_was_delivered(tmp_path: Path):
    """9,999 nano: the prompt for 4,000, two tokens for 4,000; the third is not delivered."""

    async def story(service: Service) -> None:
        stream = await service.begins()
        for token in (10, 11, 12):
            service.replica.says(token)
            await service.calms()
        *chunks, settled = await stream

        assert isinstance(settled, Settled)
        assert [chunk.delta.token_ids for chunk in chunks] == [(10,), (11,), ()]
        assert [chunk.delta.finish for chunk in chunks] == [None, None, BUDGET]
        usage = Usage(prompt_tokens=4, completion_tokens=2)
        assert (settled.usage, settled.charge_nano) == (usage, 8_000)
        record = service.meter.of("r1")
        assert (record.outcome, record.charge_nano) == (Outcome.BUDGET, 8_000)
        assert service.replica.running == {}, "the engine went on without anybody to pay"

    play(tmp_path, story, budget(9_999))


def test_the_chunk_that_is_not_covered_is_withheld_with_its_finish(tmp_path: Path):
    async def story(service: Service) -> None:
        stream = await service.begins()
        service.replica.says(10, 11, 12, finish=STOP)
        *chunks, settled = await stream

        assert isinstance(settled, Settled)
        assert [chunk.delta.finish for chunk in chunks] == [BUDGET]
        assert (settled.usage, settled.charge_nano) == (Usage(), 0)

    play(tmp_path, story, budget(9_999))


def test_choices_share_one_hold_and_end_together(tmp_path: Path):
    """11,999 nano cover the prompt and three tokens, whichever choices those belong to."""

    async def story(service: Service) -> None:
        stream = await service.begins(replace(REQUEST, n=2))
        service.replica.says(10, index=0, finish=STOP)
        await service.calms()
        for token in (20, 21, 22):
            service.replica.says(token, index=1)
            await service.calms()
        *chunks, settled = await stream

        assert isinstance(settled, Settled)
        ends = [(chunk.index, chunk.delta.finish) for chunk in chunks if chunk.delta.finish]
        assert ends == [(0, STOP), (1, BUDGET)]
        assert settled.charge_nano == 10_000

    play(tmp_path, story, budget(11_999))


def test_an_answer_in_one_message_ends_where_the_money_does(tmp_path: Path):
    async def story(service: Service) -> None:
        service.replica.submitted.clear()
        answer = asyncio.create_task(service.pipeline.answer(REQUEST))
        await service.replica.submitted.wait()
        for token in (10, 11, 12):
            service.replica.says(token)
            await service.calms()
        chunks, settled = await answer

        assert [chunk.delta.token_ids for chunk in chunks] == [(10,), (11,), ()]
        assert chunks[-1].delta.finish is BUDGET
        assert (settled.usage.completion_tokens, settled.charge_nano) == (2, 8_000)
        assert service.meter.of("r1").outcome is Outcome.BUDGET

    play(tmp_path, story, budget(9_999))


def test_without_money_for_the_prompt_nothing_is_done(tmp_path: Path):
    async def story(service: Service) -> None:
        with pytest.raises(BudgetExhausted):
            await service.streams()

        assert service.replica.inboxes == {}
        assert service.meter.of("r1").outcome is Outcome.REJECTED

    play(tmp_path, story, budget(5_999))


def test_the_authority_goes_away_in_the_middle_and_the_slice_is_spent_and_no_more(tmp_path: Path):
    async def story(service: Service) -> None:
        stream = await service.begins(replace(REQUEST, sampling=Sampling(max_tokens=1000)))
        service.authority.is_away = True
        while not stream.done():
            service.replica.says(10)
            await asyncio.sleep(0.1)
        *_, settled = await stream

        assert isinstance(settled, Settled)
        assert service.meter.of("r1").outcome is Outcome.BUDGET
        assert settled.charge_nano <= 10**9
        service.authority.is_away = False
        await asyncio.sleep(3)
        assert (await service.begins(replace(REQUEST, request_id="r2"))).cancel()

    play(tmp_path, story, budget(10**9))


async def finishes(service: Service, stream: asyncio.Task) -> None:
    service.replica.says(10, finish=STOP)
    await stream


async def hangs_up(service: Service, stream: asyncio.Task) -> None:
    stream.cancel()
    with suppress(asyncio.CancelledError):
        await stream


async def runs_out_of_time(service: Service, stream: asyncio.Task) -> None:
    with pytest.raises(DeadlineExceeded):
        await stream


async def is_lost(service: Service, stream: asyncio.Task) -> None:
    for inbox, _ in service.replica.inboxes.values():
        inbox.lose("it died")
    with pytest.raises(EngineFault):
        await stream


async def is_refused_by_the_engine(service: Service, stream: asyncio.Task) -> None:
    full = Overloaded("Full.", why="256 wait.", fix="Retry.")
    service.replica.says(finish=FinishReason.ERROR, error=full)
    with pytest.raises(Overloaded):
        await stream


async def cannot_be_recorded(service: Service, stream: asyncio.Task) -> None:
    service.meter.is_broken = True
    service.replica.says(10, finish=STOP)
    with pytest.raises(MeterUnavailable):
        await stream
    service.meter.is_broken = False


@pytest.mark.parametrize(
    "ends",
    [finishes, hangs_up, runs_out_of_time, is_lost, is_refused_by_the_engine, cannot_be_recorded],
)
def test_a_place_is_free_again_however_a_request_ends(tmp_path: Path, ends):
    async def story(service: Service) -> None:
        stream = await service.begins(replace(REQUEST, deadline_ms=5_000))
        with pytest.raises(ConcurrencyExceeded):
            await service.streams(replace(REQUEST, request_id="r2"))
        await ends(service, stream)
        await service.pipeline.wait_settled()

        assert not (await service.begins(replace(REQUEST, request_id="r3"))).done()

    play(tmp_path, story, ONE_AT_ONCE, budget(10**9))


def test_a_place_is_free_again_when_the_request_never_began(tmp_path: Path):
    """No replica, no record, or nobody who waits for the record any more."""

    async def story(service: Service) -> None:
        service.fleet.is_full = True
        with pytest.raises(Overloaded):
            await service.streams()
        service.fleet.is_full = False
        service.meter.is_broken = True
        with pytest.raises(MeterUnavailable):
            await service.streams()
        service.meter.is_broken = False
        opening, may_open = service.meter.open, asyncio.Event()

        async def slow_open(*args: object) -> None:
            await may_open.wait()
            await opening(*args)  # pyright: ignore[reportArgumentType]

        service.meter.open = slow_open
        for is_broken in (True, False):
            may_open.clear()
            stream = asyncio.create_task(service.streams())
            await service.calms()
            stream.cancel()
            await service.calms()
            service.meter.is_broken = is_broken
            may_open.set()
            await service.pipeline.wait_settled()

        assert not (await service.begins(replace(REQUEST, request_id="r3"))).done()

    play(tmp_path, story, ONE_AT_ONCE)


def test_an_opening_that_breaks_behind_a_caller_who_left_frees_its_place(tmp_path: Path):
    """Whatever it breaks with: nobody else is left to give back what it held."""

    async def story(service: Service) -> None:
        opening, may_break = service.meter.open, asyncio.Event()

        async def breaks(*_: object) -> None:
            await may_break.wait()
            raise OSError("not one of ours")

        service.meter.open = breaks
        stream = asyncio.create_task(service.streams())
        await service.calms()
        stream.cancel()
        await service.calms()
        may_break.set()
        await service.pipeline.wait_settled()
        service.meter.open = opening

        assert not (await service.begins(replace(REQUEST, request_id="r2"))).done()

    play(tmp_path, story, ONE_AT_ONCE)


def test_a_request_that_cannot_be_submitted_is_settled_as_failed(tmp_path: Path):
    """Its record is open by then: it is closed, its place is free, and it costs nothing."""

    async def story(service: Service) -> None:
        submitting = service.replica.submit

        def breaks(*_: object, **__: object) -> int:
            raise OSError("not one of ours")

        service.replica.submit = breaks
        for request_id, asks in (("r1", service.streams), ("r2", service.pipeline.answer)):
            with pytest.raises(OSError, match="not one of ours"):
                await asks(replace(REQUEST, request_id=request_id))
            record = service.meter.of(request_id)
            assert (record.outcome, record.charge_femto) == (Outcome.FAILED, 0)
        service.replica.submit = submitting

        assert not (await service.begins(replace(REQUEST, request_id="r3"))).done()

    play(tmp_path, story, ONE_AT_ONCE)


@pytest.mark.parametrize("ends", [is_lost, hangs_up, runs_out_of_time])
def test_a_budget_pays_what_a_failed_log_may_still_charge(tmp_path: Path, ends):
    """The checkpoint is durable: whatever we wanted to settle, the next start charges that."""

    async def run() -> None:
        service = Service(tmp_path, [budget(10**9)])
        stream = await service.begins(replace(REQUEST, deadline_ms=5_000))
        service.replica.says(10)
        await service.calms()
        service.meter.is_broken = True
        await ends(service, stream)

        (checkpoint,) = service.meter.checkpoints.values()
        assert await service.closes() == PRICE.charge_femto(checkpoint) == 6_000 * FEMTO_PER_NANO

    run_virtually(run())


class Crowd:
    """Many requests at once, against one budget, in the real pipeline."""

    def __init__(self, service: Service, seed: int) -> None:
        self.service = service
        self.random = random.Random(seed)
        self.received: dict[str, int] = {}
        """Tokens that each client has."""

    async def client(self, number: int) -> None:
        rng, request_id = self.random, f"r{number}"
        request = replace(
            REQUEST,
            request_id=request_id,
            prompt_ids=range(rng.randint(1, 12)),
            sampling=Sampling(max_tokens=rng.randint(1, 60), seed=number),
            n=rng.choice([1, 1, 1, 2]),
            deadline_ms=rng.choice([None, None, 300]),
        )
        await asyncio.sleep(rng.random() / 10)
        hangs_up_after = rng.choice([None, None, None, 5])
        with suppress(ServingError):
            if rng.random() < 0.2:
                chunks, _ = await self.service.pipeline.answer(request)
                self.received[request_id] = sum(len(c.delta.token_ids) for c in chunks)
                return
            self.received[request_id] = 0
            async with aclosing(self.service.pipeline.generate(request)) as stream:
                async for event in stream:
                    if isinstance(event, Chunk):
                        self.received[request_id] += len(event.delta.token_ids)
                    if hangs_up_after == 0:
                        break
                    hangs_up_after = hangs_up_after and hangs_up_after - 1


@pytest.mark.parametrize("seed", range(20))
def test_a_crowd_of_five_hundred_never_gets_a_token_that_the_budget_does_not_cover(
    tmp_path: Path, seed: int
):
    """20 crowds, 10,000 requests: what was charged fits, and is what the authority has spent."""
    nano = random.Random(seed).randint(1_000_000, 12_000_000)

    async def run() -> None:
        service = Service(tmp_path, [budget(nano)], is_scripted=True)
        crowd = Crowd(service, seed)
        await asyncio.gather(*(crowd.client(number) for number in range(500)))
        spent = await service.closes()

        settled = service.meter.settled.values()
        charged = sum(record.charge_femto for record in settled)
        assert charged == spent <= nano * FEMTO_PER_NANO
        assert sum(record.outcome is Outcome.BUDGET for record in settled) > 0
        # A client who hangs up has the chunk in flight for free; nobody else has one token more.
        for record in settled:
            got = crowd.received.get(record.request_id, 0)
            free = 8 if record.outcome in (Outcome.CANCELLED, Outcome.DEADLINE) else 0
            assert record.usage.completion_tokens <= got <= record.usage.completion_tokens + free

    run_virtually(run())
