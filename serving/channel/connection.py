"""What a replica has to tell one frontend and has not written yet.

A frontend that keeps up gets one message for each step. One that is behind gets fewer and larger
ones: what a sequence produced meanwhile is merged, so there is never more than one delta for each
sequence and one load report, however slow the reader is. One that stops reading is dropped.
"""

import asyncio

from headrace.serving.channel.convert import add_delta
from headrace.serving.domain.request import Delta
from headrace.serving.inbox import merged
from headrace.v1 import step_pb2

MESSAGE_BYTES = 1 << 20
"""When a message has this much, the rest goes into the next one: far from any limit of gRPC."""


class Connection:
    """One frontend. Owned by the replica's event loop."""

    __slots__ = (
        "_load",
        "_pending",
        "_step",
        "_waits_ms",
        "has_spoken",
        "is_dropped",
        "is_flushed",
        "sequences",
        "task",
        "wake",
        "writing_since_s",
    )

    def __init__(self, task: "asyncio.Task[None]") -> None:
        self.task = task
        self.wake = asyncio.Event()
        """Set when there is something to write, or when the connection is over."""
        self.is_flushed = asyncio.Event()
        """Everything said so far has been written, or never will be."""
        self.sequences: set[int] = set()
        """Submitted on this connection and not ended."""
        self.is_dropped = False
        self.has_spoken = False
        """Whether something was said since the last heartbeat."""
        self.writing_since_s: float | None = None
        """Since when the message in flight waits for the frontend to read, on the loop's clock."""
        self._pending: dict[int, Delta] = {}
        self._waits_ms: dict[int, float] = {}
        self._load: step_pb2.Load | None = None
        self._step = 0

    def put(self, sequence: int, delta: Delta, queue_wait_ms: float | None) -> None:
        """Add what a step did for one of its sequences. `tell` sends it."""
        held = self._pending.get(sequence)
        self._pending[sequence] = delta if held is None else merged(held, delta)
        if queue_wait_ms is not None:
            self._waits_ms[sequence] = queue_wait_ms

    def tell(self, load: step_pb2.Load, *, step: int = 0) -> None:
        """Send what there is, with this load. A message not yet written carries the newest one."""
        if self.is_dropped:
            return
        self._load = load
        self._step = step or self._step
        self.has_spoken = True
        self.is_flushed.clear()
        self.wake.set()

    def next_message(self) -> step_pb2.FromReplica | None:
        """What is to be written now; None when all is said."""
        if self._load is None:
            return None
        message = step_pb2.FromReplica()
        step = message.step
        step.step = self._step
        step.load.CopyFrom(self._load)
        pending, waits_ms = self._pending, self._waits_ms
        room = MESSAGE_BYTES
        while pending and room > 0:
            sequence = next(iter(pending))
            delta = pending.pop(sequence)
            wait_ms = waits_ms.pop(sequence, None)
            add_delta(step, sequence=sequence, delta=delta, queue_wait_ms=wait_ms)
            room -= _bytes_max(delta)
        if not pending:
            self._load = None
        return message

    def close(self) -> None:
        """Say nothing more."""
        self.is_dropped = True
        self.sequences.clear()
        self._pending.clear()
        self._load = None
        self.is_flushed.set()
        self.wake.set()


def _bytes_max(delta: Delta) -> int:
    """About how much room a delta takes, without encoding it twice."""
    num_logprobs = sum(1 + len(logprob.top) for logprob in delta.logprobs)
    return 32 + 4 * len(delta.text) + 5 * len(delta.token_ids) + 24 * num_logprobs
