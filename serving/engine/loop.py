"""The thread that owns an engine: arrivals, a step, delivery, abort.

Any thread may submit, abort and ask for the load; everything else happens on the loop's own
thread, so engine, scheduler and sequences need no locks. A turn takes what has arrived, drops
what was cancelled or is late, plans, steps the engine, samples, and hands one report to the sink.
With nothing to do the thread sleeps until something arrives.

A fault of the engine ends the loop: every sequence gets an error, further ones are refused, and
the replica is expected to exit. There is no state to save: its sequences continue elsewhere.
"""

import logging
import threading
from collections.abc import Callable, Hashable

from headrace.serving.clock import Clock
from headrace.serving.domain.artifact import Manifest
from headrace.serving.domain.request import Delta, FinishReason, SequenceSpec, TokenLogprob
from headrace.serving.engine.base import Engine, Row
from headrace.serving.engine.loop_report import (
    LoadSnapshot,
    LoopTimes,
    StepReport,
    TokenSampler,
    tier_loads,
)
from headrace.serving.engine.sampler import NO_TOKEN, Sampled
from headrace.serving.engine.scheduler import Plan, Scheduler
from headrace.serving.engine.sequence import Sequence
from headrace.serving.engine.sequence_intake import SequenceIntake
from headrace.serving.errors import Draining, EngineFault, InvalidSchema, ServingError
from headrace.serving.tokenizer import Tokenizer

WAITING_MAX = 256
PREFILL_TOKENS_MAX = 128
"""Most prompt tokens of a step in which something decodes: bounds the pause between two tokens."""

log = logging.getLogger("headrace.engine")


class EngineLoop:
    """Continuous batching on one engine, which it owns, together with the sampler, from `start`.

    A sequence is known by a key that the caller chooses, unique among the live ones. Each one ends
    with exactly one delta that says why.
    """

    def __init__(
        self,
        engine: Engine,
        sampler: TokenSampler,
        tokenizer: Tokenizer,
        manifest: Manifest,
        *,
        clock: Clock,
        sink: Callable[[StepReport], None],
        waiting_max: int = WAITING_MAX,
        prefill_tokens_max: int = PREFILL_TOKENS_MAX,
    ) -> None:
        """Prepare a loop; nothing runs before `start`.

        Args:
            engine: stepped and at last closed by the loop's thread.
            sampler: likewise.
            tokenizer: the model's.
            manifest: the model's.
            clock: for deadlines and times.
            sink: called on the loop's thread with each step's report; it must not block.
            waiting_max: sequences that may be live beside those that the engine can run at once.
            prefill_tokens_max: most prompt tokens of a step in which something decodes.
        """
        self._engine = engine
        self._limits = limits = engine.limits
        self._sampler = sampler
        self._clock = clock
        self._sink = sink
        self._scheduler: Scheduler[Sequence] = Scheduler(
            limits, prefill_tokens_max=prefill_tokens_max
        )
        self._intake = SequenceIntake(
            tokenizer,
            manifest,
            limits,
            clock=clock,
            tokens_max=self._scheduler.sequence_tokens_max,
            live_max=limits.rows_max + waiting_max,
        )
        self._thread: threading.Thread | None = None
        self._is_closed = False
        self._report: StepReport | None = None
        """The turn's report until the sink has it."""
        self._fault: EngineFault | None = None
        self.times = LoopTimes()
        """Where the time has gone since the start."""
        self._step_ms = 0.0
        self._step_rows = 0
        self._step_tokens = 0
        self._prompt_tokens = 0
        self._cached_tokens = 0
        self._cache_write_tokens = 0
        self._completion_tokens = 0

    @property
    def healthy(self) -> bool:
        """False once the engine has failed; it never recovers."""
        return self._fault is None

    def start(self) -> None:
        """Prepare for grammars (0.3 s for 49,152 tokens) and start the loop's thread."""
        assert self._thread is None, "a loop starts once"
        self._intake.warm_up()
        self._thread = threading.Thread(target=self._run, name="engine-loop", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the loop within one step and close the engine. Idempotent.

        What still runs ends with a `Draining` error: drain first to let it finish.
        """
        self._intake.close(_stopped())
        if self._thread is not None:
            self._thread.join()
        else:
            self._close()

    def drain(self) -> None:
        """Refuse new sequences and let the live ones finish."""
        self._intake.drain()

    def submit(self, key: Hashable, spec: SequenceSpec) -> None:
        """Queue a sequence; its deltas follow through the sink. Any thread.

        Raises:
            InvalidRequest: the prompt is empty, or an id is not in the vocabulary.
            PromptTooLong: the sequence cannot fit even an idle engine.
            Overloaded: too many sequences are live.
            Draining: the loop is draining or has stopped.
            EngineFault: the engine has failed.
        """
        self._intake.submit(key, spec)

    def abort(self, key: Hashable) -> None:
        """End a sequence before the next step; unknown keys are ignored. Any thread."""
        self._intake.abort(key)

    def load(self) -> LoadSnapshot:
        """How busy the loop is, as of now. Any thread."""
        scheduler = self._scheduler
        running = len(scheduler.running)
        return LoadSnapshot(
            running=running,
            waiting=max(0, self._intake.num_live - running),
            pending_tokens=scheduler.pending_tokens,
            kv_blocks_free=scheduler.pool.num_free,
            kv_blocks_total=scheduler.pool.num_blocks,
            step_ms=self._step_ms,
            draining=self._intake.is_draining,
            step_rows=self._step_rows,
            step_tokens=self._step_tokens,
            rows_max=self._limits.rows_max,
            prompt_tokens_total=self._prompt_tokens,
            cached_tokens_total=self._cached_tokens,
            cache_write_tokens_total=self._cache_write_tokens,
            completion_tokens_total=self._completion_tokens,
            recomputed_tokens_total=scheduler.recomputed_tokens,
            overhead_share=self.times.recent_overhead_share,
            prompt_tokens_per_s=scheduler.prompt_tokens_per_s,
            tiers=tier_loads(scheduler.queues),
        )

    def turn(self) -> bool:
        """One turn of the loop, on the calling thread; False when there was nothing to do.

        Only the loop's thread calls it, or a test that has not started one.
        """
        try:
            return self._turn()
        except Exception as error:  # The root of the loop: whatever it is, sequences must hear.
            self._fail(error)
            return False

    def _run(self) -> None:
        try:
            while self.healthy and not self._intake.is_closed:
                if not self.turn():
                    self._intake.wait()
        finally:
            self._close()

    def _turn(self) -> bool:
        began_ms = self._clock.monotonic_ms()
        report = self._report = StepReport(self.times.steps, [])
        self._take_inbox(report, began_ms)
        plan = self._scheduler.plan(began_ms)
        if plan.grants:
            self._step(plan, report, began_ms)
        elif not report.deltas:
            return False
        report.load = self.load()
        self._report = None
        self._sink(report)
        if plan.grants:
            self._step_ms = self._clock.monotonic_ms() - began_ms
            self._scheduler.observe(plan, self._step_ms)
            self.times.add_wall(self._step_ms)
        return True

    def _take_inbox(self, report: StepReport, now_ms: float) -> None:
        inbox = self._intake.take(now_ms)
        if inbox is None:
            return
        for sequence in inbox.arrived:
            if sequence.is_ended:
                continue
            sequence.is_scheduled = True
            self._scheduler.add(sequence, now_ms)
        for sequence, finish, error in inbox.ended:
            if not sequence.is_ended:
                self._end(sequence, report, finish, error)

    def _step(self, plan: Plan[Sequence], report: StepReport, began_ms: float) -> None:
        rows: list[Row] = []
        sampling: list[Sequence] = []
        num_tokens = 0
        for sequence, granted in plan.grants:
            first = sequence.num_computed
            token_ids = sequence.token_ids
            samples = first + granted == len(token_ids)
            rows.append(Row(token_ids[first : first + granted], first, sequence.block_ids, samples))
            num_tokens += granted
            if samples:
                sampling.append(sequence)
            if sequence.queue_wait_ms is None:
                sequence.queue_wait_ms = max(0.0, began_ms - sequence.arrived_ms)
        self._step_rows = len(rows)
        self._step_tokens = num_tokens

        called_ms = self._clock.monotonic_ms()
        logits = self._engine.step(rows)
        returned_ms = self._clock.monotonic_ms()
        for sequence, granted in plan.grants:
            self._scheduler.advance(sequence, granted)
        requests = []
        for sequence in sampling:
            if sequence.constraint is not None:
                self._fill_mask(sequence, report)
            is_early = sequence.num_answered < sequence.min_tokens
            requests.append(sequence.request_early if is_early else sequence.request)
        sampled = self._sampler.sample(logits, requests) if requests else ()
        self.times.add_step(
            engine_ms=returned_ms - called_ms,
            sample_ms=self._clock.monotonic_ms() - returned_ms,
        )
        for sequence, choice in zip(sampling, sampled, strict=True):
            if not sequence.is_ended:
                self._deliver(sequence, choice, report)

    def _fill_mask(self, sequence: Sequence, report: StepReport) -> None:
        assert sequence.constraint is not None
        try:
            sequence.constraint.fill_mask()
        except InvalidSchema as error:
            self._end(sequence, report, FinishReason.ERROR, error)

    def _deliver(self, sequence: Sequence, choice: Sampled, report: StepReport) -> None:
        token_id = choice.token_id
        try:
            if token_id == NO_TOKEN:
                raise _nothing_allowed()
            text, finish = sequence.take(token_id)
        except InvalidSchema as error:
            self._end(sequence, report, FinishReason.ERROR, error)
            return
        self._completion_tokens += 1
        cached_tokens = cache_write_tokens = 0
        queue_wait_ms = None
        if not sequence.was_reported:
            sequence.was_reported = True
            queue_wait_ms = sequence.queue_wait_ms
            cached_tokens = min(sequence.num_resident or 0, sequence.num_prompt)
            if not sequence.is_resumed:
                cache_write_tokens = sequence.num_written
                self._prompt_tokens += sequence.num_prompt
                self._cached_tokens += cached_tokens
                self._cache_write_tokens += cache_write_tokens
        logprobs = ()
        if choice.logprob is not None:
            logprobs = (TokenLogprob(token_id, choice.logprob, choice.top),)
        delta = Delta(
            token_ids=(token_id,),
            text=text,
            logprobs=logprobs,
            cached_tokens=cached_tokens,
            cache_write_tokens=cache_write_tokens,
            finish=finish,
        )
        report.deltas.append((sequence.key, delta, queue_wait_ms))
        if finish is not None:
            self._forget(sequence)

    def _end(
        self,
        sequence: Sequence,
        report: StepReport,
        finish: FinishReason,
        error: ServingError | None = None,
    ) -> None:
        """End a sequence for a reason other than its tokens."""
        # What a stop string might have claimed is part of an answer that is cut short in time.
        text = sequence.text.flush() if finish is FinishReason.DEADLINE else ""
        delta = Delta(text=text, finish=finish, error=error)
        queue_wait_ms = None if sequence.was_reported else sequence.queue_wait_ms
        report.deltas.append((sequence.key, delta, queue_wait_ms))
        self._forget(sequence)

    def _forget(self, sequence: Sequence) -> None:
        sequence.is_ended = True
        if sequence.is_scheduled:
            self._scheduler.remove(sequence)
        self._intake.forget(sequence)

    def _fail(self, error: Exception) -> None:
        log.error("the engine loop died", exc_info=error)
        self._fault = error if isinstance(error, EngineFault) else _engine_died()
        self._intake.close(self._fault)
        self._end_all(self._fault)

    def _close(self) -> None:
        """Leave nothing behind, however the loop ends."""
        if self._is_closed:
            return
        self._is_closed = True
        self._end_all(_stopped())
        self._intake.join()
        self._sampler.close()
        self._engine.close()

    def _end_all(self, error: ServingError) -> None:
        """Tell every live sequence that it ends here, after what a broken turn still held."""
        report, self._report = self._report or StepReport(self.times.steps, []), None
        delta = Delta(finish=FinishReason.ERROR, error=error)
        for sequence in self._intake.clear():
            sequence.is_ended = True
            report.deltas.append((sequence.key, delta, None))
            # After a fault the scheduler may be broken too, and nobody plans with it again.
            if sequence.is_scheduled and self.healthy:
                self._scheduler.remove(sequence)
        if not report.deltas:
            return
        report.load = self.load()
        try:
            self._sink(report)
        except Exception as failure:  # Perhaps the very fault that ended the loop.
            log.error("the sink failed while the engine loop ended", exc_info=failure)


def _stopped() -> Draining:
    return Draining(
        "The replica has stopped.",
        why="It was told to, before the answer was complete.",
        fix="Retry: another replica continues from the tokens that arrived.",
    )


def _engine_died() -> EngineFault:
    return EngineFault(
        "The engine loop has failed.",
        why="A fault escaped from a step, so its state cannot be trusted.",
        fix="Retry; the replica's log has the traceback.",
    )


def _nothing_allowed() -> InvalidSchema:
    return InvalidSchema(
        "The answer cannot go on.",
        why="No token of this model's vocabulary fits the grammar here.",
        fix="Allow more characters in the grammar.",
    )
