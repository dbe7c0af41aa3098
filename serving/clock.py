"""Time as a dependency, so that tests own it."""

import time
from typing import Protocol


class Clock(Protocol):
    def monotonic_ms(self) -> float:
        """Milliseconds on a clock that never runs backwards; for deadlines and durations."""
        ...

    def unix_ms(self) -> int:
        """Milliseconds since 1970 UTC; for records."""
        ...


class SystemClock:
    def monotonic_ms(self) -> float:
        return time.monotonic_ns() / 1e6

    def unix_ms(self) -> int:
        return time.time_ns() // 1_000_000
