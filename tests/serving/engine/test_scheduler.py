"""
The scheduler, without an engine: a step is arithmetic, so the tests do arithmetic.

The examples state each promise once; tests/simulation plays thousands of random arrivals.
"""

from typing import Any

from headrace.serving.engine.prefix_cache import PrefixChain
from headrace.serving.engine.scheduler import Job, Plan, Scheduler
from headrace.serving.testing.scripted_engine import tiny_limits

BLOCK_TOKENS = 4


def scheduler(*, prefill_tokens_max: int | None = None, **changes: int) -> Scheduler[Job]:
    """A small engine: 8 tokens a step, 4 rows, 8 blocks of 4 tokens."""
    small: dict[str, Any] = {"rows_max": 4, "batch_tokens_max": 8, "kv_blocks": 9, "vocab": 1000}
    limits = tiny_limits(**(small | {"sequence_tokens_max": 32} | changes))
    return Scheduler(limits, prefill_tokens_max=prefill_tokens_max)


def job(name: str, num_tokens: int, *, prefix: str = "", salt: bytes = b"") -> Job:
    """A prompt of its own, but for the tokens that `prefix` names: one for each character."""
    tokens = [ord(character) for character in prefix]
    tokens += [100 + ord(name) + index for index in range(num_tokens - len(tokens))]
    return Job(name, tokens, PrefixChain(salt, BLOCK_TOKENS))


def run(schedule: Scheduler[Job]) -> Plan[Job]:
    """Plan one step and pretend the engine ran it; whoever has nothing pending samples a token."""
    plan = schedule.plan()
    for granted, num_tokens in plan.grants:
        schedule.advance(granted, num_tokens)
        if granted.num_pending == 0:
            granted.token_ids.append(900 + len(granted.token_ids))
    schedule.check()
    return plan


def granted(plan: Plan[Job]) -> dict[object, int]:
    return {each.key: num_tokens for each, num_tokens in plan.grants}


def test_a_long_prompt_is_cut_to_the_token_budget() -> None:
    """A 20-token prompt takes 8, 8 and 4 tokens, then decodes one by one."""
    schedule = scheduler()
    schedule.add(job("a", 20))

    steps = [granted(run(schedule)) for _ in range(5)]

    assert steps == [{"a": 8}, {"a": 8}, {"a": 4}, {"a": 1}, {"a": 1}]


def test_a_new_prompt_never_stalls_a_running_stream() -> None:
    """A stream keeps its token each step while a newcomer's prompt is chunked in."""
    schedule = scheduler()
    schedule.add(job("a", 4))
    run(schedule)

    schedule.add(job("b", 15))

    assert granted(run(schedule)) == {"a": 1, "b": 7}
    assert granted(run(schedule)) == {"a": 1, "b": 7}
    assert granted(run(schedule)) == {"a": 1, "b": 1}


def test_an_older_prompt_does_not_stall_a_younger_stream() -> None:
    """The older one has a long prompt to compute; the younger decodes all the while."""
    schedule = scheduler(kv_blocks=20)
    schedule.add(job("a", 16))
    schedule.add(job("b", 6))
    assert granted(run(schedule)) == {"a": 8}
    assert granted(run(schedule)) == {"a": 8}
    assert granted(run(schedule)) == {"a": 1, "b": 6}
    schedule.add(job("c", 16))
    assert granted(run(schedule)) == {"a": 1, "b": 1, "c": 6}

    assert granted(run(schedule)) == {"a": 1, "b": 1, "c": 6}


def test_prompts_get_a_smaller_share_of_a_step_in_which_others_decode() -> None:
    """Two tokens of prompts beside each stream's token, the whole batch when nothing decodes."""
    schedule = scheduler(prefill_tokens_max=2)
    schedule.add(job("a", 8))
    assert granted(run(schedule)) == {"a": 8}

    schedule.add(job("b", 3))
    schedule.add(job("c", 3))

    assert granted(run(schedule)) == {"a": 1, "b": 2}
    assert granted(run(schedule)) == {"a": 1, "b": 1, "c": 2}


def crowded() -> tuple[Scheduler[Job], Job, Job]:
    """Two streams hold all 6 blocks, and the next step takes both into a new block."""
    schedule = scheduler(kv_blocks=7, batch_tokens_max=16, rows_max=2)
    schedule.add(old := job("a", 8))
    schedule.add(young := job("b", 8))
    assert granted(run(schedule)) == {"a": 8, "b": 8}
    for _ in range(4):
        assert granted(run(schedule)) == {"a": 1, "b": 1}
    return schedule, old, young


def test_out_of_blocks_preempts_the_youngest() -> None:
    """When the pool runs dry the youngest starts over later; the oldest goes on."""
    schedule, old, young = crowded()

    plan = run(schedule)

    assert granted(plan) == {"a": 1}
    assert plan.preempted == [young]
    assert (young.num_computed, young.block_ids) == (0, [])
    assert (schedule.running, schedule.waiting) == ([old], [young])
    assert schedule.preemptions == 1


def test_what_a_preempted_job_computes_again_is_counted() -> None:
    """It had computed 12 tokens; "a" took the last of its blocks, the first 8 are resident."""
    schedule, old, young = crowded()
    run(schedule)
    schedule.remove(old)

    plan = run(schedule)

    assert granted(plan) == {"b": 5}  # Tokens 9 to 13; the last was never computed before.
    assert young.num_computed == 13
    assert schedule.recomputed_tokens == 4


def test_a_preempted_job_comes_back_before_later_arrivals() -> None:
    schedule, old, _ = crowded()
    schedule.add(job("c", 1))
    run(schedule)

    assert [each.key for each in schedule.waiting] == ["b", "c"]
    schedule.remove(old)
    assert granted(run(schedule)) == {"b": 5, "c": 1}


def test_blocks_as_long_as_a_sequence_serve_as_many_jobs_as_there_are() -> None:
    """No block is kept free for a job that can never need a second one."""
    schedule = scheduler(rows_max=4, kv_blocks=5, kv_block_tokens=40)
    for name in "abcd":
        schedule.add(Job(name, [1, 2], PrefixChain(b"", 40)))

    assert granted(run(schedule)) == {"a": 2, "b": 2, "c": 2, "d": 2}


def test_a_prompt_that_does_not_fit_yet_is_not_overtaken() -> None:
    """The small one behind it would fit, again and again; the large one would starve."""
    schedule = scheduler(kv_blocks=7, batch_tokens_max=24)
    schedule.add(first := job("a", 12))
    run(schedule)
    schedule.add(job("b", 20))
    schedule.add(job("c", 1))

    assert granted(run(schedule)) == {"a": 1}
    schedule.remove(first)
    assert granted(run(schedule)) == {"b": 20}


def test_an_equal_prefix_is_not_computed_twice() -> None:
    """Two full blocks of "b" are what "a" left behind; its last tokens are its own."""
    schedule = scheduler(batch_tokens_max=16)
    schedule.add(first := job("a", 10, prefix="shared!!"))
    run(schedule)
    schedule.remove(first)

    schedule.add(second := job("b", 10, prefix="shared!!"))

    assert granted(run(schedule)) == {"b": 2}
    assert second.num_resident == 8


def test_an_equal_prefix_of_another_tenant_is_computed() -> None:
    schedule = scheduler(batch_tokens_max=16)
    schedule.add(job("a", 10, prefix="shared!!", salt=b"tenant-a"))
    run(schedule)

    schedule.add(second := job("b", 10, prefix="shared!!", salt=b"tenant-b"))

    assert granted(run(schedule))["b"] == 10
    assert second.num_resident == 0


def test_the_last_token_of_a_prompt_is_always_computed() -> None:
    """Its logits are what the first token is sampled from, and no cache keeps logits."""
    schedule = scheduler(batch_tokens_max=16)
    schedule.add(first := job("a", 8, prefix="shared!!"))
    run(schedule)
    schedule.remove(first)

    schedule.add(second := job("b", 8, prefix="shared!!"))

    assert granted(run(schedule)) == {"b": 4}
    assert second.num_resident == 4


def test_an_answer_is_a_prefix_of_the_next_turn() -> None:
    """A chat sends back what was answered: its blocks are resident as well."""
    schedule = scheduler(batch_tokens_max=16)
    schedule.add(first := job("a", 4))
    for _ in range(5):
        run(schedule)
    schedule.remove(first)

    second = Job("b", [*first.token_ids, 5], PrefixChain(b"", BLOCK_TOKENS))
    schedule.add(second)
    run(schedule)

    assert second.num_resident == 8


def test_choices_of_one_request_share_the_prefill() -> None:
    """Four equal prompts at once: the first computes, the others wait a step and find it."""
    schedule = scheduler(batch_tokens_max=16, kv_blocks=20)
    for name in "abcd":
        schedule.add(job(name, 10, prefix="0123456789"))

    assert granted(run(schedule)) == {"a": 10}
    assert granted(run(schedule)) == {"a": 1, "b": 2, "c": 2, "d": 2}


def test_others_are_admitted_past_a_prompt_that_waits_for_a_prefix() -> None:
    schedule = scheduler(kv_blocks=40, batch_tokens_max=12)
    schedule.add(job("a", 20, prefix="x" * 20))
    schedule.add(job("b", 20, prefix="x" * 20))
    schedule.add(job("c", 3))
    assert granted(run(schedule)) == {"a": 12}

    assert granted(run(schedule)) == {"a": 8, "c": 3}
    assert granted(run(schedule)) == {"a": 1, "b": 4, "c": 1}


def test_removing_a_job_that_computes_a_prefix_frees_those_who_wait_for_it() -> None:
    schedule = scheduler(kv_blocks=20)
    schedule.add(first := job("a", 12, prefix="x" * 12))
    schedule.add(job("b", 12, prefix="x" * 12))
    run(schedule)

    schedule.remove(first)

    assert granted(run(schedule)) == {"b": 4}  # Two blocks of "a" were complete.


def test_a_resumed_job_counts_as_recomputation() -> None:
    schedule = scheduler(batch_tokens_max=16)
    tokens = list(range(1, 7))
    schedule.add(Job("a", tokens, PrefixChain(b"", BLOCK_TOKENS), computed_once=6))

    run(schedule)
    run(schedule)

    assert schedule.recomputed_tokens == 6


def test_nobody_is_planned_when_there_is_nobody() -> None:
    plan = scheduler().plan()

    assert (plan.grants, plan.preempted) == ([], [])
