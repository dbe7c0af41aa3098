"""What an engine loop tells the outside, and what it asks of a sampler."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from headrace.serving.domain.request import Delta
from headrace.serving.domain.tier import Tier
from headrace.serving.engine.base import Logits
from headrace.serving.engine.sampler import Sampled, SampleRequest
from headrace.serving.engine.tier_queue import TierQueue

_RECENT_SHARE = 0.98
"""Weight that a step keeps in the next one's recent overhead: a memory of about 50 steps."""


class TokenSampler(Protocol):
    """Chooses tokens; `Sampler` does it natively, tests greedily."""

    def sample(self, logits: Logits, requests: Sequence[SampleRequest]) -> Sequence[Sampled]: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueSnapshot:
    """What waits in one tier; field by field the message `TierLoad` of step.proto."""

    waiting: int
    pending_tokens: int
    """Of all that wait."""
    ahead_tokens: int
    """Of those that a newcomer of the tier waits for."""
    tokens_per_s: float
    """Prompt tokens admitted lately while something of the tier waited."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSnapshot:
    """How busy a loop is; field by field the message `Load` of step.proto."""

    running: int = 0
    waiting: int = 0
    pending_tokens: int = 0
    kv_blocks_free: int = 0
    kv_blocks_total: int = 0
    step_ms: float = 0.0
    """Wall time of the step before this one's report, delivery included."""
    draining: bool = False
    step_rows: int = 0
    step_tokens: int = 0
    rows_max: int = 0
    prompt_tokens_total: int = 0
    """Of sequences whose first token was delivered; a resumed one was counted where it began."""
    cached_tokens_total: int = 0
    cache_write_tokens_total: int = 0
    completion_tokens_total: int = 0
    """Tokens in deltas: exactly what was handed to the sink."""
    recomputed_tokens_total: int = 0
    overhead_share: float = 0.0
    """Over the last 50 steps or so: 1 - time in `engine.step` / wall time."""
    prompt_tokens_per_s: float = 0.0
    """Prompt tokens that can be computed beside what runs."""
    tiers: Mapping[Tier, QueueSnapshot] = field(default_factory=dict[Tier, QueueSnapshot])
    """Tiers in which something waits."""


def tier_loads(queues: Sequence[TierQueue[Any]]) -> Mapping[Tier, QueueSnapshot]:
    """What waits, by tier; from the queues by rank."""
    return {
        tier: QueueSnapshot(
            waiting=len(queue),
            pending_tokens=queue.pending_tokens,
            ahead_tokens=queue.tokens_ahead,
            tokens_per_s=queue.tokens_per_s,
        )
        for tier, queue in zip(Tier, queues, strict=True)
        if len(queue)
    }


@dataclass(slots=True)
class StepReport:
    """What one turn of the loop did. The sink owns it."""

    step: int
    """Steps the engine had run before it."""
    deltas: list[tuple[Hashable, Delta, float | None]]
    """Key, what was added, and on a sequence's first delta how long it waited for the engine, in
    milliseconds."""
    load: LoadSnapshot = field(default_factory=LoadSnapshot)


class LoopTimes:
    """Where a loop's time goes. Written by its thread, readable by any."""

    __slots__ = (
        "_last_engine_ms",
        "_recent_engine_ms",
        "_recent_wall_ms",
        "engine_ms",
        "sample_ms",
        "steps",
        "wall_ms",
    )

    def __init__(self) -> None:
        self.steps = 0
        self.wall_ms = 0.0
        """Of turns that ran a step, from taking arrivals to the sink's return."""
        self.engine_ms = 0.0
        """In `engine.step`."""
        self.sample_ms = 0.0
        """In masks and the sampler."""
        self._last_engine_ms = 0.0
        self._recent_engine_ms = 0.0
        self._recent_wall_ms = 0.0

    def add_step(self, *, engine_ms: float, sample_ms: float) -> None:
        self.steps += 1
        self.engine_ms += engine_ms
        self.sample_ms += sample_ms
        self._last_engine_ms = engine_ms

    def add_wall(self, wall_ms: float) -> None:
        """Complete the step that `add_step` began."""
        self.wall_ms += wall_ms
        self._recent_engine_ms = self._recent_engine_ms * _RECENT_SHARE + self._last_engine_ms
        self._recent_wall_ms = self._recent_wall_ms * _RECENT_SHARE + wall_ms

    @property
    def recent_overhead_share(self) -> float:
        if self._recent_wall_ms <= 0.0:
            return 0.0
        return min(1.0, max(0.0, 1.0 - self._recent_engine_ms / self._recent_wall_ms))
