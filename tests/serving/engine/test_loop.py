"""
The loop that owns an engine: what a caller is told, when, and how everything ends.

The engine is scripted and the sampler greedy. Most tests turn the loop by hand; those of the
thread start it and wait for reports.
"""

import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest

from headrace.serving.clock import SystemClock
from headrace.serving.domain.request import (
    Delta,
    FinishReason,
    Grammar,
    GrammarKind,
    Sampling,
    SequenceSpec,
)
from headrace.serving.domain.tier import Promise, Tier
from headrace.serving.engine.base import Limits
from headrace.serving.engine.loop import EngineLoop, StepReport
from headrace.serving.errors import (
    Draining,
    EngineFault,
    InvalidRequest,
    InvalidSchema,
    Overloaded,
    PromptTooLong,
)
from headrace.serving.testing.clock import ManualClock
from headrace.serving.testing.greedy_sampler import GreedySampler
from headrace.serving.testing.scripted_engine import ScriptedEngine, scripted, tiny_limits
from headrace.serving.testing.tiny_tokenizer import tiny_manifest, tiny_tokenizer

TINY = tiny_tokenizer()
EOS = 0
WAIT_S = 10
"""Only a broken loop is waited for this long."""


def tokens(text: str) -> list[int]:
    return TINY.encode_text(text)


PROMPT = tokens("say it")
X, Y = tokens("x")[0], tokens("y")[0]


def spec(prompt: list[int] = PROMPT, **rules: Any) -> SequenceSpec:
    outer = {
        name: rules.pop(name) for name in ("resume_ids", "deadline_ms", "promise") if name in rules
    }
    return SequenceSpec(
        prompt_ids=prompt, sampling=Sampling(**({"max_tokens": 100} | rules)), **outer
    )


class Replica:
    """A loop on a scripted engine, turned by hand, and everything it has said."""

    def __init__(
        self, answer: list[int] | None = None, *, waiting_max: int = 8, **limits: int
    ) -> None:
        shape: Limits = tiny_limits(vocab=TINY.vocab_size, **limits)
        answers = {} if answer is None else {tuple(PROMPT): answer}
        self.engine = ScriptedEngine(shape, scripted(answers, otherwise=EOS if answer else X))
        self.sampler = GreedySampler()
        self.clock = ManualClock()
        self.reports: list[StepReport] = []
        self.loop = EngineLoop(
            self.engine,
            self.sampler,
            TINY,
            tiny_manifest(TINY.vocab_size),
            clock=self.clock,
            sink=self.reports.append,
            waiting_max=waiting_max,
        )

    def answers(self, sequence: SequenceSpec) -> "Replica":
        """Run one sequence to its end."""
        self.loop.submit("key", sequence)
        self.finishes()
        return self

    def finishes(self) -> None:
        """Turn until nothing is left; grammars compile on their own thread meanwhile."""
        while self.loop.load().running or self.loop.load().waiting:
            if not self.loop.turn():
                self.loop._intake.wait()

    def deltas(self, key: object = "key") -> list[Delta]:
        return [delta for report in self.reports for name, delta, _ in report.deltas if name == key]

    def text(self, key: object = "key") -> str:
        return "".join(delta.text for delta in self.deltas(key))

    def tokens(self, key: object = "key") -> list[int]:
        return [token_id for delta in self.deltas(key) for token_id in delta.token_ids]

    def finish(self, key: object = "key") -> FinishReason | None:
        *before, last = [delta.finish for delta in self.deltas(key)]
        assert not any(before), "a delta came after the last one"
        return last


# How an answer ends.


def test_an_answer_ends_at_the_end_of_sequence_token() -> None:
    """The token is delivered and counted like any other, but it has no text."""
    replica = Replica([*tokens("hello"), EOS]).answers(spec())

    assert (replica.text(), replica.finish()) == ("hello", FinishReason.STOP)
    assert replica.tokens() == [*tokens("hello"), EOS]


def test_an_answer_may_go_on_past_the_end_of_sequence_token() -> None:
    replica = Replica([X, EOS, Y, X]).answers(spec(ignore_eos=True, max_tokens=3))

    assert (replica.text(), replica.finish()) == ("xy", FinishReason.LENGTH)


def test_a_stop_token_ends_the_answer_without_its_text() -> None:
    replica = Replica([X, Y, X]).answers(spec(stop_token_ids=[Y]))

    assert (replica.text(), replica.finish()) == ("x", FinishReason.STOP)
    assert replica.tokens() == [X, Y]


def test_a_stop_string_ends_the_answer_across_tokens() -> None:
    """Nothing of it is sent, though its first half was in a token of its own."""
    replica = Replica([*tokens("one"), *tokens(" st"), *tokens("op two")]).answers(
        spec(stop=["stop"])
    )

    assert (replica.text(), replica.finish()) == ("one ", FinishReason.STOP)


def test_what_might_have_been_a_stop_string_is_sent_at_the_end() -> None:
    replica = Replica(tokens("one sto")).answers(spec(stop=["stop"]))

    assert (replica.text(), replica.finish()) == ("one sto", FinishReason.STOP)


def test_an_answer_ends_at_max_tokens() -> None:
    replica = Replica().answers(spec(max_tokens=3))

    assert (replica.text(), replica.finish()) == ("xxx", FinishReason.LENGTH)


def test_an_answer_ends_where_the_context_ends() -> None:
    replica = Replica(sequence_tokens_max=len(PROMPT) + 2).answers(spec())

    assert (replica.text(), replica.finish()) == ("xx", FinishReason.LENGTH)


def test_nothing_ends_an_answer_below_min_tokens() -> None:
    """The end-of-sequence token is the likeliest throughout; it is not allowed before its time."""
    replica = Replica([EOS] * 9).answers(spec(min_tokens=3))

    assert len(replica.tokens()) == 4
    assert replica.tokens()[3] == EOS
    assert EOS not in replica.tokens()[:3]


def test_logprobs_come_only_when_asked_for() -> None:
    replica = Replica([X, EOS]).answers(spec())

    assert all(delta.logprobs == () for delta in replica.deltas())


# What an answer costs.


def test_the_first_delta_says_how_much_of_the_prompt_was_resident() -> None:
    """Seven full blocks of the 30 tokens are found; the rest is computed."""
    replica = Replica(sequence_tokens_max=64)
    prompt = list(range(10, 40))
    replica.answers(spec(prompt, max_tokens=2))

    replica.loop.submit("again", spec(prompt, max_tokens=2))
    replica.finishes()

    assert [delta.cached_tokens for delta in replica.deltas("key")] == [0, 0]
    assert [delta.cached_tokens for delta in replica.deltas("again")] == [28, 0]


def test_counters_add_up_to_what_was_delivered() -> None:
    replica = Replica(sequence_tokens_max=64)
    prompt = list(range(10, 40))
    for key in range(3):
        replica.loop.submit(key, spec(prompt, max_tokens=5))
        replica.finishes()

    load = replica.loop.load()

    assert load.prompt_tokens_total == 90
    assert load.cached_tokens_total == 56
    assert load.completion_tokens_total == 15
    assert load.recomputed_tokens_total == 0


def test_a_sequence_cancelled_before_its_first_token_counts_nothing() -> None:
    replica = Replica(batch_tokens_max=4)
    replica.loop.submit("key", spec(list(range(10, 30))))
    replica.loop.turn()

    replica.loop.abort("key")
    replica.loop.turn()

    assert replica.finish() is FinishReason.CANCELLED
    assert replica.loop.load().prompt_tokens_total == 0


def test_the_wait_for_the_engine_is_told_once() -> None:
    replica = Replica()
    replica.loop.submit("key", spec(max_tokens=2))
    replica.clock.advance(ms=30)
    replica.finishes()

    waits = [wait for report in replica.reports for _, _, wait in report.deltas]

    assert waits == [30, None]


# Resume.


def test_a_resumed_sequence_continues_where_it_was() -> None:
    """Half a character and half a stop string were pending when the first replica died."""
    answer = [*tokens("a \u20ac sto"), *tokens("p x"), EOS]
    whole = Replica(answer).answers(spec(stop=["stop"]))

    for delivered in range(1, len(whole.tokens())):
        first = "".join(delta.text for delta in whole.deltas()[:delivered])
        rest = Replica(answer).answers(spec(stop=["stop"], resume_ids=answer[:delivered]))
        assert first + rest.text() == whole.text() == "a \u20ac "
        assert answer[:delivered] + rest.tokens() == whole.tokens()


def test_resumed_tokens_count_towards_max_tokens_and_are_never_charged() -> None:
    replica = Replica().answers(spec(max_tokens=5, resume_ids=[X, X, X]))

    assert replica.tokens() == [X, X]
    load = replica.loop.load()
    assert load.completion_tokens_total == 2
    assert load.prompt_tokens_total == 0
    assert load.recomputed_tokens_total == len(PROMPT) + 3


@pytest.mark.parametrize(
    ("rules", "finish"),
    [
        pytest.param({"max_tokens": 2}, FinishReason.LENGTH, id="max_tokens was reached"),
        pytest.param({"stop": ["xx"]}, FinishReason.STOP, id="a stop string was complete"),
        pytest.param({"stop_token_ids": [X]}, FinishReason.STOP, id="a stop token was last"),
    ],
)
def test_a_resumed_sequence_that_had_ended_just_ends(
    rules: dict[str, Any], finish: FinishReason
) -> None:
    replica = Replica().answers(spec(resume_ids=[X, X], **rules))

    assert replica.deltas() == [Delta(finish=finish)]
    assert replica.engine.steps == []


def test_a_resumed_grammar_continues_where_it_was() -> None:
    grammar = Grammar(GrammarKind.CHOICE, '["xxy"]')
    replica = Replica().answers(spec(grammar=grammar, resume_ids=[X, X]))

    assert (replica.text(), replica.finish()) == ("y", FinishReason.STOP)


# Grammars.


def test_a_grammar_decides_what_the_model_may_say() -> None:
    """The model only ever wants "x"."""
    grammar = Grammar(GrammarKind.JSON_SCHEMA, '{"type": "object", "properties": {"x": {"type": '
                      '"string", "maxLength": 3}}, "required": ["x"], "additionalProperties": '
                      'false}')  # fmt: skip
    replica = Replica().answers(spec(grammar=grammar, ignore_eos=True, min_tokens=50))

    assert (replica.text(), replica.finish()) == ('{"x": "xxx"}', FinishReason.STOP)


def test_a_grammar_that_cannot_be_compiled_ends_only_its_own_sequence() -> None:
    replica = Replica()
    replica.loop.submit("bad", spec(grammar=Grammar(GrammarKind.REGEX, "(")))
    replica.loop.submit("good", spec(max_tokens=2))
    replica.finishes()

    assert replica.finish("bad") is FinishReason.ERROR
    assert isinstance(replica.deltas("bad")[0].error, InvalidSchema)
    assert replica.finish("good") is FinishReason.LENGTH


def test_a_sequence_may_be_cancelled_while_its_grammar_compiles() -> None:
    replica = Replica()
    replica.loop.submit("key", spec(grammar=Grammar(GrammarKind.REGEX, "x{1000}")))
    replica.loop.abort("key")
    replica.finishes()
    replica.loop.stop()

    assert replica.finish() is FinishReason.CANCELLED
    assert replica.engine.steps == []


# Cancellation, deadlines, bounds.


def test_cancellation_reaches_the_engine_within_one_step() -> None:
    replica = Replica()
    replica.loop.submit("key", spec())
    replica.loop.submit("other", spec())
    for _ in range(3):
        replica.loop.turn()

    replica.loop.abort("key")
    replica.loop.turn()

    assert replica.finish() is FinishReason.CANCELLED
    assert len(replica.engine.steps[-2]) == 2
    assert len(replica.engine.steps[-1]) == 1


def test_cancelling_twice_or_in_vain_changes_nothing() -> None:
    replica = Replica()
    replica.loop.submit("key", spec())
    replica.loop.abort("key")
    replica.loop.abort("key")
    replica.loop.abort("nobody")
    replica.finishes()

    assert [delta.finish for delta in replica.deltas()] == [FinishReason.CANCELLED]
    assert replica.engine.steps == []


def test_a_deadline_ends_a_running_sequence_and_keeps_its_text() -> None:
    """The "x" was held back, as it might have become the stop string."""
    replica = Replica()
    replica.loop.submit(
        "key", spec(deadline_ms=replica.clock.now_ms + 50, stop=["xy"], max_tokens=100)
    )
    replica.loop.turn()
    replica.loop.turn()
    replica.clock.advance(ms=50)
    replica.loop.turn()

    assert (replica.text(), replica.finish()) == ("xx", FinishReason.DEADLINE)


def test_a_deadline_that_has_passed_costs_no_step() -> None:
    replica = Replica().answers(spec(deadline_ms=0.0))

    assert replica.deltas() == [Delta(finish=FinishReason.DEADLINE)]
    assert replica.engine.steps == []


def test_deadlines_hold_in_the_queue_too() -> None:
    replica = Replica(rows_max=1)
    replica.loop.submit("runs", spec(max_tokens=9))
    replica.loop.submit("waits", spec(deadline_ms=replica.clock.now_ms + 5))
    replica.loop.turn()
    replica.clock.advance(ms=5)
    replica.loop.turn()

    assert replica.finish("waits") is FinishReason.DEADLINE
    assert replica.finish("runs") is None


def test_a_full_loop_refuses_and_says_when_to_retry() -> None:
    replica = Replica(rows_max=2, waiting_max=1)
    for key in range(3):
        replica.loop.submit(key, spec())

    with pytest.raises(Overloaded) as refusal:
        replica.loop.submit(3, spec())

    assert refusal.value.retry_after_ms is not None


@pytest.mark.parametrize(
    ("sequence", "error"),
    [
        pytest.param(spec([]), InvalidRequest, id="an empty prompt"),
        pytest.param(spec([5] * 256), PromptTooLong, id="no room for a single token"),
        pytest.param(spec([TINY.vocab_size]), InvalidRequest, id="an id past the vocabulary"),
        pytest.param(spec([-1]), InvalidRequest, id="an id below zero"),
        pytest.param(spec(stop_token_ids=[99_999]), InvalidRequest, id="an unknown stop token"),
        pytest.param(spec(logit_bias={99_999: 1.0}), InvalidRequest, id="an unknown biased token"),
    ],
)
def test_what_can_never_run_is_refused_at_once(
    sequence: SequenceSpec, error: type[Exception]
) -> None:
    replica = Replica()

    with pytest.raises(error):
        replica.loop.submit("key", sequence)

    assert not replica.loop.turn()


def test_a_sequence_larger_than_the_pool_is_refused() -> None:
    """Seven blocks of four tokens: nobody could ever preempt enough for more."""
    replica = Replica(kv_blocks=8)

    with pytest.raises(PromptTooLong):
        replica.loop.submit("key", spec([5] * 28))


def test_an_idle_loop_does_nothing() -> None:
    replica = Replica()

    assert not replica.loop.turn()
    assert replica.reports == []


def test_the_load_says_what_a_router_needs() -> None:
    replica = Replica(rows_max=1, batch_tokens_max=4)
    replica.loop.submit("runs", spec(list(range(10, 20))))
    replica.loop.submit("waits", spec(list(range(50, 60))))
    replica.loop.turn()

    load = replica.reports[-1].load

    assert (load.running, load.waiting, load.pending_tokens) == (1, 1, 6 + 10)
    assert (load.step_rows, load.step_tokens, load.rows_max) == (1, 4, 1)
    assert (load.kv_blocks_free, load.kv_blocks_total) == (125, 128)


# Faults, drain, stop.


def test_an_engine_fault_ends_every_sequence_and_the_loop() -> None:
    replica = Replica(rows_max=1)
    replica.engine.fault_at_step = 2
    replica.loop.submit("runs", spec())
    replica.loop.submit("waits", spec())
    for _ in range(5):
        replica.loop.turn()

    assert not replica.loop.healthy
    for key in ("runs", "waits"):
        assert replica.finish(key) is FinishReason.ERROR
        assert isinstance(replica.deltas(key)[-1].error, EngineFault)
    with pytest.raises(EngineFault):
        replica.loop.submit("late", spec())


@pytest.mark.parametrize("step", range(5))
def test_whatever_step_fails_what_was_delivered_stands(step: int) -> None:
    replica = Replica()
    replica.engine.fault_at_step = step
    replica.loop.submit("key", spec())
    while replica.loop.turn():
        pass

    assert replica.tokens() == [X] * step
    assert replica.loop.load().completion_tokens_total == len(replica.tokens())


def test_a_cancellation_in_the_failing_turn_is_still_told() -> None:
    replica = Replica()
    replica.loop.submit("key", spec())
    replica.loop.submit("other", spec())
    replica.loop.turn()
    replica.engine.fault_at_step = 0
    replica.loop.abort("key")
    replica.loop.turn()

    assert replica.finish("key") is FinishReason.CANCELLED
    assert replica.finish("other") is FinishReason.ERROR


def test_a_bug_in_the_sampler_is_told_as_a_fault() -> None:
    replica = Replica()

    def sample(*_: object) -> list[Any]:
        raise ZeroDivisionError

    replica.sampler.sample = sample
    replica.loop.submit("key", spec())
    replica.loop.turn()

    assert isinstance(replica.deltas()[-1].error, EngineFault)


def test_a_draining_loop_finishes_what_it_has() -> None:
    replica = Replica()
    replica.loop.submit("key", spec(max_tokens=3))

    replica.loop.drain()

    with pytest.raises(Draining):
        replica.loop.submit("late", spec())
    replica.finishes()
    assert replica.text() == "xxx"
    assert replica.loop.load().draining


def test_a_stopped_loop_tells_everyone_and_closes_the_engine() -> None:
    replica = Replica()
    replica.loop.submit("key", spec())
    replica.loop.turn()

    replica.loop.stop()
    replica.loop.stop()

    assert replica.finish() is FinishReason.ERROR
    assert isinstance(replica.deltas()[-1].error, Draining)
    assert replica.engine.is_closed
    assert replica.sampler.is_closed
    with pytest.raises(Draining):
        replica.loop.submit("late", spec())


# The thread.


class Threaded:
    """A loop on its own thread; reports come through a queue."""

    def __init__(self, before_step: Callable[[], None] = lambda: None) -> None:
        limits = replace(tiny_limits(vocab=TINY.vocab_size), sequence_tokens_max=200)
        self.engine = ScriptedEngine(limits, scripted({}, otherwise=X))
        step = self.engine.step

        def observed(rows: Any) -> Any:
            before_step()
            return step(rows)

        self.engine.step = observed
        self.reports: queue.Queue[StepReport] = queue.Queue()
        self.loop = EngineLoop(
            self.engine,
            GreedySampler(),
            TINY,
            tiny_manifest(TINY.vocab_size),
            clock=SystemClock(),
            sink=self.reports.put,
        )
        self.loop.start()

    def until_finished(self, *keys: object) -> dict[object, FinishReason]:
        finishes: dict[object, FinishReason] = {}
        while not finishes.keys() >= set(keys):
            for key, delta, _ in self.reports.get(timeout=WAIT_S).deltas:
                if delta.finish is not None:
                    finishes[key] = delta.finish
        return finishes


def test_many_threads_may_submit_and_cancel() -> None:
    threaded = Threaded()

    def caller(number: int) -> None:
        for index in range(10):
            threaded.loop.submit((number, index), spec(max_tokens=5))
            threaded.loop.abort((number, index - 3))

    callers = [threading.Thread(target=caller, args=(number,)) for number in range(4)]
    for each in callers:
        each.start()
    for each in callers:
        each.join()

    keys = [(number, index) for number in range(4) for index in range(10)]
    finishes = threaded.until_finished(*keys)
    threaded.loop.stop()

    assert set(finishes.values()) <= {FinishReason.LENGTH, FinishReason.CANCELLED}
    assert all(finishes[number, 9] is FinishReason.LENGTH for number in range(4))


def test_an_idle_thread_sleeps_and_wakes_for_work() -> None:
    threaded = Threaded()
    threaded.loop.submit("first", spec(max_tokens=2))
    threaded.until_finished("first")

    threaded.loop.submit("second", spec(max_tokens=2, grammar=Grammar(GrammarKind.REGEX, "x*")))
    finishes = threaded.until_finished("second")
    threaded.loop.stop()

    assert finishes == {"second": FinishReason.LENGTH}
    assert threaded.reports.empty()
    assert threaded.loop.times.steps == 4


def test_a_cancellation_during_a_step_takes_effect_before_the_next_one() -> None:
    in_step, may_go_on = threading.Event(), threading.Event()

    def before_step() -> None:
        in_step.set()
        assert may_go_on.wait(WAIT_S)

    threaded = Threaded(before_step)
    threaded.loop.submit("key", spec())
    assert in_step.wait(WAIT_S)
    threaded.loop.abort("key")
    may_go_on.set()
    finishes = threaded.until_finished("key")
    threaded.loop.stop()

    assert finishes == {"key": FinishReason.CANCELLED}
    assert len(threaded.engine.steps) == 1


def test_stopping_a_busy_thread_leaves_nothing_behind() -> None:
    threaded = Threaded()
    threaded.loop.submit("key", spec(max_tokens=150))

    threaded.loop.stop()

    assert threaded.until_finished("key")
    assert threaded.engine.is_closed
    assert not any(each.name == "engine-loop" for each in threading.enumerate())


# Tiers.


def test_a_flood_of_flex_does_not_keep_the_others_out() -> None:
    """Of 4 rows and 8 waiting places flex takes the rows and half the places, standard the rest.

    Two more are for the strong tiers.
    """
    replica = Replica(waiting_max=8)
    taken: dict[Tier, int] = {}
    for tier in (Tier.BATCH, Tier.FLEX, Tier.STANDARD, Tier.PRIORITY, Tier.RESERVED):
        taken[tier] = 0
        with suppress(Overloaded):
            while taken[tier] < 100:
                replica.loop.submit((tier, taken[tier]), spec(promise=Promise(tier=tier)))
                taken[tier] += 1

    assert list(taken.values()) == [8, 0, 4, 2, 0]


def test_the_load_says_what_waits_in_which_tier() -> None:
    """A row for priority; the batch request of 6 tokens waits."""
    replica = Replica(rows_max=1)
    replica.loop.submit("batch", spec([X] * 6, promise=Promise(tier=Tier.BATCH)))
    replica.loop.submit("priority", spec(promise=Promise(tier=Tier.PRIORITY)))
    replica.loop.turn()

    load = replica.reports[-1].load
    assert load.tiers.keys() == {Tier.BATCH}
    queue = load.tiers[Tier.BATCH]
    assert (queue.waiting, queue.pending_tokens, queue.ahead_tokens) == (1, 6, 6)
    assert load.prompt_tokens_per_s > 0


def test_a_reserved_answer_holds_its_blocks_from_the_start() -> None:
    """6 tokens of prompt and 10 of answer are 4 blocks of 4."""
    replica = Replica()
    free = replica.loop.load().kv_blocks_free
    sampling = spec([X] * 6, max_tokens=10, promise=Promise(tier=Tier.RESERVED))
    replica.loop.submit("reserved", sampling)
    replica.loop.turn()

    assert replica.loop.load().kv_blocks_free == free - 4


def test_the_loop_learns_how_long_its_steps_take() -> None:
    replica = Replica()
    step = replica.engine.step

    def slow(rows: Any) -> Any:
        replica.clock.advance(ms=70)
        return step(rows)

    replica.engine.step = slow  # pyright: ignore[reportAttributeAccessIssue]
    replica.answers(spec())

    assert replica.loop._scheduler.times.ms(1, 0) == pytest.approx(70, rel=0.05)


def test_the_first_delta_says_what_was_written_to_the_cache() -> None:
    """Two of three blocks are full; the same prompt again writes nothing."""
    replica = Replica()
    for key in ("first", "second"):
        replica.loop.submit(key, spec([X] * 11, max_tokens=3))
        replica.finishes()

    written = [delta.cache_write_tokens for delta in replica.deltas("first")]
    assert written == [8, 0, 0]
    assert [delta.cached_tokens for delta in replica.deltas("second")] == [8, 0, 0]
    assert not any(delta.cache_write_tokens for delta in replica.deltas("second"))
    assert replica.loop.load().cache_write_tokens_total == 8
