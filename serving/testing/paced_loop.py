"""An engine loop without an engine: a first token at once, then one for each tick of a clock.

For measuring what is around an engine: frontend, step channel, metering. It has the interface of
`EngineLoop` and a thread of its own, computes nothing and holds nothing but counters.
"""

import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from headrace.serving.clock import Clock, SystemClock
from headrace.serving.domain.request import Delta, FinishReason, SequenceSpec
from headrace.serving.engine.loop_report import LoadSnapshot, StepReport
from headrace.serving.errors import Overloaded

LIVE_MAX = 4096


@dataclass(slots=True, eq=False)
class _Live:
    max_tokens: int
    prompt_tokens: int
    num_answered: int
    arrived_ms: float
    was_reported: bool = False


class PacedLoop:
    """Answers every prompt with the same token, all sequences in step."""

    def __init__(
        self,
        sink: Callable[[StepReport], None],
        *,
        tokens_per_s: float,
        token_id: int,
        text: str,
        clock: Clock | None = None,
    ) -> None:
        """Prepare; `start` runs the thread.

        Args:
            sink: takes each step's report, on this loop's thread.
            tokens_per_s: of each sequence; 0 is as fast as the sink takes them.
            token_id: what every step answers...
            text: ...and how that token reads.
            clock: of queue waits.
        """
        self._sink = sink
        self._period_s = 1 / tokens_per_s if tokens_per_s else 0.0
        self._token_ids = (token_id,)
        self._text = text
        self._clock = clock or SystemClock()
        self._live: dict[Hashable, _Live] = {}
        self._arrived: list[Hashable] = []
        self._changed = threading.Condition()
        self._is_stopped = False
        self._thread: threading.Thread | None = None
        self._steps = 0
        self._prompt_tokens = 0
        self._completion_tokens = 0

    @property
    def healthy(self) -> bool:
        return True

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="paced-loop", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        with self._changed:
            self._is_stopped = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def submit(self, key: Hashable, spec: SequenceSpec) -> None:
        if len(self._live) >= LIVE_MAX:
            raise Overloaded(
                f"{LIVE_MAX} sequences run.", why="That is the bound.", fix="Retry later."
            )
        live = _Live(
            max_tokens=spec.sampling.max_tokens,
            prompt_tokens=len(spec.prompt_ids),
            num_answered=len(spec.resume_ids),
            arrived_ms=self._clock.monotonic_ms(),
        )
        with self._changed:
            self._live[key] = live
            self._arrived.append(key)
            self._changed.notify()

    def abort(self, key: Hashable) -> None:
        with self._changed:
            self._live.pop(key, None)

    def load(self) -> LoadSnapshot:
        running = len(self._live)
        return LoadSnapshot(
            running=running,
            step_ms=self._period_s * 1000,
            rows_max=LIVE_MAX,
            kv_blocks_free=1,
            kv_blocks_total=1,
            step_rows=running,
            step_tokens=running,
            prompt_tokens_total=self._prompt_tokens,
            completion_tokens_total=self._completion_tokens,
        )

    def _run(self) -> None:
        due_ms = self._clock.monotonic_ms()
        while True:
            with self._changed:
                while not self._is_stopped and not self._arrived:
                    left_s = (due_ms - self._clock.monotonic_ms()) / 1000
                    if self._live and left_s <= 0:
                        break
                    self._changed.wait(left_s if self._live else None)
                if self._is_stopped:
                    return
                now_ms = self._clock.monotonic_ms()
                keys = self._arrived
                self._arrived = []
                if now_ms >= due_ms:
                    keys = list(self._live)
                    # A late step is not made up for: a real engine does not hurry either.
                    due_ms = max(due_ms, now_ms - self._period_s * 1000) + self._period_s * 1000
                report = self._step(keys, now_ms)
            self._sink(report)

    def _step(self, keys: Sequence[Hashable], now_ms: float) -> StepReport:
        """One token for each of `keys`."""
        report = StepReport(self._steps, [])
        self._steps += 1
        running = Delta(token_ids=self._token_ids, text=self._text)
        ending = Delta(token_ids=self._token_ids, text=self._text, finish=FinishReason.LENGTH)
        for key in keys:
            live = self._live.get(key)
            if live is None:
                continue
            wait_ms = None
            if not live.was_reported:
                live.was_reported = True
                self._prompt_tokens += live.prompt_tokens
                wait_ms = now_ms - live.arrived_ms
            live.num_answered += 1
            self._completion_tokens += 1
            is_last = live.num_answered >= live.max_tokens
            report.deltas.append((key, ending if is_last else running, wait_ms))
            if is_last:
                del self._live[key]
        report.load = self.load()
        return report
