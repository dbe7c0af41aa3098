"""A batch of requests: its states, its legal moves, and what is known of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from headrace.serving.domain.usage import Usage

LINES_MAX = 50_000
"""A day's work of one small model here; more is several batches. OpenAI's bound too."""
INPUT_BYTES_MAX = 200_000_000
LINE_BYTES_MAX = 1 << 20
"""A prompt of 128 k tokens is about 0.7 MB of text."""
CUSTOM_ID_CHARS_MAX = 64
ATTEMPTS_MAX = 16
"""Request ids of one line: each is left behind by a process that died, or by replicas that did."""


class BatchState(StrEnum):
    VALIDATING = "validating"
    """Its lines are being uploaded."""
    QUEUED = "queued"
    RUNNING = "running"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"
    COMPLETED = "completed"
    EXPIRED = "expired"
    FAILED = "failed"
    """It cannot be run: its upload was cut off, or its file is damaged."""

    @property
    def is_final(self) -> bool:
        return not MOVES[self]


MOVES: Mapping[BatchState, frozenset[BatchState]] = {
    BatchState.VALIDATING: frozenset({BatchState.QUEUED, BatchState.FAILED}),
    BatchState.QUEUED: frozenset(
        {BatchState.RUNNING, BatchState.CANCELLING, BatchState.EXPIRED, BatchState.FAILED}
    ),
    BatchState.RUNNING: frozenset(
        {
            BatchState.QUEUED,  # Its frontend stopped, or died.
            BatchState.CANCELLING,
            BatchState.COMPLETED,
            BatchState.EXPIRED,
            BatchState.FAILED,
        }
    ),
    # A last line may have been done meanwhile; a batch that was cancelled says so all the same.
    BatchState.CANCELLING: frozenset({BatchState.CANCELLED, BatchState.FAILED}),
    BatchState.CANCELLED: frozenset(),
    BatchState.COMPLETED: frozenset(),
    BatchState.EXPIRED: frozenset(),
    BatchState.FAILED: frozenset(),
}
"""Where a batch may go from each state; what is not here does not happen."""


class LineStatus(StrEnum):
    """How a line ended. Only succeeded ones are charged."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


@dataclass(frozen=True, slots=True, kw_only=True)
class LineResult:
    """The one result of a line."""

    line: int
    """From 1."""
    status: LineStatus
    text: bytes = field(repr=False)
    """The JSON line of the results, its newline included."""
    usage: Usage = field(default_factory=Usage)
    charge_nano: int = 0
    currency: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    lines: int = 0
    succeeded: int = 0
    failed: int = 0
    cancelled: int = 0
    expired: int = 0

    @property
    def done(self) -> int:
        """Lines that have a result."""
        return self.succeeded + self.failed + self.cancelled + self.expired


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One batch, as its store knows it."""

    batch_id: str
    tenant_id: str
    project_id: str
    key_id: str
    state: BatchState
    counts: Counts = field(default_factory=Counts)
    usage: Usage = field(default_factory=Usage)
    charge_nano: int = 0
    currency: str = ""
    input_bytes: int = 0
    results_bytes: int = 0
    """What of the results file counts; anything after it was never committed."""
    created_unix_ms: int
    started_unix_ms: int | None = None
    finished_unix_ms: int | None = None
    expires_unix_ms: int
    why: str = ""

    def eta_unix_ms(self, now_unix_ms: int) -> int | None:
        """When it will be done at the rate so far; None before there is one.

        50 of 200 lines in 10 s leave 150 for 30 s.
        """
        done = self.counts.done
        if self.state is not BatchState.RUNNING or self.started_unix_ms is None or not done:
            return None
        elapsed_ms = max(0, now_unix_ms - self.started_unix_ms)
        return now_unix_ms + elapsed_ms * (self.counts.lines - done) // done


def request_id_of(batch_id: str, *, line: int, attempt: int = 1) -> str:
    """The request_id of a line's attempt: the same in every process that runs it.

    `rules.is_of_batch` keeps callers from using ids of this form.
    """
    first = f"{batch_id}.{line}"
    return first if attempt == 1 else f"{first}.{attempt}"
