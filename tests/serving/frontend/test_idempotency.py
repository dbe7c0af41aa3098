"""One key, one result, one charge: over a real connection, whatever happens in between."""

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from grpc_status import rpc_status

from headrace.deploy import ledgers
from headrace.serving.admission.accounts import open_accounts
from headrace.serving.domain.limit import Limit, Metric
from headrace.serving.domain.record import Settlement
from headrace.serving.domain.scope import Scope
from headrace.serving.domain.usage import Outcome, nano_of
from headrace.serving.errors import MeterUnavailable
from headrace.serving.frontend import shared_run
from headrace.serving.idempotency.claims import ATTEMPTS_MAX, Ask, Verdict, unavailable
from headrace.serving.idempotency.sqlite_claims import SqliteClaims
from headrace.serving.metering.ledger.reader import LedgerReader
from headrace.serving.testing.clock import LeapingClock
from headrace.serving.testing.fake_adjuster import FakeAdjuster
from headrace.serving.testing.platform import MODEL, Platform
from headrace.serving.testing.postgres import PostgresServer
from headrace.serving.testing.tenants import key_of
from headrace.v1 import inference_pb2 as pb

DAY_S = 86_400
KEY = "5f3759df-key"


class Caller:
    """A client that sends a request under a key, and reads as it likes."""

    def __init__(
        self, platform: Platform, request: pb.GenerateRequest | None = None, *, key: str = KEY
    ) -> None:
        self.platform = platform
        metadata = (*platform.metadata, ("idempotency-key", key))
        self.call = platform.stub.Generate(request or asking(), metadata=metadata)
        self.chunks: list[pb.GenerateChunk] = []

    async def reads(self, num_tokens: int) -> None:
        while sum(len(chunk.token_ids) for chunk in self.chunks) < num_tokens:
            chunk = await self.call.read()
            assert isinstance(chunk, pb.GenerateChunk), "the answer ended early"
            self.chunks.append(chunk)

    async def finishes(self) -> pb.GenerateChunk:
        while isinstance(chunk := await self.call.read(), pb.GenerateChunk):
            self.chunks.append(chunk)
        if (await self.call.code()) is not grpc.StatusCode.OK:
            raise grpc.aio.AioRpcError(
                await self.call.code(),
                await self.call.initial_metadata(),
                await self.call.trailing_metadata(),
                await self.call.details(),
            )
        return self.chunks[-1]

    async def was_replayed(self) -> bool:
        return ("x-idempotent-replay", "true") in list(await self.call.initial_metadata())

    @property
    def answers(self) -> list[tuple[list[int], str, int]]:
        """Tokens, text and finish reason of each choice, however they were cut into chunks."""
        found: dict[int, tuple[list[int], str, int]] = {}
        for chunk in self.chunks:
            if not chunk.HasField("done"):
                ids, text, finish = found.get(chunk.index, ([], "", 0))
                ids = [*ids, *chunk.token_ids]
                found[chunk.index] = (ids, text + chunk.text, finish or chunk.finish_reason)
        return [found[index] for index in sorted(found)]


def asking(**fields: object) -> pb.GenerateRequest:
    values: dict[str, object] = {"model": MODEL, "prompt": "hello world", "max_tokens": 12}
    return pb.GenerateRequest(**(values | fields))  # pyright: ignore[reportArgumentType]


def play(home: Path, story: Callable[[Platform], Awaitable[None]], **options: object) -> None:
    async def run() -> None:
        platform = Platform(home, **options)  # pyright: ignore[reportArgumentType]
        async with asyncio.timeout(60), platform:
            await story(platform)

    asyncio.run(run())


async def refusal_of(caller: Caller) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await caller.finishes()
    return failure.value


def reason_of(error: grpc.aio.AioRpcError) -> str:
    status = rpc_status.from_call(error)  # pyright: ignore[reportArgumentType]
    assert status is not None
    info = ErrorInfo()
    assert status.details[0].Unpack(info)
    return info.reason


def retry_of(error: grpc.aio.AioRpcError) -> bool:
    status = rpc_status.from_call(error)  # pyright: ignore[reportArgumentType]
    assert status is not None
    return any(packed.Is(RetryInfo.DESCRIPTOR) for packed in status.details)


def served(platform: Platform) -> list[str]:
    """Ids of the records of requests that ran, the newest first."""
    return [each.request_id for each in platform.records if "#" not in each.request_id]


def owed_nano(platform: Platform) -> int:
    """What the demo tenant owes by this frontend's ledger, corrections included."""
    with ledgers.local(platform.config) as ledger:
        (balance,) = LedgerReader(ledger).balances(tenant_id="demo")
    return nano_of(balance.charge_femto + balance.adjusted_femto)


def test_the_same_key_again_gives_the_same_result_without_a_charge(tmp_path: Path) -> None:
    async def story(platform: Platform) -> None:
        request = asking(n=2, logprobs=1)
        first = Caller(platform, request)
        done = (await first.finishes()).done
        again = Caller(platform, request)

        assert (await again.finishes()).done == done
        assert again.answers == first.answers
        assert again.chunks[-1].request_id == first.chunks[-1].request_id
        assert not await first.was_replayed()
        assert await again.was_replayed()
        assert len(platform.records) == 1

    play(tmp_path, story)


def test_a_stream_is_answered_again_as_one_message_and_the_other_way_round(tmp_path: Path) -> None:
    async def story(platform: Platform) -> None:
        streamed = Caller(platform, asking(n=2))
        done = (await streamed.finishes()).done
        metadata = (*platform.metadata, ("idempotency-key", KEY))
        whole = await platform.stub.GenerateUnary(asking(n=2), metadata=metadata)
        other = (*platform.metadata, ("idempotency-key", "other"))
        first = await platform.stub.GenerateUnary(asking(n=2), metadata=other)
        again = Caller(platform, asking(n=2), key="other")
        last = await again.finishes()

        assert (whole.usage, whole.charge) == (done.usage, done.charge)
        assert [(list(c.token_ids), c.text, c.finish_reason) for c in whole.choices] == (
            streamed.answers
        )
        assert (last.done.usage, last.request_id) == (first.usage, first.request_id)
        assert len(platform.records) == 2

    play(tmp_path, story)


def test_a_replay_outlives_the_process_and_the_model(tmp_path: Path) -> None:
    first: list[list[tuple[list[int], str, int]]] = []

    async def before(platform: Platform) -> None:
        caller = Caller(platform)
        await caller.finishes()
        first.append(caller.answers)

    async def after(platform: Platform) -> None:
        again = Caller(platform)
        await again.finishes()

        assert again.answers == first[0]
        assert await again.was_replayed()

    play(tmp_path, before)
    play(tmp_path, after, num_replicas=0)


def test_three_callers_of_one_key_share_one_run(tmp_path: Path) -> None:
    async def story(platform: Platform) -> None:
        (replica,) = platform.replicas
        replica.engine.hold(after_steps=5)
        first = Caller(platform)
        await first.reads(2)
        second, third = Caller(platform), Caller(platform)
        await asyncio.gather(second.reads(2), third.reads(2))
        replica.engine.release()
        lasts = await asyncio.gather(first.finishes(), second.finishes(), third.finishes())

        assert first.answers == second.answers == third.answers
        assert lasts[0].done == lasts[1].done == lasts[2].done
        assert len({last.request_id for last in lasts}) == 1
        (record,) = platform.records
        assert record.charge_nano == lasts[0].done.charge.nano

    play(tmp_path, story)


def test_the_run_goes_on_for_those_who_stay_and_ends_with_the_last(tmp_path: Path) -> None:
    async def story(platform: Platform) -> None:
        (replica,) = platform.replicas
        replica.engine.hold(after_steps=5)
        first = Caller(platform)
        await first.reads(2)
        second = Caller(platform)
        await second.reads(2)
        first.call.cancel()
        replica.engine.release()
        await second.finishes()
        assert len(second.answers[0][0]) == 12

        replica.engine.hold(after_steps=5)
        callers = [Caller(platform, asking(max_tokens=500), key="k2") for _ in range(2)]
        await asyncio.gather(*(caller.reads(2) for caller in callers))
        for caller in callers:
            caller.call.cancel()
        await platform.settled()
        replica.engine.release()

        assert [record.outcome for record in platform.records] == [
            Outcome.CANCELLED,
            Outcome.OK,
        ]
        assert platform.records[0].usage.completion_tokens <= 5

    play(tmp_path, story)


def test_a_caller_whose_deadline_passes_leaves_the_others_alone(tmp_path: Path) -> None:
    async def story(platform: Platform) -> None:
        (replica,) = platform.replicas
        replica.engine.hold(after_steps=5)
        hasty = platform.stub.GenerateUnary(
            asking(), metadata=(*platform.metadata, ("idempotency-key", KEY)), timeout=0.3
        )
        patient: Caller | None = None
        await asyncio.to_thread(replica.engine.wait_until_held)
        patient = Caller(platform)
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await hasty
        replica.engine.release()
        await patient.finishes()

        assert failure.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert len(patient.answers[0][0]) == 12
        assert [record.outcome for record in platform.records] == [Outcome.OK]

    play(tmp_path, story)


def test_another_request_under_the_key_is_a_conflict(tmp_path: Path) -> None:
    async def story(platform: Platform) -> None:
        (replica,) = platform.replicas
        replica.engine.hold(after_steps=3)
        running = Caller(platform)
        await running.reads(1)
        while_running = await refusal_of(Caller(platform, asking(prompt="other")))
        replica.engine.release()
        await running.finishes()
        afterwards = await refusal_of(Caller(platform, asking(prompt="other")))

        for error in (while_running, afterwards):
            assert error.code() is grpc.StatusCode.ALREADY_EXISTS
            assert reason_of(error) == "IDEMPOTENCY_CONFLICT"
        # Another name for the same request is the same request.
        await Caller(platform, asking(request_id="mine")).finishes()
        assert len(served(platform)) == 1

    play(tmp_path, story)


def test_keys_of_two_tenants_are_two_keys(tmp_path: Path) -> None:
    other = key_of(tmp_path, "globex")

    async def story(platform: Platform) -> None:
        await Caller(platform).finishes()
        metadata = (("authorization", f"Bearer {other}"), ("idempotency-key", KEY))
        answer = await platform.stub.GenerateUnary(asking(prompt="true"), metadata=metadata)

        assert len(answer.choices) == 1
        assert {record.tenant_id for record in platform.records} == {"demo", "globex"}

    play(tmp_path, story)


@pytest.mark.parametrize(
    "key", [pytest.param("", id="empty"), pytest.param("x" * 129, id="too long")]
)
def test_a_key_out_of_range_is_refused(tmp_path: Path, key: str) -> None:
    async def story(platform: Platform) -> None:
        error = await refusal_of(Caller(platform, key=key))

        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert [record.outcome for record in platform.records] == [Outcome.REJECTED]

    play(tmp_path, story)


def test_a_refused_call_leaves_its_key_and_its_id_free(tmp_path: Path) -> None:
    async def story(platform: Platform) -> None:
        asked = asking(request_id="mine", json_schema='{"type": 7}')
        assert reason_of(await refusal_of(Caller(platform, asked))) == "INVALID_SCHEMA"
        last = await Caller(platform, asking(request_id="mine")).finishes()

        assert last.request_id == "mine"

    play(tmp_path, story)


def test_a_retry_after_a_hang_up_is_charged_once(tmp_path: Path) -> None:
    """The first attempt's tokens were charged as they were delivered; then they are given back."""
    adjuster = FakeAdjuster()

    async def story(platform: Platform) -> None:
        (replica,) = platform.replicas
        replica.engine.hold(after_steps=6)
        first = Caller(platform, asking(request_id="mine"))
        await first.reads(4)
        first.call.cancel()
        await platform.settled()
        await platform.frontend.jobs.idempotency.close()
        replica.engine.release()
        (cancelled,) = platform.records
        assert cancelled.charge_nano > 0
        last = await Caller(platform, asking(request_id="mine")).finishes()
        await platform.frontend.jobs.idempotency.close()

        assert last.request_id != "mine"
        assert adjuster.request_ids == {"mine"}
        assert adjuster.given_back_nano == cancelled.charge_nano
        total = sum(record.charge_nano for record in platform.records)
        assert total - adjuster.given_back_nano == last.done.charge.nano
        again = await Caller(platform).finishes()
        assert again.done == last.done
        assert len(adjuster.applied) == 1

    play(tmp_path, story, adjust=adjuster)


def test_a_request_id_of_another_paid_request_is_not_given_back(tmp_path: Path) -> None:
    """A caller chooses its ids: one that names a request it paid for must not get that refunded."""
    adjuster = FakeAdjuster()

    async def story(platform: Platform) -> None:
        asked = asking(request_id="paid")
        await platform.stub.GenerateUnary(asked, metadata=platform.metadata)
        fleet, place = platform.frontend.fleet, platform.frontend.fleet.place
        is_placing, may_place = asyncio.Event(), asyncio.Event()

        async def waits_for_room(*args: Any, **options: Any) -> Any:
            is_placing.set()
            await may_place.wait()
            return await place(*args, **options)

        fleet.place = waits_for_room
        first = Caller(platform, asked)
        await is_placing.wait()
        first.call.cancel()
        idempotency = platform.frontend.jobs.idempotency
        await idempotency.close()
        fleet.place = place
        await Caller(platform, asked).finishes()
        await idempotency.close()
        await idempotency.keep_house()

        assert adjuster.applied == {}
        assert len(served(platform)) == 2

    play(tmp_path, story, adjust=adjuster)


def test_a_settlement_that_failed_and_is_found_again_is_given_back(tmp_path: Path) -> None:
    """The disk said no and kept it all the same; the retry is whole: it alone is charged."""

    async def before(platform: Platform) -> None:
        meter, metadata = (
            platform.frontend.books.meter,
            (*platform.metadata, ("idempotency-key", KEY)),
        )
        settle = meter.settle

        async def settles_and_says_no(settlement: Settlement) -> None:
            await settle(settlement)
            raise MeterUnavailable("The disk said no.", why="It failed.", fix="Restart.")

        meter.settle = settles_and_says_no
        with pytest.raises(grpc.aio.AioRpcError):
            await platform.stub.GenerateUnary(asking(request_id="mine"), metadata=metadata)

    async def after(platform: Platform) -> None:
        metadata = (*platform.metadata, ("idempotency-key", KEY))
        answer = await platform.stub.GenerateUnary(asking(request_id="mine"), metadata=metadata)
        await platform.frontend.jobs.idempotency.close()
        await platform.frontend.jobs.idempotency.keep_house()

        assert [record.outcome for record in platform.records] == [Outcome.OK, Outcome.OK]
        assert owed_nano(platform) == answer.charge.nano

    play(tmp_path, before)
    play(tmp_path, after)


def test_refusals_before_anything_ran_use_no_attempt_up(tmp_path: Path) -> None:
    async def story(platform: Platform) -> None:
        quota = platform.frontend.quota.quota
        quota.use([Limit(subject="organisation:demo", metric=Metric.INPUT_TOKENS, limit=1)])
        for _ in range(ATTEMPTS_MAX + 2):
            assert reason_of(await refusal_of(Caller(platform))) == "QUOTA_EXCEEDED"
        quota.use([])
        await Caller(platform).finishes()

        assert len(served(platform)) == 1

    play(tmp_path, story)


def test_a_replay_is_not_for_a_key_that_may_not_ask(tmp_path: Path) -> None:
    async def story(platform: Platform) -> None:
        with closing(open_accounts(platform.config)) as accounts:
            elsewhere = Scope(models=("another",))
            narrow = accounts.create_key(tenant_id="demo", scope=elsewhere).key
        await platform.sees_accounts()
        await Caller(platform).finishes()
        metadata = (("authorization", f"Bearer {narrow}"), ("idempotency-key", KEY))
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await platform.stub.GenerateUnary(asking(), metadata=metadata)

        assert reason_of(failure.value) == "PERMISSION_DENIED"

    play(tmp_path, story)


def test_a_call_with_a_key_is_told_its_limits_too(tmp_path: Path) -> None:
    async def story(platform: Platform) -> None:
        limit = Limit(subject="organisation:demo", metric=Metric.REQUESTS, limit=1)
        platform.frontend.quota.quota.use([limit])
        first = Caller(platform)
        await first.finishes()
        again = Caller(platform)
        await again.finishes()
        refused = Caller(platform, key="other")
        assert reason_of(await refusal_of(refused)) == "QUOTA_EXCEEDED"

        for caller in (first, again, refused):
            told = dict(iter(await caller.call.initial_metadata()))
            assert told["x-ratelimit-remaining-requests"] == "0"

    play(tmp_path, story)


def test_a_fault_of_ours_is_retried_under_the_same_key(tmp_path: Path) -> None:
    adjuster = FakeAdjuster()

    async def story(platform: Platform) -> None:
        (replica,) = platform.replicas
        replica.engine.hold(after_steps=5)
        first = Caller(platform)
        await first.reads(2)
        platform.frontend.fleet._failover_wait_s = 0.1
        await replica.kill()
        assert reason_of(await refusal_of(first)) == "ENGINE_FAULT"
        await platform.add_replica()
        again = Caller(platform)
        await again.finishes()

        assert not await again.was_replayed()
        assert [record.outcome for record in platform.records] == [Outcome.OK, Outcome.FAILED]
        assert adjuster.given_back_nano == 0

    play(tmp_path, story, adjust=adjuster)


def test_a_result_is_forgotten_after_24_hours(tmp_path: Path) -> None:
    clock = LeapingClock()

    async def story(platform: Platform) -> None:
        await Caller(platform).finishes()
        clock.ahead_s = DAY_S - 60
        last = Caller(platform)
        await last.finishes()
        assert await last.was_replayed()
        clock.ahead_s = DAY_S + 60
        fresh = Caller(platform, asking(prompt="something else"))
        await fresh.finishes()

        assert not await fresh.was_replayed()
        assert len(platform.records) == 2

    play(tmp_path, story, clock=clock)


def test_answers_are_not_kept_where_that_is_switched_off(tmp_path: Path) -> None:
    async def story(platform: Platform) -> None:
        last = await Caller(platform).finishes()
        error = await refusal_of(Caller(platform))

        assert error.code() is grpc.StatusCode.ALREADY_EXISTS
        assert reason_of(error) == "ALREADY_SERVED"
        assert last.request_id in (error.details() or "")
        assert "12 completion tokens" in (error.details() or "")

    play(tmp_path, story, overrides={"idempotency.keep_answers": False})


def test_neither_key_nor_question_nor_answer_can_be_read_in_the_file(tmp_path: Path) -> None:
    async def story(platform: Platform) -> None:
        caller = Caller(platform)
        await caller.finishes()
        text = caller.answers[0][1]
        assert text
        files = ("idempotency.db", "idempotency.db-wal")
        raw = b"".join((tmp_path / name).read_bytes() for name in files)

        for private in (KEY, "hello world", text):
            assert private.encode() not in raw
        assert (tmp_path / "idempotency.db").stat().st_mode & 0o077 == 0

    play(tmp_path, story)


def test_an_answer_that_was_tampered_with_is_not_given(tmp_path: Path) -> None:
    async def story(platform: Platform) -> None:
        await Caller(platform).finishes()
        with closing(sqlite3.connect(tmp_path / "idempotency.db")) as connection:
            connection.execute("UPDATE idempotency SET answer = zeroblob(length(answer))")
            connection.commit()

        assert reason_of(await refusal_of(Caller(platform))) == "ALREADY_SERVED"

    play(tmp_path, story)


class MoodyStore(SqliteClaims):
    """A store that does not answer while it is told not to."""

    refuses: frozenset[str] = frozenset()

    async def _do(self, work):
        if self.refuses:
            raise unavailable("the test said so")
        return await super()._do(work)


def test_a_store_that_is_down_concerns_only_calls_with_a_key(tmp_path: Path) -> None:
    async def story(platform: Platform) -> None:
        store = platform.frontend.jobs.idempotency._store
        store.__class__ = MoodyStore
        store.refuses = frozenset({"everything"})
        error = await refusal_of(Caller(platform))
        answer = await platform.stub.GenerateUnary(asking(), metadata=platform.metadata)

        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert reason_of(error) == "IDEMPOTENCY_UNAVAILABLE"
        assert retry_of(error)
        assert len(answer.choices) == 1
        assert len(served(platform)) == 1

    play(tmp_path, story)


def test_an_answer_that_could_not_be_stored_is_given_when_it_can_be(tmp_path: Path) -> None:
    """It is charged by then; the caller must not pay for it twice."""

    async def story(platform: Platform) -> None:
        (replica,) = platform.replicas
        store = platform.frontend.jobs.idempotency._store
        store.__class__ = MoodyStore
        replica.engine.hold(after_steps=3)
        first = Caller(platform)
        await first.reads(1)
        store.refuses = frozenset({"everything"})
        replica.engine.release()
        assert reason_of(await refusal_of(first)) == "IDEMPOTENCY_UNAVAILABLE"
        store.refuses = frozenset()
        again = Caller(platform)
        last = await again.finishes()

        assert await again.was_replayed()
        assert [record.request_id for record in platform.records] == [last.request_id]
        assert platform.records[0].charge_nano == last.done.charge.nano

    play(tmp_path, story)


def test_beyond_the_bound_nobody_attaches_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long answer is no longer kept: its readers get all of it, and later ones its usage."""
    monkeypatch.setattr(shared_run, "ANSWER_BYTES_MAX", 200)

    async def story(platform: Platform) -> None:
        (replica,) = platform.replicas
        replica.engine.hold(after_steps=3)
        first, second = Caller(platform), Caller(platform)
        await asyncio.gather(first.reads(1), second.reads(1))
        replica.engine.hold(after_steps=8)
        await first.reads(8)
        late = await refusal_of(Caller(platform))
        replica.engine.release()
        await asyncio.gather(first.finishes(), second.finishes())
        afterwards = await refusal_of(Caller(platform))

        assert reason_of(late) == "IDEMPOTENCY_IN_FLIGHT"
        assert retry_of(late)
        assert first.answers == second.answers
        assert len(first.answers[0][0]) == 12
        assert reason_of(afterwards) == "ALREADY_SERVED"
        assert platform.frontend.jobs.idempotency._kept.held == 0

    play(tmp_path, story)


class ForgetfulStore(SqliteClaims):
    """A store whose answer to a claim is lost on the way."""

    async def claim(self, ask: Ask) -> Verdict:
        await super().claim(ask)
        raise unavailable("the connection broke")


def test_a_claim_whose_answer_was_lost_does_not_block_the_key_for_ever(tmp_path: Path) -> None:
    async def story(platform: Platform) -> None:
        idempotency = platform.frontend.jobs.idempotency
        whole = idempotency._store.__class__
        idempotency._store.__class__ = ForgetfulStore
        assert reason_of(await refusal_of(Caller(platform))) == "IDEMPOTENCY_UNAVAILABLE"
        idempotency._store.__class__ = whole
        last = Caller(platform)
        await last.finishes()

        assert len(last.answers[0][0]) == 12
        assert len(served(platform)) == 1

    play(tmp_path, story)


def test_frontends_of_two_machines_share_their_keys_in_postgresql(tmp_path: Path) -> None:
    """And when the database is gone, calls with a key wait, and others are served."""
    dsn = tmp_path / "dsn"
    homes = [tmp_path / name for name in ("here", "there")]
    for home in homes:
        home.mkdir()
        (home / "pepper").write_text("0123456789abcdef" * 4)  # A cluster has one, mounted.
    overrides: dict[str, object] = {"idempotency.postgres_path": str(dsn)}

    with PostgresServer() as postgres:
        dsn.write_text(postgres.dsn)

        async def story(here: Platform) -> None:
            async with Platform(homes[1], overrides=overrides) as there:
                (replica,) = there.replicas
                replica.engine.hold(after_steps=3)
                running = Caller(there)
                await running.reads(1)
                assert reason_of(await refusal_of(Caller(here))) == "IDEMPOTENCY_IN_FLIGHT"
                replica.engine.release()
                done = (await running.finishes()).done
                assert (await Caller(here).finishes()).done == done
                assert served(here) == []

                # One that hangs up there and retries here: who has its record gives it back.
                replica.engine.hold(after_steps=6)
                lost = Caller(there, asking(request_id="lost"), key="moves")
                await lost.reads(4)
                lost.call.cancel()
                await there.settled()
                await there.frontend.jobs.idempotency.close()
                replica.engine.release()
                await Caller(here, asking(request_id="lost"), key="moves").finishes()
                await here.frontend.jobs.idempotency.keep_house()
                await there.frontend.jobs.idempotency.keep_house()
                (cancelled, _) = there.records
                assert owed_nano(there) == done.charge.nano
                assert cancelled.charge_nano > 0

                await asyncio.to_thread(postgres.stop)
                error = await refusal_of(Caller(here, key="another"))
                assert reason_of(error) == "IDEMPOTENCY_UNAVAILABLE"
                await here.stub.GenerateUnary(asking(), metadata=here.metadata)
                assert len(served(here)) == 2

        play(homes[0], story, overrides=overrides)
