"""
What the tiers promise of the scheduler, one story each. A step takes 20 ms unless a story says so.

The order inside one tier and tenant is in test_scheduler.py; tests/simulation plays random ones.
"""

from typing import Any

import pytest

from headrace.serving.domain.tier import Promise, Tier
from headrace.serving.engine.job import Job
from headrace.serving.engine.prefix_cache import PrefixChain
from headrace.serving.engine.scheduler import Plan, Scheduler
from headrace.serving.engine.tier_policy import (
    CHUNK_TOKENS_MIN,
    FLEX_WAIT_MS_MAX,
    PREEMPTIONS_MAX,
)
from headrace.serving.testing.scripted_engine import tiny_limits

BLOCK_TOKENS = 4
STEP_MS = 20.0
TTFT_MS = {Tier.RESERVED: 1_000, Tier.PRIORITY: 1_000, Tier.STANDARD: 5_000, Tier.FLEX: 30_000}


class Engine:
    """A small one: 8 tokens a step, 4 rows, 16 blocks of 4 tokens. Time passes with its steps."""

    def __init__(self, **changes: int) -> None:
        small: dict[str, Any] = {
            "rows_max": 4,
            "batch_tokens_max": 8,
            "kv_blocks": 17,
            "sequence_tokens_max": 64,
            "vocab": 1000,
        }
        self.scheduler: Scheduler[Job] = Scheduler(tiny_limits(**(small | changes)))
        self.now_ms = 0.0
        self.answers_left: dict[Job, int] = {}
        self.ended: list[object] = []
        self.last: Plan[Job] = Plan([], [])

    def submit(
        self,
        name: str,
        tier: Tier,
        *,
        prompt: int = 4,
        answer: int = 100,
        tenant: int = 0,
        weight: int = 1,
        itl_ms: int | None = None,
    ) -> Job:
        ttft_ms = TTFT_MS.get(tier)
        promise = Promise(
            tier=tier,
            tenant=tenant,
            weight=weight,
            due_ms=None if ttft_ms is None else self.now_ms + ttft_ms,
            itl_ms_max=itl_ms,
        )
        number = len(self.answers_left) + 1
        job = Job(
            name,
            [number] * prompt,
            PrefixChain(name.encode(), BLOCK_TOKENS),
            promise=promise,
            tokens_held=prompt + answer if tier is Tier.RESERVED else 0,
        )
        self.answers_left[job] = answer
        self.scheduler.add(job, self.now_ms)
        return job

    def step(self, step_ms: float = STEP_MS) -> dict[object, int]:
        """Run one; who got how many tokens."""
        self.last = plan = self.scheduler.plan(self.now_ms)
        self.now_ms += step_ms
        for job, count in plan.grants:
            self.scheduler.advance(job, count)
            if job.num_pending:
                continue
            self.answers_left[job] -= 1
            job.token_ids.append(1)
            if not self.answers_left[job]:
                self.scheduler.remove(job)
                self.ended.append(job.key)
        self.scheduler.check()
        return {job.key: count for job, count in plan.grants}

    def until_ended(self, name: str, *, steps_max: int = 5_000) -> None:
        for _ in range(steps_max):
            if name in self.ended:
                return
            self.step()
        raise AssertionError(f"{name} has not ended after {steps_max} steps")

    def knows(self, *, base_ms: float, row_ms: float, token_ms: float) -> None:
        times = self.scheduler.times
        times.base_ms, times.row_ms, times.token_ms = base_ms, row_ms, token_ms
        times._square = 0.05**2


def test_a_priority_request_overtakes_flex_in_the_queue() -> None:
    """Both wait for the one row; the flex one has waited longer."""
    engine = Engine(rows_max=1)
    engine.submit("running", Tier.PRIORITY, answer=3)
    engine.step()
    engine.submit("flex", Tier.FLEX)
    engine.submit("priority", Tier.PRIORITY)

    engine.until_ended("running")

    assert engine.step() == {"priority": 4}


def test_a_flex_request_that_is_nearly_due_goes_before_a_standard_one_with_time_to_spare() -> None:
    """Slack decides between promises that are not at stake: none gets more than it needs."""
    engine = Engine(rows_max=1)
    engine.submit("running", Tier.PRIORITY, answer=2)
    engine.step()
    engine.submit("flex", Tier.FLEX)
    engine.now_ms += 28_000
    engine.submit("standard", Tier.STANDARD)

    engine.until_ended("running")

    assert engine.step() == {"flex": 4}


def test_a_flex_answer_is_preempted_for_the_blocks_of_a_priority_request() -> None:
    """Its 12 of 16 blocks are what the newcomer's promise needs."""
    engine = Engine(batch_tokens_max=64)
    flex = engine.submit("flex", Tier.FLEX, prompt=48)
    engine.step()

    engine.submit("priority", Tier.PRIORITY, prompt=20)
    assert engine.step() == {"flex": 1}  # There is time: a row may end by itself.
    engine.now_ms += TTFT_MS[Tier.PRIORITY] / 4

    assert engine.step() == {"priority": 20}
    assert engine.last.preempted == [flex]


def test_a_flex_answer_is_preempted_for_the_row_of_a_priority_request() -> None:
    engine = Engine(rows_max=2)
    engine.submit("standard", Tier.STANDARD)
    flex = engine.submit("flex", Tier.FLEX)
    engine.step()

    engine.submit("priority", Tier.PRIORITY)
    engine.now_ms += TTFT_MS[Tier.PRIORITY] / 4

    assert engine.step() == {"standard": 1, "priority": 4}
    assert engine.last.preempted == [flex]


def test_nobody_is_preempted_where_it_would_not_be_enough() -> None:
    """The standard answer keeps its blocks, so the flex one's would not do: it keeps them too."""
    engine = Engine(batch_tokens_max=64)
    engine.submit("standard", Tier.STANDARD, prompt=40)
    engine.submit("flex", Tier.FLEX, prompt=8)
    engine.step()

    engine.submit("priority", Tier.PRIORITY, prompt=40)
    engine.now_ms += TTFT_MS[Tier.PRIORITY] / 4

    assert engine.step() == {"standard": 1, "flex": 1}
    assert engine.last.preempted == []


def test_standard_is_not_preempted_for_priority() -> None:
    """Only flex and batch may be relegated."""
    engine = Engine(rows_max=1)
    engine.submit("standard", Tier.STANDARD, answer=3)
    engine.step()

    engine.submit("priority", Tier.PRIORITY)
    engine.now_ms += TTFT_MS[Tier.PRIORITY] / 4

    assert engine.step() == {"standard": 1}


def test_reserved_is_never_preempted() -> None:
    """It holds the blocks of its whole answer; whoever else lacks one gives way."""
    engine = Engine(rows_max=2, batch_tokens_max=64)
    engine.submit("reserved", Tier.RESERVED, prompt=8, answer=40)
    engine.submit("priority", Tier.PRIORITY, prompt=8, answer=40)

    engine.until_ended("reserved")

    assert engine.scheduler.preemptions == 1
    assert [job.key for job in engine.scheduler.waiting] == ["priority"]


def test_batch_waits_while_standard_waits() -> None:
    engine = Engine(rows_max=1)
    engine.submit("running", Tier.STANDARD, answer=3)
    engine.step()
    engine.submit("batch", Tier.BATCH)
    engine.submit("standard", Tier.STANDARD, answer=3)

    engine.until_ended("running")

    assert engine.step() == {"standard": 4}
    engine.until_ended("standard")
    assert engine.step() == {"batch": 4}


def test_batch_runs_when_capacity_is_idle() -> None:
    engine = Engine()
    engine.submit("standard", Tier.STANDARD)
    engine.submit("batch", Tier.BATCH)

    assert engine.step() == {"standard": 4, "batch": 4}


def test_batch_gives_its_row_to_whoever_comes() -> None:
    """Even flex, and long before its promise is at stake."""
    engine = Engine(rows_max=1)
    batch = engine.submit("batch", Tier.BATCH)
    engine.step()

    engine.submit("flex", Tier.FLEX)

    assert engine.step() == {"flex": 4}
    assert engine.last.preempted == [batch]


def test_a_relegated_flex_answer_is_still_finished() -> None:
    """Priority requests keep coming for as long as it takes; having given way often enough, it
    is treated as standard."""
    engine = Engine(rows_max=1)
    flex = engine.submit("flex", Tier.FLEX, answer=40)
    engine.step()

    for number in range(10):
        engine.submit(f"priority {number}", Tier.PRIORITY, answer=1)
        engine.now_ms += TTFT_MS[Tier.PRIORITY] / 2
        for _ in range(5):
            engine.step()
    engine.until_ended("flex")

    assert flex.preemptions == PREEMPTIONS_MAX
    assert engine.ended[:3] == ["priority 0", "priority 1", "priority 2"]
    assert engine.ended[3] == "flex"


def test_a_flex_request_that_has_waited_long_enough_is_treated_as_standard() -> None:
    engine = Engine(rows_max=1)
    engine.submit("standard", Tier.STANDARD, answer=10_000)
    engine.step()
    flex = engine.submit("flex", Tier.FLEX)

    engine.now_ms += FLEX_WAIT_MS_MAX + 1
    engine.step()

    assert flex.rank == Tier.STANDARD.rank


def test_a_late_first_token_waits_for_those_that_can_be_in_time() -> None:
    engine = Engine(rows_max=1)
    engine.submit("running", Tier.STANDARD, answer=2)
    engine.step()
    engine.submit("late", Tier.STANDARD)
    engine.now_ms += 6_000
    engine.submit("in time", Tier.STANDARD)

    engine.step()

    assert engine.step() == {"in time": 4}


def test_a_prompt_that_cannot_be_in_time_does_not_keep_out_those_that_can() -> None:
    """At 20 ms a token 60 tokens take longer than was promised, and 20 do not."""
    engine = Engine(rows_max=2, kv_blocks=40)
    engine.knows(base_ms=0.1, row_ms=0.1, token_ms=20.0)
    engine.submit("hopeless", Tier.PRIORITY, prompt=60)
    engine.step()

    engine.submit("short", Tier.PRIORITY, prompt=20)

    assert engine.step() == {"short": 8}


def test_prompts_of_one_promise_do_not_take_turns() -> None:
    """The first one's slack grows as it is computed; it is finished all the same."""
    engine = Engine(kv_blocks=40)
    engine.knows(base_ms=0.1, row_ms=0.1, token_ms=5.0)
    engine.submit("first", Tier.PRIORITY, prompt=24)
    engine.submit("second", Tier.PRIORITY, prompt=24)

    assert [engine.step() for _ in range(3)] == [{"first": 8}] * 3


def test_a_late_request_has_one_turn_in_eight() -> None:
    """Requests that can be in time never end; it is served all the same."""
    engine = Engine(rows_max=1)
    engine.submit("late", Tier.STANDARD, answer=1)
    engine.now_ms += 6_000
    for number in range(30):
        engine.submit(f"in time {number}", Tier.STANDARD, answer=1)

    engine.until_ended("late")

    assert engine.ended.index("late") == 7


@pytest.mark.parametrize(
    ("itl_ms", "tokens"),
    [
        pytest.param(None, 127, id="nothing promised: the whole batch"),
        pytest.param(200, 127, id="a wide gap: the whole batch"),
        pytest.param(50, 68, id="50 ms: 0.95 * 50 / 1.2 - 5.5 ms are left, at 0.5 ms a token"),
        pytest.param(10, CHUNK_TOKENS_MIN, id="none is left: prompts go on all the same"),
    ],
)
def test_the_chunk_shrinks_with_the_least_slack(itl_ms: int | None, tokens: int) -> None:
    engine = Engine(batch_tokens_max=128, kv_blocks=200, sequence_tokens_max=256)
    engine.submit("stream", Tier.PRIORITY, itl_ms=itl_ms)
    engine.submit("patient", Tier.STANDARD, itl_ms=1_000)
    engine.step()
    engine.scheduler.remove(engine.scheduler.running[1])
    engine.knows(base_ms=5.0, row_ms=0.5, token_ms=0.5)

    engine.submit("newcomer", Tier.STANDARD, prompt=200)

    assert engine.step() == {"stream": 1, "newcomer": tokens}


def test_flex_pauses_where_a_step_with_it_would_break_a_promised_gap() -> None:
    """Two rows and the smallest chunk fit into 0.95 * 20 / 1.2 ms.

    The third row does not, and keeps its blocks for a later step.
    """
    engine = Engine()
    engine.submit("priority", Tier.PRIORITY, itl_ms=20)
    engine.submit("flex", Tier.FLEX)
    engine.submit("other flex", Tier.FLEX)
    engine.step()
    engine.step()
    engine.knows(base_ms=1.0, row_ms=5.0, token_ms=0.25)

    assert engine.step() == {"priority": 1, "flex": 1}
    assert len(engine.scheduler.running) == 3


def test_two_backlogged_tenants_share_by_their_weights() -> None:
    """Three to one, within twice the larger of a prompt and the answers under way."""
    engine = Engine(rows_max=2, batch_tokens_max=16)
    for number in range(200):
        engine.submit(f"a{number}", Tier.STANDARD, tenant=1, weight=3, prompt=8, answer=4)
        engine.submit(f"b{number}", Tier.STANDARD, tenant=2, weight=1, prompt=8, answer=4)

    while engine.scheduler.queues[Tier.STANDARD.rank].backlogged == [1, 2]:
        engine.step()

    served = {letter: sum(str(n)[0] == letter for n in engine.ended) for letter in "ab"}
    tokens = 8 + 2 * 3
    bound = 2 * max(8, 2 * 2 * 4)
    assert abs(served["a"] * tokens / 3 - served["b"] * tokens) <= bound


def test_a_tenant_gains_no_credit_for_having_been_idle() -> None:
    """It comes when the other has been served for long, and takes turns with it from there."""
    engine = Engine(rows_max=1)
    for number in range(60):
        engine.submit(f"busy {number}", Tier.STANDARD, tenant=1, answer=1)
    for _ in range(40):
        engine.step()

    for number in range(10):
        engine.submit(f"idle {number}", Tier.STANDARD, tenant=2, answer=1)
    before = len(engine.ended)
    for _ in range(10):
        engine.step()

    came = [str(name).split()[0] for name in engine.ended[before:]]
    assert came.count("idle") == 5
    assert came.count("busy") == 5


def test_what_a_preempted_tenant_computes_again_is_not_held_against_it() -> None:
    engine = Engine(rows_max=1)
    engine.submit("flex", Tier.FLEX, tenant=7, prompt=6, answer=3)
    engine.step()
    queue = engine.scheduler.queues[Tier.FLEX.rank]
    charged = queue.counter(7)

    engine.submit("priority", Tier.PRIORITY, answer=1)
    engine.now_ms += TTFT_MS[Tier.PRIORITY] / 4
    engine.step()
    engine.step()

    assert engine.scheduler.recomputed_tokens == 2
    assert queue.counter(7) == charged + 2  # The one token of its answer that is new.


def test_prompt_tokens_that_stay_resident_are_counted_once() -> None:
    """Two full blocks of ten tokens are written; whoever shares them writes nothing of them."""
    engine = Engine(batch_tokens_max=16)
    first = engine.submit("same", Tier.STANDARD, prompt=10)
    engine.step()
    second = Job("again", [1] * 10, PrefixChain(b"same", BLOCK_TOKENS))
    engine.answers_left[second] = 5
    engine.scheduler.add(second)

    engine.step()

    assert (first.num_written, second.num_resident, second.num_written) == (8, 8, 0)
