"""What a request is charged and what its caller sees, however it ends."""

import asyncio
from collections.abc import Collection
from contextlib import aclosing, suppress
from dataclasses import replace

import pytest

from headrace.serving.domain.generate import Chunk, Generate, Settled
from headrace.serving.domain.record import Caller, Settlement
from headrace.serving.domain.request import Delta, FinishReason, Sampling, SequenceSpec
from headrace.serving.domain.tier import Objective, Terms, Tier, Verdict
from headrace.serving.domain.usage import Outcome, Price, Usage
from headrace.serving.errors import (
    AlreadyServed,
    DeadlineExceeded,
    EngineFault,
    InvalidSchema,
    MeterUnavailable,
    Overloaded,
    ServingError,
    TierUnavailable,
)
from headrace.serving.inbox import Inbox
from headrace.serving.observe import Metrics
from headrace.serving.pipeline import Pipeline
from headrace.serving.ports import Entry, Placement
from headrace.serving.testing.fake_meter import FakeMeter
from headrace.serving.testing.virtual_time import VirtualClock, run_virtually
from headrace.serving.tracing import SpanEnd

PRICE = Price.text(
    version="p1",
    prompt_nano_per_mtok=1_000_000_000,
    cached_nano_per_mtok=100_000_000,
    completion_nano_per_mtok=2_000_000_000,
)
"""A fresh prompt token is 1,000 nano, a cached one 100, a completion token 2,000."""

REQUEST = Generate(
    caller=Caller("t1", "k1"),
    request_id="r1",
    model="m",
    version="v1",
    prompt_ids=(1, 2, 3, 4),
    sampling=Sampling(max_tokens=8, seed=7),
    price=PRICE,
    accepted_unix_ms=0,
    accepted_ms=0,
)

STOP = FinishReason.STOP


class FakeReplica:
    """A replica whose engine is the test."""

    def __init__(self, replica_id: str) -> None:
        self.replica_id = replica_id
        self.version = "v1"
        self.specs: list[SequenceSpec] = []
        self.running: dict[int, tuple[Inbox, int]] = {}
        self.submitted = asyncio.Event()

    def submit(self, spec: SequenceSpec, *, inbox: Inbox, index: int) -> int:
        self.specs.append(spec)
        self.running[len(self.specs)] = (inbox, index)
        self.submitted.set()
        return len(self.specs)

    def abort(self, sequence: int) -> None:
        self.running.pop(sequence, None)

    def says(
        self,
        *ids: int,
        index: int = 0,
        cached: int = 0,
        finish: FinishReason | None = None,
        error: ServingError | None = None,
    ) -> None:
        """Deliver the next tokens of answer `index`; each token reads as its number."""
        text = "".join(f"<{token}>" for token in ids)
        delta = Delta(token_ids=ids, text=text, cached_tokens=cached, finish=finish, error=error)
        for sequence, (inbox, at) in list(self.running.items()):
            if at == index:
                inbox.put(index, delta)
                if finish is not None:
                    del self.running[sequence]

    def dies(self) -> None:
        lost, self.running = self.running, {}
        for inbox, _ in lost.values():
            inbox.lose("the stream ended")


class FakeFleet:
    """Chooses the first replica that is left."""

    def __init__(self, num_replicas: int) -> None:
        self.replicas = [FakeReplica(f"r{number}") for number in range(num_replicas)]

    async def place(self, request: Generate, *, without: Collection[str] = ()) -> Placement:
        for replica in self.replicas:
            if replica.replica_id not in without:
                return Placement(replica, "it is the first")
        raise Overloaded("No replica.", why="All are gone.", fix="Retry.", retry_after_ms=100)


class FakeTiers:
    """Takes everybody in as standard, and counts who is inside."""

    def __init__(self) -> None:
        self.num_inside = 0
        self.num_entered = 0
        self.is_full = False

    def enter(self, request: Generate) -> Entry:
        if self.is_full:
            raise TierUnavailable("It is taken.", why="A lease has an end.", fix="Wait.")
        self.num_inside += 1
        self.num_entered += 1
        terms = replace(request.terms, tier_served=Tier.STANDARD)
        return Entry(replace(request, terms=terms), self._leave)

    def _leave(self) -> None:
        self.num_inside -= 1


class FakeSpan:
    """A trace of one request that insists on being ended once."""

    def __init__(self) -> None:
        self.ends: list[SpanEnd] = []

    def first_token(self, ttft_s: float) -> None:
        assert not self.ends
        assert ttft_s >= 0

    def end(self, result: SpanEnd) -> None:
        assert not self.ends, "a span is ended once"
        self.ends.append(result)


class Call:
    """One request through a pipeline, and the verbs of its story."""

    def __init__(
        self,
        request: Generate = REQUEST,
        *,
        num_replicas: int = 3,
        tiers: FakeTiers | None = None,
    ) -> None:
        self.request = request
        self.meter = FakeMeter()
        self.fleet = FakeFleet(num_replicas)
        self.metrics = Metrics()
        self.pipeline = Pipeline(
            fleet=self.fleet,
            meter=self.meter,
            metrics=self.metrics,
            clock=VirtualClock(),
            tiers=tiers,
        )
        self.span = FakeSpan()
        self.events: list[Chunk | Settled] = []
        self.taken = asyncio.Event()
        self.room = asyncio.Semaphore(1_000_000)
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        async with aclosing(self.pipeline.generate(self.request, span=self.span)) as events:
            async for event in events:
                self.events.append(event)
                self.taken.set()
                await self.room.acquire()

    def replica(self, number: int) -> FakeReplica:
        return self.fleet.replicas[number]

    async def reaches(self, number: int) -> FakeReplica:
        """Wait until the request runs on this replica."""
        await self.replica(number).submitted.wait()
        return self.replica(number)

    async def settles(self) -> None:
        """Let everything that can happen happen."""
        for _ in range(20):
            await asyncio.sleep(0)

    async def hangs_up(self) -> None:
        self.task.cancel()
        with suppress(asyncio.CancelledError):
            await self.task
        await self.pipeline.wait_settled()

    @property
    def text(self) -> str:
        return "".join(event.delta.text for event in self.events if isinstance(event, Chunk))

    @property
    def record(self) -> Settlement:
        """The one record of the request; its trace tells the same end."""
        record = self.meter.of("r1")
        (end,) = self.span.ends
        assert (end.outcome, end.usage) == (record.outcome, record.usage)
        return record


def test_a_whole_answer_is_charged_whole_and_settled_before_the_last_event() -> None:
    async def story() -> None:
        call = Call()
        replica = await call.reaches(0)
        replica.says(10, 11, cached=3)
        await call.settles()
        assert call.meter.num_open == 1
        replica.says(12, finish=STOP)
        await call.task

        usage = Usage(prompt_tokens=4, cached_tokens=3, completion_tokens=3)
        last = call.events[-1]
        assert isinstance(last, Settled)
        assert (last.usage, last.charge_nano) == (usage, 1_000 + 300 + 6_000)
        assert (call.record.usage, call.record.outcome) == (usage, Outcome.OK)
        assert call.text == "<10><11><12>"

    run_virtually(story())


def test_every_chunk_carries_the_usage_so_far() -> None:
    async def story() -> None:
        call = Call()
        replica = await call.reaches(0)
        for token in (10, 11):
            replica.says(token)
            await call.settles()
        replica.says(12, finish=STOP)
        await call.task

        totals = [event.usage.completion_tokens for event in call.events]
        assert totals == [1, 2, 3, 3]
        assert call.meter.checkpoints["t1", "r1"].completion_tokens == 3

    run_virtually(story())


def test_the_chunk_in_flight_when_the_caller_hangs_up_is_free() -> None:
    async def story() -> None:
        call = Call()
        call.room = asyncio.Semaphore(1)
        replica = await call.reaches(0)
        replica.says(10)
        await call.settles()
        replica.says(11)
        await call.settles()
        await call.hangs_up()

        assert call.text == "<10><11>"
        assert call.record.usage == Usage(prompt_tokens=4, completion_tokens=1)
        assert (call.record.outcome, call.record.charge_nano) == (Outcome.CANCELLED, 6_000)
        assert replica.running == {}, "the sequence outlived its caller"

    run_virtually(story())


def test_a_caller_who_leaves_before_the_first_token_pays_nothing() -> None:
    async def story() -> None:
        call = Call()
        replica = await call.reaches(0)
        await call.hangs_up()

        assert call.record.usage == Usage()
        assert (call.record.outcome, call.record.charge_nano) == (Outcome.CANCELLED, 0)
        assert replica.running == {}

    run_virtually(story())


def test_a_caller_who_leaves_while_the_record_is_opened_leaves_a_closed_one() -> None:
    """The opening may be durable although nobody waited for it; nothing may stay open."""

    async def story() -> None:
        call = Call()
        opening = call.meter.open
        may_open = asyncio.Event()

        async def slow_open(*args: object) -> None:
            await may_open.wait()
            await opening(*args)  # pyright: ignore[reportArgumentType]

        call.meter.open = slow_open
        await call.settles()
        call.task.cancel()
        await call.settles()
        may_open.set()
        await call.pipeline.wait_settled()

        assert call.record.outcome is Outcome.CANCELLED
        assert call.replica(0).specs == []

    run_virtually(story())


def test_a_lost_replica_is_invisible_when_nothing_had_been_sent() -> None:
    async def story() -> None:
        call = Call()
        (await call.reaches(0)).dies()
        replica = await call.reaches(1)
        replica.says(10, 11, cached=2, finish=STOP)
        await call.task

        assert replica.specs[0].resume_ids == ()
        assert call.text == "<10><11>"
        assert call.record.usage == Usage(prompt_tokens=4, cached_tokens=2, completion_tokens=2)
        assert call.record.replicas_tried == 2

    run_virtually(story())


def test_an_answer_goes_on_elsewhere_from_the_tokens_that_were_sent() -> None:
    """What is computed again is never charged: the prompt once, with its first cached tokens."""

    async def story() -> None:
        call = Call()
        first = await call.reaches(0)
        first.says(10, 11, cached=2)
        await call.settles()
        first.dies()
        second = await call.reaches(1)
        second.says(12, cached=4, finish=STOP)
        await call.task

        assert second.specs[0].resume_ids == (10, 11)
        assert call.text == "<10><11><12>"
        usage = Usage(prompt_tokens=4, cached_tokens=2, completion_tokens=3)
        assert call.record.usage == usage
        assert call.record.charge_nano == PRICE.charge_nano(usage)

    run_virtually(story())


def test_tokens_that_arrived_just_before_the_loss_are_neither_lost_nor_doubled() -> None:
    async def story() -> None:
        call = Call()
        call.room = asyncio.Semaphore(0)
        first = await call.reaches(0)
        first.says(10)
        await call.settles()
        first.says(11)
        first.says(12)
        first.dies()
        for _ in range(10):
            call.room.release()
        second = await call.reaches(1)
        second.says(13, finish=STOP)
        await call.task

        assert second.specs[0].resume_ids == (10, 11, 12)
        assert call.text == "<10><11><12><13>"

    run_virtually(story())


def test_a_request_that_three_replicas_lost_fails_and_is_not_charged() -> None:
    async def story() -> None:
        call = Call(num_replicas=4)
        for number in range(3):
            replica = await call.reaches(number)
            replica.says(10 + number)
            await call.settles()
            replica.dies()
        with pytest.raises(EngineFault, match="lost by 3 replicas"):
            await call.task

        assert call.record.usage.completion_tokens == 3
        assert (call.record.outcome, call.record.charge_nano) == (Outcome.FAILED, 0)
        assert call.replica(3).specs == []

    run_virtually(story())


def test_an_answer_that_no_replica_can_continue_is_a_fault_of_ours() -> None:
    async def story() -> None:
        call = Call(num_replicas=1)
        replica = await call.reaches(0)
        replica.says(10)
        await call.settles()
        replica.dies()
        with pytest.raises(EngineFault):
            await call.task

        assert (call.record.outcome, call.record.charge_nano) == (Outcome.FAILED, 0)

    run_virtually(story())


def test_a_full_replica_passes_the_request_on() -> None:
    async def story() -> None:
        call = Call(num_replicas=2)
        full = Overloaded("Full.", why="256 wait.", fix="Retry.", retry_after_ms=100)
        for number in range(2):
            replica = await call.reaches(number)
            replica.says(finish=FinishReason.ERROR, error=full)
        with pytest.raises(Overloaded, match="Full"):
            await call.task

        assert (call.record.outcome, call.record.usage) == (Outcome.REJECTED, Usage())

    run_virtually(story())


def test_a_request_that_can_never_succeed_is_not_tried_twice() -> None:
    async def story() -> None:
        call = Call()
        replica = await call.reaches(0)
        bad = InvalidSchema("The schema is too deep.", why="x.", fix="y.")
        replica.says(finish=FinishReason.ERROR, error=bad)
        with pytest.raises(InvalidSchema):
            await call.task

        assert call.replica(1).specs == []
        assert (call.record.outcome, call.record.charge_nano) == (Outcome.REJECTED, 0)

    run_virtually(story())


def test_two_answers_share_one_prompt_and_differ_in_seed() -> None:
    async def story() -> None:
        call = Call(replace(REQUEST, n=2))
        replica = await call.reaches(0)
        replica.says(10, index=0, cached=1)
        replica.says(20, index=1, cached=3)
        await call.settles()
        replica.says(11, index=0, finish=STOP)
        replica.says(21, index=1, finish=STOP)
        await call.task

        assert [spec.sampling.seed for spec in replica.specs] == [7, 8]
        assert call.record.usage == Usage(prompt_tokens=4, cached_tokens=1, completion_tokens=4)

    run_virtually(story())


def test_after_a_loss_only_unfinished_answers_run_again() -> None:
    async def story() -> None:
        call = Call(replace(REQUEST, n=2))
        first = await call.reaches(0)
        first.says(10, index=0, finish=STOP)
        first.says(20, index=1)
        await call.settles()
        first.dies()
        second = await call.reaches(1)
        second.says(21, index=1, finish=STOP)
        await call.task

        assert [spec.resume_ids for spec in second.specs] == [(20,)]
        assert second.specs[0].sampling.seed == 8
        assert call.record.usage.completion_tokens == 3

    run_virtually(story())


def test_a_deadline_charges_what_was_delivered_by_then() -> None:
    async def story() -> None:
        call = Call(replace(REQUEST, deadline_ms=5_000))
        replica = await call.reaches(0)
        replica.says(10)
        with pytest.raises(DeadlineExceeded, match="1 tokens had been delivered"):
            await call.task

        assert asyncio.get_running_loop().time() == pytest.approx(5, abs=0.01)
        assert (call.record.outcome, call.record.charge_nano) == (Outcome.DEADLINE, 6_000)
        assert replica.running == {}

    run_virtually(story())


def test_a_call_that_the_transport_ends_at_its_deadline_is_late_not_cancelled() -> None:
    async def story() -> None:
        call = Call(replace(REQUEST, deadline_ms=5_000))
        await call.reaches(0)
        await asyncio.sleep(4.99)
        await call.hangs_up()

        assert call.record.outcome is Outcome.DEADLINE

    run_virtually(story())


def test_nothing_runs_unmetered() -> None:
    async def story() -> None:
        call = Call()
        call.meter.is_broken = True
        with pytest.raises(MeterUnavailable):
            await call.task

        assert call.replica(0).specs == []

    run_virtually(story())


def test_without_a_settlement_there_is_no_final_message() -> None:
    async def story() -> None:
        call = Call()
        replica = await call.reaches(0)
        call.meter.is_broken = True
        replica.says(10, finish=STOP)
        with pytest.raises(MeterUnavailable):
            await call.task

        assert not any(isinstance(event, Settled) for event in call.events)

    run_virtually(story())


def test_a_replay_is_refused_and_leaves_a_record_of_its_own() -> None:
    async def story() -> None:
        call = Call()
        (await call.reaches(0)).says(10, finish=STOP)
        await call.task
        with pytest.raises(AlreadyServed):
            await anext(call.pipeline.generate(REQUEST))

        (first,) = call.meter.settled.values()
        (replay,) = call.meter.refused.values()
        assert (first.request_id, first.outcome) == ("r1", Outcome.OK)
        assert replay.request_id.startswith("r1#")
        assert (replay.tenant_id, replay.outcome) == ("t1", Outcome.REJECTED)

    run_virtually(story())


def test_a_refused_request_may_come_again_under_its_id() -> None:
    """OVERLOADED asks the caller to retry, so the refusal must not spend the request_id."""

    async def story() -> None:
        call = Call(num_replicas=0)
        with pytest.raises(Overloaded):
            await call.task
        assert call.record.outcome is Outcome.REJECTED

        call.fleet.replicas.append(FakeReplica("late"))
        again = asyncio.ensure_future(_all(call.pipeline, REQUEST))
        (await call.reaches(0)).says(10, finish=STOP)
        assert isinstance((await again)[-1], Settled)

    run_virtually(story())


async def _all(pipeline: Pipeline, request: Generate) -> list[Chunk | Settled]:
    return [event async for event in pipeline.generate(request)]


def test_thinking_is_counted_apart() -> None:
    """Marks 98 and 99 open and close a section; they are not part of it."""

    async def story() -> None:
        call = Call(replace(REQUEST, reasoning_token_ids=(98, 99)))
        replica = await call.reaches(0)
        replica.says(98, 10, 11, 99, 12, finish=STOP)
        await call.task

        assert call.record.usage.reasoning_tokens == 2
        assert call.record.usage.completion_tokens == 5

    run_virtually(story())


def test_a_prompt_may_open_the_thinking() -> None:
    async def story() -> None:
        request = replace(REQUEST, prompt_ids=(1, 98), reasoning_token_ids=(98, 99))
        call = Call(request)
        (await call.reaches(0)).says(10, 99, 11, finish=STOP)
        await call.task

        assert call.record.usage.reasoning_tokens == 1

    run_virtually(story())


def test_a_slow_caller_gets_several_steps_in_one_chunk() -> None:
    """The inbox holds one delta for each answer, however slow its reader is."""

    async def story() -> None:
        call = Call()
        call.room = asyncio.Semaphore(0)
        replica = await call.reaches(0)
        replica.says(10, cached=1)
        await call.settles()
        for token in (11, 12, 13):
            replica.says(token)
        replica.says(14, finish=STOP)
        for _ in range(5):
            call.room.release()
        await call.task

        assert [len(e.delta.token_ids) for e in call.events if isinstance(e, Chunk)] == [1, 4]
        assert call.text == "<10><11><12><13><14>"
        assert call.record.usage.completion_tokens == 5

    run_virtually(story())


def _unary(call: Call) -> "asyncio.Task[tuple[list[Chunk], Settled]]":
    call.task.cancel()
    return asyncio.create_task(call.pipeline.answer(replace(REQUEST, request_id="u1")))


async def _unary_reaches(call: Call) -> FakeReplica:
    call.replica(0).submitted.clear()
    return await call.reaches(0)


def test_an_answer_in_one_message_is_charged_when_it_is_whole() -> None:
    async def story() -> None:
        call = Call()
        unary = _unary(call)
        replica = await _unary_reaches(call)
        replica.says(10)
        await call.settles()
        replica.says(11, finish=STOP)
        chunks, settled = await unary

        assert [chunk.delta.token_ids for chunk in chunks] == [(10,), (11,)]
        assert settled.charge_nano == 4_000 + 4_000

    run_virtually(story())


def test_half_an_answer_in_one_message_was_never_delivered() -> None:
    async def story() -> None:
        call = Call()
        unary = _unary(call)
        (await _unary_reaches(call)).says(10)
        await call.settles()
        unary.cancel()
        await asyncio.wait({unary})
        await call.pipeline.wait_settled()

        assert call.meter.of("u1").charge_nano == 0
        assert call.meter.of("u1").outcome is Outcome.CANCELLED

    run_virtually(story())


PRIORITY = replace(
    REQUEST,
    terms=Terms(
        tier_asked=Tier.PRIORITY,
        tier_served=Tier.PRIORITY,
        objective=Objective(ttft_ms_max=500, itl_ms_max=50),
        tenant=77,
        weight=3,
    ),
)


def test_a_receipt_measures_what_the_caller_saw() -> None:
    """400 ms to the first chunk, then gaps of 40 and 60 ms: the gap was promised to be 50."""

    async def story() -> None:
        call = Call(PRIORITY)
        replica = await call.reaches(0)
        for wait_s, token in ((0.4, 10), (0.04, 11), (0.06, 12)):
            await asyncio.sleep(wait_s)
            replica.says(token)
            await call.settles()
        replica.says(finish=STOP)
        await call.task

        receipt = call.record.receipt
        assert receipt is not None
        assert (receipt.tier_asked, receipt.tier_served) == (Tier.PRIORITY, Tier.PRIORITY)
        assert (receipt.ttft_us, receipt.itl_p50_us, receipt.itl_p99_us) == (
            400_000,
            40_000,
            60_000,
        )
        assert (receipt.verdict, receipt.missed) == (Verdict.MISSED, ("itl",))
        last = call.events[-1]
        assert isinstance(last, Settled)
        assert last.receipt == receipt

    run_virtually(story())


def test_a_replica_is_told_what_is_promised_and_by_when() -> None:
    async def story() -> None:
        call = Call(PRIORITY)
        promise = (await call.reaches(0)).specs[0].promise
        await call.hangs_up()

        assert (promise.tier, promise.tenant, promise.weight) == (Tier.PRIORITY, 77, 3)
        assert (promise.due_ms, promise.itl_ms_max) == (500, 50)

    run_virtually(story())


def test_a_caller_who_leaves_before_anything_was_late_is_excluded() -> None:
    async def story() -> None:
        call = Call(PRIORITY)
        await call.reaches(0)
        await call.hangs_up()

        receipt = call.record.receipt
        assert receipt is not None
        assert (receipt.verdict, receipt.ttft_us) == (Verdict.EXCLUDED, None)

    run_virtually(story())


def test_a_request_that_we_refuse_counts_against_us() -> None:
    async def story() -> None:
        call = Call(PRIORITY, num_replicas=0)
        with suppress(Overloaded):
            await call.task

        receipt = call.meter.of("r1").receipt
        assert receipt is not None
        assert receipt.missed == ("availability",)

    run_virtually(story())


@pytest.mark.parametrize("ending", ["whole", "left", "left unopened", "failed", "no replica"])
def test_what_a_tier_holds_is_given_back_once_however_the_request_ends(ending: str) -> None:
    async def story() -> None:
        tiers = FakeTiers()
        call = Call(PRIORITY, num_replicas=0 if ending == "no replica" else 1, tiers=tiers)
        if ending == "left unopened":
            opening = asyncio.Event()
            call.meter.open = lambda _: opening.wait()  # pyright: ignore[reportAttributeAccessIssue]
            await call.settles()
            assert tiers.num_inside == 1
            call.task.cancel()
            await call.settles()
        elif ending != "no replica":
            replica = await call.reaches(0)
            assert tiers.num_inside == 1
            replica.says(10, finish=STOP if ending == "whole" else None)
            if ending == "failed":
                replica.dies()
            if ending == "left":
                await call.hangs_up()
        with suppress(ServingError, asyncio.CancelledError):
            await call.task

        assert (tiers.num_inside, tiers.num_entered) == (0, 1)

    run_virtually(story())


def test_the_tier_that_served_is_in_the_receipt() -> None:
    async def story() -> None:
        call = Call(PRIORITY, tiers=FakeTiers())
        (await call.reaches(0)).says(10, finish=STOP)
        await call.task

        receipt = call.record.receipt
        assert receipt is not None
        assert (receipt.tier_asked, receipt.tier_served) == (Tier.PRIORITY, Tier.STANDARD)
        assert call.meter.opened["t1", "r1"].tier is Tier.PRIORITY

    run_virtually(story())


def test_a_tier_that_is_full_refuses_before_any_work() -> None:
    async def story() -> None:
        tiers = FakeTiers()
        tiers.is_full = True
        call = Call(PRIORITY, tiers=tiers)
        with suppress(TierUnavailable):
            await call.task

        assert call.record.outcome is Outcome.REJECTED
        assert call.record.receipt is not None
        assert call.record.receipt.verdict is Verdict.EXCLUDED
        assert call.replica(0).specs == []

    run_virtually(story())


def test_written_prompt_tokens_are_counted_with_the_first_delta() -> None:
    async def story() -> None:
        call = Call()
        replica = await call.reaches(0)
        inbox, index = replica.running[1]
        inbox.put(index, Delta(token_ids=(10,), cached_tokens=1, cache_write_tokens=2))
        await call.settles()
        replica.says(11, finish=STOP)
        await call.task

        usage = call.record.usage
        assert (usage.prompt_tokens, usage.cached_tokens, usage.cache_write_tokens) == (4, 1, 2)

    run_virtually(story())


def test_the_most_that_a_request_can_cost_is_held_before_it_runs() -> None:
    """An auditor sees what was at stake, and a sum that no column holds is refused in time."""
    request = Generate(
        caller=Caller("t1", "k1"),
        request_id="r1",
        model="m",
        version="v1",
        prompt_ids=range(100),
        sampling=Sampling(max_tokens=20),
        n=3,
        price=PRICE,
        accepted_unix_ms=0,
        accepted_ms=0,
    )

    assert request.hold_femto == 100 * 10**9 + 3 * 20 * 2 * 10**9
