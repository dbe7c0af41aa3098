"""From arrival times to figures: percentiles, medians over rounds, ratios. Arithmetic only."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median

LOWER_IS_BETTER = frozenset({"ms", "us", "s", "MB"})
"""Units of which less is better; of all others more is."""


@dataclass(slots=True, eq=False)
class Answer:
    """One answer as its reader saw it. Times are seconds on the reader's monotonic clock."""

    asked_s: float
    arrivals: list[tuple[float, int]] = field(default_factory=list[tuple[float, int]])
    """When something arrived, and how many tokens it was."""

    @property
    def tokens(self) -> int:
        return sum(tokens for _, tokens in self.arrivals)

    @property
    def ttft_ms(self) -> float | None:
        return (self.arrivals[0][0] - self.asked_s) * 1000 if self.arrivals else None

    @property
    def gaps_ms(self) -> list[float]:
        """What a reader waits between one arrival and the next, however many tokens it brings."""
        return [(b - a) * 1000 for (a, _), (b, _) in pairwise(self.arrivals)]


@dataclass(frozen=True, slots=True)
class Figures:
    """One closed loop in numbers."""

    values: Mapping[str, float]
    """By metric, named with its unit last: tok_s, ttft_p50_ms, ttft_p99_ms, itl_p50_ms, …"""
    cut: bool = False
    """True: the loop reached its time limit before all prompts were answered."""


UNITS = {
    "tok_s": "tok/s",
    "ttft_p50_ms": "ms",
    "ttft_p99_ms": "ms",
    "itl_p50_ms": "ms",
    "itl_p99_ms": "ms",
    "rss_mb": "MB",
}


def summarise(answers: Sequence[Answer], *, tokens_asked: int) -> Figures:
    """Figures of one loop.

    The rate is all tokens over the time from the first question to the last token. Percentiles
    are over all answers and over all gaps of all answers.

    Raises:
        ValueError: nothing arrived at all.
    """
    arrived = [answer for answer in answers if answer.arrivals]
    if not arrived:
        raise ValueError("no token arrived")
    began_s = min(answer.asked_s for answer in answers)
    ended_s = max(answer.arrivals[-1][0] for answer in arrived)
    tokens = sum(answer.tokens for answer in arrived)
    ttfts = [ttft for answer in arrived if (ttft := answer.ttft_ms) is not None]
    gaps = [gap for answer in arrived for gap in answer.gaps_ms]
    values = {
        "tok_s": tokens / (ended_s - began_s),
        "ttft_p50_ms": percentile(ttfts, 50),
        "ttft_p99_ms": percentile(ttfts, 99),
    }
    if gaps:
        values |= {"itl_p50_ms": percentile(gaps, 50), "itl_p99_ms": percentile(gaps, 99)}
    return Figures(values, cut=tokens < tokens_asked)


def percentile(values: Iterable[float], percent: float) -> float:
    """The value at or below which `percent` of all lie, between two neighbours in proportion.

    percentile([1, 2, 3, 4], 50) is 2.5; the first is 0, the last is 100.

    Raises:
        ValueError: there is no value.
    """
    ordered = sorted(values)
    if not ordered:
        raise ValueError("no values")
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def medians(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """For each metric the median over the rounds that have it."""
    names = dict.fromkeys(name for values in rounds for name in values)
    return {name: median(v[name] for v in rounds if name in v) for name in names}


def best(values: Iterable[float], unit: str) -> float | None:
    """The best of them; None if there are none."""
    found = list(values)
    if not found:
        return None
    return min(found) if unit in LOWER_IS_BETTER else max(found)


def ratio(ours: float, theirs: float | None) -> float | None:
    """Ours over theirs; None where there is nothing to compare with."""
    return ours / theirs if theirs else None
