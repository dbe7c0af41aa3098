"""Makes a request's receipt: what it was promised, what it got, and whether that is enough."""

from headrace.serving.domain.tier import Receipt, Terms
from headrace.serving.domain.usage import Outcome
from headrace.serving.domain.verdict import Measured, judge
from headrace.serving.errors import Code, ServingError
from headrace.serving.gaps import Gaps

_OURS = frozenset({Code.UNAVAILABLE, Code.INTERNAL})


def is_ours(error: ServingError | None) -> bool:
    """Whether an error is our doing: no capacity, or a fault. The rest are the caller's own."""
    return error is not None and error.code in _OURS


def receipt_of(
    terms: Terms, measured: Measured, outcome: Outcome, error: ServingError | None = None
) -> Receipt:
    """The receipt of a request that ended as `outcome`, with `error` if that is why."""
    verdict, missed = judge(terms.objective, measured, outcome, is_ours=is_ours(error))
    return Receipt(
        tier_asked=terms.tier_asked,
        tier_served=terms.tier_served,
        ttft_us=measured.ttft_us,
        itl_p50_us=measured.itl_p50_us,
        itl_p99_us=measured.itl_p99_us,
        verdict=verdict,
        missed=missed,
    )


class Stopwatch:
    """Times one request at the gateway's edge. Owned by the task that delivers."""

    __slots__ = ("_accepted_ms", "_gaps", "_last_ms", "ttft_ms")

    def __init__(self, accepted_ms: float) -> None:
        self._accepted_ms = accepted_ms
        self._gaps = Gaps()
        self._last_ms: dict[int, float] = {}
        self.ttft_ms: float | None = None
        """From acceptance to the first chunk."""

    def chunk(self, index: int, now_ms: float) -> None:
        """Answer `index` got a chunk. Gaps are those between chunks of one answer."""
        if self.ttft_ms is None:
            self.ttft_ms = now_ms - self._accepted_ms
        last_ms = self._last_ms.get(index)
        if last_ms is not None:
            self._gaps.add(round((now_ms - last_ms) * 1000))
        self._last_ms[index] = now_ms

    def measured(self, now_ms: float) -> Measured:
        """Everything up to `now_ms`, when the request ended."""
        return Measured(
            ttft_us=None if self.ttft_ms is None else round(self.ttft_ms * 1000),
            itl_p50_us=self._gaps.quantile_us(500_000),
            itl_p99_us=self._gaps.quantile_us(990_000),
            elapsed_us=round((now_ms - self._accepted_ms) * 1000),
        )
