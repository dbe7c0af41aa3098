"""Clocks that move when told to."""

from headrace.serving.clock import SystemClock


class ManualClock:
    def __init__(self, now_ms: float = 1_700_000_000_000) -> None:
        self.now_ms = now_ms

    def monotonic_ms(self) -> float:
        return self.now_ms

    def unix_ms(self) -> int:
        return int(self.now_ms)

    def advance(self, *, seconds: float = 0, ms: float = 0) -> None:
        self.now_ms += seconds * 1000 + ms


class LeapingClock(SystemClock):
    """The system's clock, whose calendar is ahead by as much as it is told."""

    def __init__(self) -> None:
        self.ahead_s = 0

    def unix_ms(self) -> int:
        return super().unix_ms() + self.ahead_s * 1000
