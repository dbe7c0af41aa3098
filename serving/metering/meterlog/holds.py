"""The holds that are open: what a new segment carries on, and what a dead frontend left behind."""

from collections.abc import Iterator
from dataclasses import dataclass

from headrace.serving.domain.usage import Usage
from headrace.serving.metering.meterlog.events import fill_usage, usage_of
from headrace.v1 import meterlog_pb2

CARRY_BYTES_MAX = 32 << 10
"""Of the holds in one Carry: about a hundred."""
USAGE_BYTES_MAX = 72
"""Of a checkpoint that a Carry repeats: five numbers, the hold's own, and the marks between."""


@dataclass(slots=True, eq=False)
class Hold:
    """A request that was accepted and has not ended."""

    seq: int
    """Of its Reserve."""
    payload: bytes
    """The event of its Reserve; read again only if it is carried on or recovered."""
    usage: Usage | None = None
    """Of its last checkpoint."""

    @property
    def reserved(self) -> meterlog_pb2.Reserve:
        return meterlog_pb2.MeterEvent.FromString(self.payload).reserve

    @property
    def num_bytes(self) -> int:
        """At most what a Carry needs for it."""
        return len(self.payload) + USAGE_BYTES_MAX


class Holds:
    """Open holds by the sequence number of their Reserve, oldest first. One thread at a time."""

    def __init__(self) -> None:
        self._open: dict[int, Hold] = {}
        self.num_bytes = 0
        """At most what a Carry needs for all of them."""

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Iterator[Hold]:
        return iter(list(self._open.values()))

    def __contains__(self, reserve: int) -> bool:
        return reserve in self._open

    def get(self, reserve: int) -> Hold | None:
        return self._open.get(reserve)

    def agrees_with(self, other: "Holds") -> bool:
        """Whether both hold the same, down to the last checkpoint."""
        return len(self) == len(other) and all(
            (known := other.get(hold.seq)) is not None
            and known.reserved == hold.reserved
            and known.usage == hold.usage
            for hold in self
        )

    def began(self, seq: int, payload: bytes) -> None:
        hold = self._open[seq] = Hold(seq, payload)
        self.num_bytes += hold.num_bytes

    def noted(self, reserve: int, usage: Usage) -> None:
        self._open[reserve].usage = usage

    def ended(self, reserve: int) -> None:
        self.num_bytes -= self._open.pop(reserve).num_bytes

    def apply(self, seq: int, payload: bytes, event: meterlog_pb2.MeterEvent) -> None:
        """What a record that was read does.

        Raises:
            KeyError: it concerns a hold that is not open.
        """
        match event.WhichOneof("kind"):
            case "reserve":
                self.began(seq, payload)
            case "checkpoint":
                self.noted(event.checkpoint.reserve, usage_of(event.checkpoint.usage))
            case "settle":
                self.ended(event.settle.reserve)
            case "void":
                self.ended(event.void.reserve)
            case "expire":
                self.ended(event.expire.reserve)
            case _:
                pass

    def carry_in(self, carry: meterlog_pb2.Carry, unix_ms: int) -> None:
        """Open the holds that a segment begins with."""
        for each in carry.open:
            event = meterlog_pb2.MeterEvent(unix_ms=unix_ms, reserve=each.reserved)
            self.began(each.reserve, event.SerializeToString())
            if each.HasField("usage"):
                self.noted(each.reserve, usage_of(each.usage))

    def carry_out(self, unix_ms: int) -> list[bytes]:
        """The Carry records of a segment that begins now: one at least."""
        left = len(self._open)
        event, num_bytes = meterlog_pb2.MeterEvent(unix_ms=unix_ms), 0
        payloads: list[bytes] = []
        for hold in self._open.values():
            if num_bytes and num_bytes + hold.num_bytes > CARRY_BYTES_MAX:
                event.carry.left = left
                payloads.append(event.SerializeToString())
                event, num_bytes = meterlog_pb2.MeterEvent(unix_ms=unix_ms), 0
            message = event.carry.open.add()
            message.reserve = hold.seq
            message.reserved.CopyFrom(hold.reserved)
            if hold.usage is not None:
                fill_usage(message.usage, hold.usage)
                # A checkpoint of nothing is a checkpoint.
                message.usage.SetInParent()
            num_bytes += hold.num_bytes
            left -= 1
        event.carry.SetInParent()  # A Carry of nothing is a Carry.
        return [*payloads, event.SerializeToString()]
