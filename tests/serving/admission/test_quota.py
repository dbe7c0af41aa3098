"""What a caller may have: every limit that applies passes, or none is touched."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from headrace.serving.admission.lease_keeper import LeaseKeeper
from headrace.serving.admission.quota import Quota
from headrace.serving.admission.quota_hold import Hold
from headrace.serving.domain.generate import Generate
from headrace.serving.domain.limit import Limit, Metric, check_limit
from headrace.serving.domain.record import Caller
from headrace.serving.domain.request import Sampling
from headrace.serving.domain.usage import Outcome, Price, Usage
from headrace.serving.errors import (
    BudgetExhausted,
    ConcurrencyExceeded,
    InvalidRequest,
    LimitExceeded,
    QuotaExceeded,
    QuotaUnavailable,
)
from headrace.serving.testing.direct_authority import DirectAuthority
from headrace.serving.testing.virtual_time import VirtualClock, run_virtually

PRICE = Price.text(
    version="p1",
    prompt_nano_per_mtok=1_000_000_000,
    cached_nano_per_mtok=100_000_000,
    completion_nano_per_mtok=2_000_000_000,
)
"""A fresh prompt token is 1,000 nano, a cached one 100, a completion token 2,000."""

REQUEST = Generate(
    caller=Caller("acme", "k1", "search"),
    request_id="r1",
    model="m",
    version="v1",
    prompt_ids=tuple(range(10)),
    sampling=Sampling(max_tokens=20),
    price=PRICE,
    accepted_unix_ms=0,
    accepted_ms=0,
)


class Frontend:
    """Limits of one frontend, and the verbs of their story."""

    def __init__(self, home: Path, limits: list[Limit]) -> None:
        self.clock = VirtualClock()
        self.wire = DirectAuthority(home, limits, clock=self.clock)
        self.authority = self.wire.core
        self.leases = LeaseKeeper(self.wire, holder="f", epoch="1", clock=self.clock)
        self.leases.start()
        self.quota = Quota(clock=self.clock, leases=self.leases, limits=limits)

    async def admits(self, request: Generate = REQUEST) -> Hold:
        return await self.quota.admit(request)

    async def refuses(self, request: Generate = REQUEST) -> LimitExceeded:
        with pytest.raises(LimitExceeded) as refusal:
            await self.quota.admit(request)
        return refusal.value

    def left_of_budget(self) -> int:
        """In nano: what the authority could grant, and what is free here."""
        standing = self.authority.standings()[0]
        free = sum(bucket.account.free for bucket in self.leases.buckets.values())
        return (standing.left + free) // 1_000_000


def play(home: Path, story: Callable[[Frontend], Awaitable[None]], *limits: Limit) -> None:
    async def run() -> None:
        frontend = Frontend(home, list(limits))
        await story(frontend)
        await frontend.leases.close()
        frontend.authority.close()

    run_virtually(run())


def settle(hold: Hold, usage: Usage, outcome: Outcome = Outcome.OK) -> None:
    hold.settle(usage=usage, outcome=outcome, charge_femto=PRICE.charge_femto(usage))


async def covered(hold: Hold, usage: Usage) -> bool:
    return hold.covers(usage) or await hold.extend(usage)


def limit(subject: str, metric: Metric, number: int, **more) -> Limit:
    return Limit(subject=subject, metric=metric, limit=number, **more)


def budget(nano: int, *, hard: bool = True, **more) -> Limit:
    return limit("organisation:acme", Metric.BUDGET_MONTH, nano, hard=hard, **more)


def test_a_burst_of_requests_passes_and_the_next_one_hears_when_to_come_back(tmp_path: Path):
    async def story(frontend: Frontend) -> None:
        for _ in range(2):
            await frontend.admits()
        refusal = await frontend.refuses()

        assert isinstance(refusal, QuotaExceeded)
        assert (refusal.metric, refusal.limit) == ("requests_per_min", 60)
        assert refusal.subject == "key:k1"
        assert refusal.retry_after_ms == 1_000
        await asyncio.sleep(1)
        await frontend.admits()

    play(tmp_path, story, limit("key:k1", Metric.REQUESTS, 60, burst=2))


def test_nothing_is_taken_unless_everything_passes(tmp_path: Path):
    """The organisation has no place left: the key's request, input and money stay untouched."""

    async def story(frontend: Frontend) -> None:
        first = await frontend.admits()
        for _ in range(5):
            assert isinstance(await frontend.refuses(), ConcurrencyExceeded)
        settle(first, Usage(prompt_tokens=10, completion_tokens=1))
        await frontend.admits()

        left = frontend.quota.allowance(REQUEST.caller, "m", [Metric.REQUESTS])
        assert left is not None
        assert left.remaining == 98
        # One settled, at 12,000; one holds the 38,000 that were left of the first one's lease.
        assert frontend.left_of_budget() == 1_000_000 - 12_000 - 38_000

    play(
        tmp_path,
        story,
        budget(1_000_000),
        limit("key:k1", Metric.REQUESTS, 100),
        limit("project:acme/search", Metric.INPUT_TOKENS, 1000),
        limit("organisation:acme", Metric.CONCURRENCY, 1),
    )


def test_all_limits_that_apply_must_pass_not_only_the_most_specific(tmp_path: Path):
    async def story(frontend: Frontend) -> None:
        await frontend.admits()
        await frontend.admits(replace(REQUEST, model="other"))
        refusal = await frontend.refuses()

        assert refusal.subject == "organisation:acme"

    play(
        tmp_path,
        story,
        limit("key:k1", Metric.REQUESTS, 1000),
        limit("organisation:acme", Metric.REQUESTS, 1, model="m"),
    )


@pytest.mark.parametrize(
    "caller",
    [
        pytest.param(Caller("acme", "k2", "search"), id="another key"),
        pytest.param(Caller("acme", "k1", "ads"), id="another project"),
        pytest.param(Caller("emca", "k1", "search"), id="another organisation"),
    ],
)
def test_a_limit_binds_its_subject_and_nobody_else(tmp_path: Path, caller: Caller):
    name = {"k2": "key:k1", "ads": "project:acme/search"}
    subject = name.get(caller.key_id, name.get(caller.project_id, "organisation:acme"))

    async def story(frontend: Frontend) -> None:
        await frontend.admits()
        await frontend.refuses()
        await frontend.admits(replace(REQUEST, caller=caller))

    play(tmp_path, story, limit(subject, Metric.REQUESTS, 1))


def test_cached_tokens_are_given_back_to_the_rate_of_input(tmp_path: Path):
    async def story(frontend: Frontend) -> None:
        hold = await frontend.admits()
        await frontend.refuses()
        settle(hold, Usage(prompt_tokens=10, cached_tokens=8, completion_tokens=1))
        await frontend.refuses(replace(REQUEST, prompt_ids=tuple(range(9))))
        await frontend.admits(replace(REQUEST, prompt_ids=tuple(range(8))))

    play(tmp_path, story, limit("key:k1", Metric.INPUT_TOKENS, 10))


def test_output_is_reserved_as_expected_and_given_back_as_delivered(tmp_path: Path):
    """Twenty answers of 4 tokens: from then on 4 are expected, not the 20 that are allowed."""

    async def story(frontend: Frontend) -> None:
        for _ in range(20):
            settle(await frontend.admits(), Usage(prompt_tokens=10, completion_tokens=4))
        frontend.quota.use([limit("key:k1", Metric.OUTPUT_TOKENS, 1000, burst=88)])
        await frontend.admits()
        await frontend.admits(replace(REQUEST, n=1))
        assert (await frontend.refuses()).metric == "output_tokens_per_min"

    play(tmp_path, story, limit("key:k1", Metric.OUTPUT_TOKENS, 1000, burst=1000))


def test_an_answer_longer_than_expected_runs_on_and_counts_in_steps_of_64(tmp_path: Path):
    async def story(frontend: Frontend) -> None:
        long = replace(REQUEST, sampling=Sampling(max_tokens=400))
        hold = await frontend.admits(long)
        assert hold.covers(Usage(prompt_tokens=10, completion_tokens=256))
        assert hold.covers(Usage(prompt_tokens=10, completion_tokens=257))

        def remaining() -> int:
            left = frontend.quota.allowance(REQUEST.caller, "m", [Metric.OUTPUT_TOKENS])
            assert left is not None
            return left.remaining

        assert remaining() == 1000 - 256 - 64
        settle(hold, Usage(prompt_tokens=10, completion_tokens=257))
        assert remaining() == 1000 - 257

    play(tmp_path, story, limit("key:k1", Metric.OUTPUT_TOKENS, 1000))


def test_a_request_that_can_never_fit_is_not_told_to_wait(tmp_path: Path):
    async def story(frontend: Frontend) -> None:
        refusal = await frontend.refuses()

        assert isinstance(refusal, QuotaExceeded)
        assert refusal.retry_after_ms is None
        assert "less in one request" in refusal.fix

    play(tmp_path, story, limit("key:k1", Metric.INPUT_TOKENS, 9))


def test_kv_tokens_count_the_prompt_once_and_every_choice_in_full(tmp_path: Path):
    async def story(frontend: Frontend) -> None:
        hold = await frontend.admits(replace(REQUEST, n=2))
        await frontend.refuses(replace(REQUEST, sampling=Sampling(max_tokens=1)))
        hold.release()
        await frontend.admits(replace(REQUEST, n=2))

    play(tmp_path, story, limit("key:k1", Metric.KV_TOKENS, 50))


def test_a_caller_who_leaves_before_the_first_token_has_used_its_input(tmp_path: Path):
    """Nothing is charged, but the prompt was computed: a rate must bind who does it on purpose."""

    async def story(frontend: Frontend) -> None:
        settle(await frontend.admits(), Usage(), Outcome.CANCELLED)
        assert (await frontend.refuses()).metric == "input_tokens_per_min"

    play(tmp_path, story, limit("key:k1", Metric.INPUT_TOKENS, 10))


def test_a_fault_of_ours_counts_as_nothing(tmp_path: Path):
    async def story(frontend: Frontend) -> None:
        settle(await frontend.admits(), Usage(), Outcome.FAILED)
        await frontend.admits()

    play(
        tmp_path,
        story,
        limit("key:k1", Metric.INPUT_TOKENS, 10),
        limit("key:k1", Metric.REQUESTS, 1),
    )


def test_a_budget_that_does_not_cover_the_prompt_refuses_and_waiting_does_not_help(tmp_path: Path):
    """10 prompt tokens and the first of the answer may cost 12,000 nano; 11,999 are there."""

    async def story(frontend: Frontend) -> None:
        refusal = await frontend.refuses()

        assert isinstance(refusal, BudgetExhausted)
        assert refusal.retry_after_ms is None
        assert (refusal.metric, refusal.limit) == ("budget_nano_per_month", 11_999)
        assert frontend.left_of_budget() == 11_999

    play(tmp_path, story, budget(11_999))


def test_a_request_that_starts_runs_as_far_as_the_money_goes(tmp_path: Path):
    """15,999 nano: the prompt for 10,000, two tokens for 4,000, and not the third."""

    async def story(frontend: Frontend) -> None:
        hold = await frontend.admits()
        usages = [Usage(prompt_tokens=10, completion_tokens=n) for n in (1, 2, 3)]

        assert [await covered(hold, usage) for usage in usages] == [True, True, False]
        settle(hold, usages[1], Outcome.BUDGET)
        assert frontend.left_of_budget() == 1_999
        await frontend.refuses()

    play(tmp_path, story, budget(15_999))


def test_what_the_cache_saves_is_there_for_the_answer(tmp_path: Path):
    """The same money: with 9 cached tokens the prompt costs 1,900, and 7 tokens are covered."""

    async def story(frontend: Frontend) -> None:
        hold = await frontend.admits()
        usages = [
            Usage(prompt_tokens=10, cached_tokens=9, completion_tokens=n) for n in range(1, 10)
        ]

        assert [await covered(hold, usage) for usage in usages] == [True] * 7 + [False] * 2

    play(tmp_path, story, budget(15_999))


def test_a_soft_budget_goes_on_and_warns(tmp_path: Path):
    async def story(frontend: Frontend) -> None:
        for _ in range(3):
            hold = await frontend.admits()
            usage = Usage(prompt_tokens=10, completion_tokens=20)
            assert hold.covers(usage)
            settle(hold, usage)
            await asyncio.sleep(2)

        assert frontend.quota.warnings(REQUEST.caller, "m", "USD") == [budget(100_000, hard=False)]
        (standing,) = frontend.authority.standings()
        assert (standing.spent, standing.left) == (150_000 * 10**6, -50_000 * 10**6)

    play(tmp_path, story, budget(100_000, hard=False))


def test_a_budget_in_another_currency_compares_with_nothing(tmp_path: Path):
    async def story(frontend: Frontend) -> None:
        refusal = await frontend.refuses()
        assert "is in EUR" in refusal.what

    play(tmp_path, story, budget(10**9, currency="EUR"))


def test_with_a_lease_in_hand_nobody_is_asked(tmp_path: Path):
    """The decision path does no I/O: a hundred requests within the slice, while all is cut off."""

    async def story(frontend: Frontend) -> None:
        for _ in range(40):
            settle(await frontend.admits(), Usage(prompt_tokens=10, completion_tokens=1))
            await asyncio.sleep(0.1)
        frontend.wire.is_away = True
        asks = frontend.wire.num_asks
        for _ in range(20):
            settle(await frontend.admits(), Usage(prompt_tokens=10, completion_tokens=1))
        assert frontend.wire.num_asks == asks

        with pytest.raises(QuotaUnavailable):
            await asyncio.gather(*(frontend.admits() for _ in range(1000)))
        frontend.wire.is_away = False
        await asyncio.sleep(2)
        await frontend.admits()

    play(tmp_path, story, budget(10**9))


def test_a_lease_that_is_over_is_not_spent_but_what_was_held_may_be(tmp_path: Path):
    async def story(frontend: Frontend) -> None:
        hold = await frontend.admits()
        (bucket,) = frontend.leases.buckets.values()
        frontend.wire.is_away = True
        bucket.account.granted += 10**15
        await asyncio.sleep(31)
        with pytest.raises(QuotaUnavailable):
            await frontend.admits()

        assert hold.covers(Usage(prompt_tokens=10, completion_tokens=20))
        settle(hold, Usage(prompt_tokens=10, completion_tokens=20))

    play(tmp_path, story, budget(10**9))


def test_a_changed_limit_keeps_what_runs_and_what_was_spent(tmp_path: Path):
    async def story(frontend: Frontend) -> None:
        hold = await frontend.admits()
        raised = [limit("key:k1", Metric.CONCURRENCY, 2), limit("key:k1", Metric.REQUESTS, 3)]
        frontend.quota.use(raised)
        await frontend.admits()
        assert (await frontend.refuses()).metric == "concurrent_requests"
        settle(hold, Usage(prompt_tokens=10, completion_tokens=1))
        await frontend.admits()
        assert (await frontend.refuses()).metric == "concurrent_requests"

        frontend.quota.use([])
        await frontend.admits()

    play(
        tmp_path,
        story,
        limit("key:k1", Metric.CONCURRENCY, 1),
        limit("key:k1", Metric.REQUESTS, 2),
    )


@pytest.mark.parametrize("end", ["settle", "release"])
def test_a_hold_is_given_back_once(tmp_path: Path, end: str):
    async def story(frontend: Frontend) -> None:
        hold = await frontend.admits()
        for _ in range(2):
            if end == "settle":
                settle(hold, Usage(prompt_tokens=10, completion_tokens=1))
            else:
                hold.release()
        hold.release()
        await frontend.admits()
        await frontend.refuses()

    play(tmp_path, story, limit("key:k1", Metric.CONCURRENCY, 1), budget(10**9))


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        pytest.param({"limit": 0}, "limit", id="nothing"),
        pytest.param({"limit": -5}, "limit", id="negative"),
        pytest.param({"limit": 1 << 63}, "limit", id="overflowing"),
        pytest.param({"burst": -1}, "burst", id="negative burst"),
        pytest.param({"subject": "acme"}, "subject", id="nobody"),
        pytest.param({"subject": "project:acme"}, "subject", id="a project without organisation"),
        pytest.param({"subject": "key:" + "x" * 65}, "subject", id="a name without end"),
        pytest.param({"model": "a model"}, "model", id="a model with a space"),
        pytest.param({"currency": "usd"}, "currency", id="no currency"),
        pytest.param({"metric": Metric.KV_TOKENS, "burst": 5}, "burst", id="a burst of places"),
    ],
)
def test_a_limit_that_means_nothing_is_refused(wrong: dict, field: str):
    good = limit("key:k1", Metric.REQUESTS, 5)

    with pytest.raises(InvalidRequest) as refusal:
        check_limit(replace(good, **wrong))

    assert refusal.value.field == field
