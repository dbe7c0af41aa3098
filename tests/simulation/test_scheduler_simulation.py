"""
The engine loop under random load, on an engine that notices every mistake with its KV blocks.

Thousands of turns of arrivals, tiers, equal prefixes, cancellations, deadlines, resumed sequences
and too small a pool. The scripted engine answers from what it reads back from the blocks, so a
wrongly shared, lost or stale block changes an answer; the expected answers are worked out without
it. A failure prints its seed.
"""

import random
from dataclasses import dataclass, field
from itertools import chain

import pytest

from headrace.serving.domain.request import Delta, FinishReason, Sampling, SequenceSpec
from headrace.serving.domain.tier import Promise, Tier
from headrace.serving.engine.base import Limits
from headrace.serving.engine.loop import EngineLoop, StepReport
from headrace.serving.errors import Overloaded
from headrace.serving.testing.clock import ManualClock
from headrace.serving.testing.greedy_sampler import GreedySampler
from headrace.serving.testing.scripted_engine import ScriptedEngine, chained, tiny_limits
from headrace.serving.testing.tiny_tokenizer import tiny_manifest, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
VOCAB = TOKENIZER.vocab_size
MANIFEST = tiny_manifest(VOCAB)
EOS = MANIFEST.eos_token_ids[0]
RULE = chained(VOCAB)

ARRIVALS = 120
WAIT_STEPS_MAX = 4_000
"""No simulated sequence, however crowded the engine, may need more steps."""


@dataclass
class Submitted:
    spec: SequenceSpec
    expected: list[int]
    finish: FinishReason
    at_step: int
    is_aborted: bool = False
    deltas: list[Delta] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return [token for delta in self.deltas for token in delta.token_ids]


def answer(
    prompt: list[int], *, max_tokens: int, tokens_max: int
) -> tuple[list[int], FinishReason]:
    """What the engine's rule makes of a prompt, without an engine."""
    context, tokens = list(prompt), []
    while True:
        token = RULE(context)
        context.append(token)
        tokens.append(token)
        if token == EOS:
            return tokens, FinishReason.STOP
        if len(tokens) == max_tokens or len(context) == tokens_max:
            return tokens, FinishReason.LENGTH


class World:
    """One seeded run: a loop, its callers and what they have been told."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        self.limits: Limits = tiny_limits(
            vocab=VOCAB,
            rows_max=rng.randint(1, 5),
            batch_tokens_max=rng.choice([5, 8, 24]),
            sequence_tokens_max=60,
            kv_blocks=rng.randint(10, 30),
            kv_block_tokens=rng.choice([3, 4, 5]),
        )
        self.clock = ManualClock()
        self.engine = ScriptedEngine(self.limits, RULE)
        self.loop = EngineLoop(
            self.engine,
            GreedySampler(),
            TOKENIZER,
            MANIFEST,
            clock=self.clock,
            sink=self.receive,
            waiting_max=12,
            prefill_tokens_max=rng.choice([2, 6, 24]),
        )
        self.scheduler = self.loop._scheduler
        self.tokens_max = self.scheduler.sequence_tokens_max
        # Every other world has tiers; without them the order is that of arrival.
        self.has_tiers = seed % 2 == 1
        self.step_ms = 30 if self.has_tiers else 1
        # Prompts are put together from these, so that blocks recur, also behind other blocks.
        self.pieces = [self.random_tokens(self.limits.kv_block_tokens) for _ in range(3)]
        self.live: dict[int, Submitted] = {}
        self.ended: list[Submitted] = []
        self.num_arrived = 0
        self.num_refused = 0
        self.steps = 0

    def random_tokens(self, count: int) -> list[int]:
        return [self.rng.randrange(1, VOCAB) for _ in range(count)]

    def promise(self) -> Promise:
        rng = self.rng
        if not self.has_tiers:
            return Promise()
        return Promise(
            tier=rng.choice(list(Tier)),
            tenant=rng.randrange(3),
            weight=rng.randint(1, 3),
            due_ms=self.clock.now_ms + rng.randint(1, 3_000) if rng.random() < 0.7 else None,
            itl_ms_max=rng.choice([None, 10, 100, 200]),
        )

    def arrive(self) -> None:
        rng = self.rng
        pieces = rng.choices(self.pieces, k=rng.randint(0, 5))
        prompt = [*chain.from_iterable(pieces), *self.random_tokens(rng.randint(1, 9))]
        prompt = prompt[: self.tokens_max - 1]
        max_tokens = rng.randint(1, 50)
        expected, finish = answer(prompt, max_tokens=max_tokens, tokens_max=self.tokens_max)
        resumed = rng.randrange(len(expected)) if rng.random() < 0.2 else 0
        salt = rng.choice([b"tenant-a", b"tenant-b"])
        promise = self.promise()
        left_ms = rng.randint(0, 60) * self.step_ms
        # Now and then the choices of one request: the same prompt several times at once.
        for _ in range(3 if rng.random() < 0.15 else 1):
            spec = SequenceSpec(
                prompt_ids=prompt,
                sampling=Sampling(max_tokens=max_tokens),
                resume_ids=expected[:resumed],
                cache_salt=salt,
                deadline_ms=self.clock.now_ms + left_ms if rng.random() < 0.1 else None,
                promise=promise,
            )
            self.num_arrived += 1
            try:
                self.loop.submit(self.num_arrived, spec)
            except Overloaded:
                self.num_refused += 1
                continue
            self.live[self.num_arrived] = Submitted(spec, expected[resumed:], finish, self.steps)

    def cancel(self) -> None:
        key = self.rng.choice(list(self.live))
        self.live[key].is_aborted = True
        self.loop.abort(key)

    def receive(self, report: StepReport) -> None:
        for key, delta, _ in report.deltas:
            sequence = self.live[key]  # A KeyError here: a delta after the last one.
            sequence.deltas.append(delta)
            assert not sequence.is_aborted or delta.finish is FinishReason.CANCELLED, (
                "a token came after the cancellation"
            )
            if delta.finish is not None:
                self.ended.append(self.live.pop(key))

    def check(self) -> None:
        assert self.loop.healthy
        self.scheduler.check()
        assert len(self.scheduler.running) + len(self.scheduler.waiting) == len(self.live)
        for job in (*self.scheduler.running, *self.scheduler.waiting):
            assert job.rank > 0 or not job.preemptions, "a reserved answer was preempted"
        # Nothing is freed to nowhere: with nobody running, the whole pool is free.
        if not self.scheduler.running:
            assert self.scheduler.pool.num_free == self.scheduler.pool.num_blocks
        for sequence in self.live.values():
            assert self.steps - sequence.at_step < WAIT_STEPS_MAX, "a sequence starves"

    def turn(self) -> None:
        self.loop.turn()
        self.steps += 1
        self.clock.advance(ms=self.step_ms)


def check_ending(sequence: Submitted, *, now_ms: float) -> None:
    finish = sequence.deltas[-1].finish
    tokens = sequence.tokens
    if finish is FinishReason.CANCELLED:
        assert sequence.is_aborted
        assert tokens == sequence.expected[: len(tokens)]
    elif finish is FinishReason.DEADLINE:
        assert sequence.spec.deadline_ms is not None
        assert sequence.spec.deadline_ms <= now_ms
        assert tokens == sequence.expected[: len(tokens)]
    else:
        assert finish is sequence.finish
        assert tokens == sequence.expected


@pytest.mark.parametrize("seed", range(60))
def test_whatever_arrives_every_sequence_gets_its_own_answer_and_ends_once(seed: int) -> None:
    """No block leaks, nobody starves, and no answer ever sees another one's tokens."""
    world = World(seed)

    while world.num_arrived < ARRIVALS or world.live:
        if world.num_arrived < ARRIVALS and world.rng.random() < 0.25:
            world.arrive()
        if world.live and world.rng.random() < 0.03:
            world.cancel()
        world.turn()
        world.check()

    assert len(world.ended) + world.num_refused == world.num_arrived
    for sequence in world.ended:
        check_ending(sequence, now_ms=world.clock.now_ms)
    load = world.loop.load()
    assert load.completion_tokens_total == sum(len(each.tokens) for each in world.ended)
    assert load.cached_tokens_total <= load.prompt_tokens_total
    world.loop.stop()


def turn_and_look(world: World, met: dict[str, int]) -> None:
    """A turn, and whether anyone was promoted, late or paused in it."""
    scheduler = world.scheduler
    decoding = {job: job.num_computed for job in scheduler.running if job.num_pending == 1}
    world.turn()
    met["paused"] += any(
        job.num_computed == decoding.get(job) and job.rank >= Tier.FLEX.rank
        for job in scheduler.running
    )
    met["promoted"] += any(job.rank != job.promise.tier.rank for job in scheduler.running)
    met["late"] += any(q.tokens_ahead < q.pending_tokens for q in scheduler.queues)


def test_the_simulation_meets_what_it_is_there_to_test() -> None:
    """Preemption, prefix hits, cancellation, deadlines and refusals all happen in it."""
    met = dict.fromkeys(["preempted", "cached", "cancelled", "deadline", "refused"], 0)
    met |= dict.fromkeys(["promoted", "late", "paused"], 0)
    for seed in range(12):
        world = World(seed)
        while world.num_arrived < ARRIVALS or world.live:
            if world.num_arrived < ARRIVALS and world.rng.random() < 0.25:
                world.arrive()
            if world.live and world.rng.random() < 0.03:
                world.cancel()
            turn_and_look(world, met)
        finishes = [each.deltas[-1].finish for each in world.ended]
        load = world.loop.load()
        met["preempted"] += world.scheduler.preemptions
        met["cached"] += load.cached_tokens_total > 0
        met["cancelled"] += FinishReason.CANCELLED in finishes
        met["deadline"] += FinishReason.DEADLINE in finishes
        met["refused"] += world.num_refused > 0
        world.loop.stop()

    assert all(met.values()), met
