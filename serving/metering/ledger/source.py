"""Where the ledger's records come from: a meter log, read in order."""

from collections.abc import Sequence
from typing import Protocol

from headrace.v1 import meterlog_pb2 as pb


class Logged(Protocol):
    """One record of a meter log. `meterlog` has the real one."""

    @property
    def log_id(self) -> str: ...
    @property
    def seq(self) -> int:
        """Its place in the log: the first record has 1, and there are no gaps."""
        ...

    @property
    def event(self) -> pb.MeterEvent: ...


class Source(Protocol):
    """One log. Reading never changes it, and never waits for its writer."""

    @property
    def log_id(self) -> str: ...

    def after(self, seq: int, limit: int) -> Sequence[Logged]:
        """At most `limit` records that follow `seq`, in order; none when there are none yet.

        Raises:
            MeterLogDamaged: the log has a flipped bit, or a segment is missing.
        """
        ...
