"""What enters an engine loop, and from which threads.

The only part of a loop that threads share: the live sequences, and an inbox of those that arrived
or must end. It is bounded by the number of live sequences. Grammars are compiled here, on a
thread of their own, so that a large schema delays nobody else's tokens; its sequence arrives when
the grammar is ready.
"""

import logging
import threading
from collections.abc import Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import inf

from headrace.serving.clock import Clock
from headrace.serving.domain.artifact import Manifest
from headrace.serving.domain.request import FinishReason, Grammar, SequenceSpec
from headrace.serving.domain.tier import Tier
from headrace.serving.engine.base import Limits
from headrace.serving.engine.sequence import Sequence
from headrace.serving.engine.structured import GrammarCompiler
from headrace.serving.errors import (
    Draining,
    EngineFault,
    InvalidRequest,
    Overloaded,
    PromptTooLong,
    ServingError,
)
from headrace.serving.tokenizer import Tokenizer

RETRY_AFTER_MS = 1_000
"""About how long a full loop takes to end a sequence: some hundred steps of ten milliseconds."""

log = logging.getLogger("headrace.engine")

Ending = tuple[Sequence, FinishReason, ServingError | None]


@dataclass(slots=True)
class Inbox:
    """What the loop must act on, in this order."""

    arrived: list[Sequence]
    ended: list[Ending]


class SequenceIntake:
    """Validates, prepares and queues sequences for one loop. Any thread, unless it says so."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        manifest: Manifest,
        limits: Limits,
        *,
        clock: Clock,
        tokens_max: int,
        live_max: int,
    ) -> None:
        """Prepare an intake.

        Args:
            tokenizer: the model's.
            manifest: the model's.
            limits: the engine's.
            clock: the loop's.
            tokens_max: the longest sequence that fits an idle engine.
            live_max: sequences between submission and their last delta; for the standard tier.
        """
        self._tokenizer = tokenizer
        self._eos_token_ids = manifest.eos_token_ids
        self._limits = limits
        self._clock = clock
        self._tokens_max = tokens_max
        self._live_max = live_max
        self._compiler = GrammarCompiler(tokenizer, eos_token_ids=manifest.eos_token_ids)
        # One thread: two cores belong to the engine. Its queue is bounded by live_max.
        self._compilers = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._changed = threading.Condition()
        self._live: dict[Hashable, Sequence] = {}
        self._inbox = Inbox([], [])
        self._next_deadline_ms = inf
        """No live sequence has an earlier deadline."""
        self._closed_by: ServingError | None = None
        self.is_draining = False

    @property
    def num_live(self) -> int:
        return len(self._live)

    @property
    def is_closed(self) -> bool:
        return self._closed_by is not None

    def warm_up(self) -> None:
        """Read the vocabulary for grammars, on the calling thread."""
        self._compiler.warm_up()

    def submit(self, key: Hashable, spec: SequenceSpec) -> None:
        """Queue a sequence; see EngineLoop.submit."""
        self._refuse_when_full(spec)
        self._check(spec)
        sequence = Sequence(
            key,
            spec,
            self._tokenizer,
            eos_token_ids=self._eos_token_ids,
            block_tokens=self._limits.kv_block_tokens,
            tokens_max=self._tokens_max,
            arrived_ms=self._clock.monotonic_ms(),
        )
        grammar = spec.sampling.grammar
        finish = sequence.replay() if grammar is None else None
        with self._changed:
            # Others may have come in between; this answer is the one that counts.
            self._refuse_when_full(spec)
            assert key not in self._live, "a live sequence has this key"
            self._live[key] = sequence
            if spec.deadline_ms is not None:
                self._next_deadline_ms = min(self._next_deadline_ms, spec.deadline_ms)
            if grammar is not None:
                self._compilers.submit(self._constrain, sequence, grammar)
            else:
                self._queue(sequence, finish)
            # Wakes the loop for the deadline too.
            self._changed.notify()

    def abort(self, key: Hashable) -> None:
        with self._changed:
            sequence = self._live.get(key)
            if sequence is not None and not sequence.is_aborted:
                sequence.is_aborted = True
                self._inbox.ended.append((sequence, FinishReason.CANCELLED, None))
                self._changed.notify()

    def take(self, now_ms: float) -> Inbox | None:
        """What has come in, and what is late by `now_ms`. The loop's thread."""
        inbox = self._inbox
        if not (inbox.arrived or inbox.ended) and now_ms < self._next_deadline_ms:
            return None
        with self._changed:
            inbox, self._inbox = self._inbox, Inbox([], [])
            if now_ms >= self._next_deadline_ms:
                self._find_late(inbox, now_ms)
        return inbox

    def wait(self) -> None:
        """Sleep until something comes in, is late, or the intake closes. The loop's thread."""
        with self._changed:
            inbox = self._inbox
            if inbox.arrived or inbox.ended or self.is_closed:
                return
            timeout_s = None
            if self._next_deadline_ms < inf:
                late_in_ms = self._next_deadline_ms - self._clock.monotonic_ms()
                timeout_s = min(max(0.0, late_in_ms / 1000), threading.TIMEOUT_MAX)
            self._changed.wait(timeout_s)

    def forget(self, sequence: Sequence) -> None:
        """A sequence has ended. The loop's thread."""
        with self._changed:
            del self._live[sequence.key]

    def clear(self) -> list[Sequence]:
        """Forget all live sequences and return them. The loop's thread."""
        with self._changed:
            sequences = list(self._live.values())
            self._live.clear()
            self._inbox = Inbox([], [])
            return sequences

    def drain(self) -> None:
        """Refuse what comes from here on."""
        self.is_draining = True

    def close(self, error: ServingError) -> None:
        """Refuse what comes from here on with `error`, and wake the loop to end. The first wins."""
        with self._changed:
            self._closed_by = self._closed_by or error
            self._changed.notify()

    def join(self) -> None:
        """End the compiling thread; what it has not begun is dropped."""
        self._compilers.shutdown(wait=True, cancel_futures=True)

    def _find_late(self, inbox: Inbox, now_ms: float) -> None:
        self._next_deadline_ms = inf
        for sequence in self._live.values():
            deadline_ms = sequence.spec.deadline_ms
            if deadline_ms is None:
                continue
            if deadline_ms <= now_ms:
                inbox.ended.append((sequence, FinishReason.DEADLINE, None))
            else:
                self._next_deadline_ms = min(self._next_deadline_ms, deadline_ms)

    def _constrain(self, sequence: Sequence, grammar: Grammar) -> None:
        """Compile a sequence's grammar and queue it. The compiling thread."""
        finish: FinishReason | None = None
        error: ServingError | None = None
        try:
            sequence.constrain(self._compiler.compile(grammar))
            finish = sequence.replay()
        except ServingError as refusal:
            finish, error = FinishReason.ERROR, refusal
        except Exception as bug:  # The root of this task: the sequence must hear of it.
            log.error("compiling a grammar failed", exc_info=bug)
            finish, error = FinishReason.ERROR, _compiler_failed()
        with self._changed:
            if self._live.get(sequence.key) is sequence:
                self._queue(sequence, finish, error)
                self._changed.notify()

    def _queue(
        self, sequence: Sequence, finish: FinishReason | None, error: ServingError | None = None
    ) -> None:
        if finish is None:
            self._inbox.arrived.append(sequence)
        else:
            self._inbox.ended.append((sequence, finish, error))

    def _live_max_for(self, tier: Tier) -> int:
        """Live sequences up to which one of `tier` is taken.

        Weak tiers leave half of the waiting places to others, and the strong ones have a quarter
        more: nobody's flood keeps them out.
        """
        waiting_max = self._live_max - self._limits.rows_max
        if tier.may_be_relegated:
            return self._live_max - waiting_max // 2
        is_strong = tier.rank < Tier.STANDARD.rank
        return self._live_max + (waiting_max // 4 if is_strong else 0)

    def _refuse_when_full(self, spec: SequenceSpec) -> None:
        if (error := self._closed_by) is not None:
            # A fresh one each time: an exception that is raised again keeps every traceback.
            raise type(error)(error.what, why=error.why, fix=error.fix)
        if self.is_draining:
            raise Draining(
                "The replica takes no new sequences.",
                why="It is draining: it will stop when the running ones have ended.",
                fix="Send it to another replica.",
            )
        tier = spec.promise.tier
        if len(self._live) >= (live_max := self._live_max_for(tier)):
            raise Overloaded(
                f"The replica has {len(self._live)} sequences.",
                why=f"Up to {live_max} it takes a {tier} one, so that no one waits without end.",
                fix="Retry later or on another replica; add replicas if it persists.",
                retry_after_ms=RETRY_AFTER_MS,
            )

    def _check(self, spec: SequenceSpec) -> None:
        num_prompt = len(spec.prompt_ids)
        if num_prompt == 0:
            raise InvalidRequest(
                "The prompt is empty.",
                why="A model continues from at least one token.",
                fix="Send some text.",
                field="prompt",
            )
        if num_prompt >= self._tokens_max or (num_prompt + len(spec.resume_ids) > self._tokens_max):
            raise PromptTooLong(
                f"The prompt has {num_prompt:,} tokens.",
                why=f"Prompt and answer share {self._tokens_max:,} tokens on this engine.",
                fix=f"Send at most {self._tokens_max - 1:,} tokens.",
                field="prompt",
            )
        assert spec.sampling.max_tokens > 0
        sampling = spec.sampling
        for field, ids in (
            ("prompt", spec.prompt_ids),
            ("prompt", spec.resume_ids),
            ("stop_token_ids", sampling.stop_token_ids),
            ("sampling.logit_bias", sampling.logit_bias),
        ):
            if ids and not 0 <= min(ids) <= max(ids) < self._limits.vocab:
                raise InvalidRequest(
                    f"A token id in {field} is outside the vocabulary.",
                    why=f"This model's ids are 0 to {self._limits.vocab - 1:,}.",
                    fix="Tokenise with this model's tokenizer.",
                    field=field,
                )


def _compiler_failed() -> EngineFault:
    return EngineFault(
        "The grammar could not be compiled.",
        why="Its compiler failed in a way it should not.",
        fix="Report it; the replica's log has the traceback.",
    )
