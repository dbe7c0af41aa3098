"""Gaps between chunks of a request, kept in a bounded number of counters.

A request has as many gaps as tokens, so they are counted in classes whose bounds grow by 1 %:
from 1 us to an hour that is 2,212 classes at most, and an answer at a steady pace fills a few
dozen. A quantile is the greatest gap that was seen in its class, so it is never below the exact
one and at most 1 % above: an error goes against us. The greatest gap of all is exact.
"""

from math import log

GROWTH = 1.01
_PER_CLASS = 1 / log(GROWTH)
GAP_US_MAX = 3_600_000_000
"""An hour; a longer gap counts as this."""


class Gaps:
    """Owned by the task that delivers."""

    __slots__ = ("_counts", "_greatest", "num_gaps")

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self._greatest: dict[int, int] = {}
        self.num_gaps = 0

    def add(self, gap_us: int) -> None:
        """Count one gap; below a microsecond counts as one."""
        gap_us = min(max(gap_us, 1), GAP_US_MAX)
        index = int(log(gap_us) * _PER_CLASS)
        self._counts[index] = self._counts.get(index, 0) + 1
        if gap_us > self._greatest.get(index, 0):
            self._greatest[index] = gap_us
        self.num_gaps += 1

    def quantile_us(self, ppm: int) -> int | None:
        """The smallest gap that `ppm` millionths of all do not exceed; None without gaps.

        The p99 of fewer than 100 gaps is the greatest of them.
        """
        if not self.num_gaps:
            return None
        wanted = -(-self.num_gaps * ppm // 1_000_000)
        for index in sorted(self._counts):
            wanted -= self._counts[index]
            if wanted <= 0:
                return self._greatest[index]
        raise AssertionError("quantiles end at 1,000,000 ppm")
