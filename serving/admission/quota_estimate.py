"""How long an answer will be: the 95th percentile of a tenant's recent answers by a model.

A reservation of `max_tokens` would block a tenant's rate for answers that are never that long; one
of the mean would let half of them overrun it. Exact over a bounded window, in whole numbers.
"""

from bisect import bisect_left, insort
from collections import OrderedDict, deque

WINDOW = 128
"""Answers remembered of each tenant and model: a change of habit counts after a hundred answers,
and a single odd one does not."""
LEARNED_AT = 20
"""Fewer say nothing about one in twenty."""
DEFAULT_TOKENS = 256
"""Until then. Half of what an answer without max_tokens may have."""
CLASSES_MAX = 10_000
"""Tenants times models that are remembered: 20 MB. The one not asked for longest is forgotten."""


class Percentile95:
    """Of the last WINDOW numbers, exactly: the smallest that 95 % of them do not exceed."""

    __slots__ = ("_recent", "_sorted", "value")

    def __init__(self) -> None:
        self._recent: deque[int] = deque()
        self._sorted: list[int] = []
        self.value = DEFAULT_TOKENS
        """The default until LEARNED_AT numbers were seen."""

    def add(self, number: int) -> None:
        if len(self._recent) == WINDOW:
            del self._sorted[bisect_left(self._sorted, self._recent.popleft())]
        self._recent.append(number)
        insort(self._sorted, number)
        if len(self._sorted) >= LEARNED_AT:
            self.value = self._sorted[-(-len(self._sorted) * 95 // 100) - 1]


class OutputEstimator:
    """By tenant and model. Belongs to one event loop."""

    def __init__(self) -> None:
        self._classes: OrderedDict[tuple[str, str], Percentile95] = OrderedDict()

    def of(self, tenant_id: str, model: str) -> Percentile95:
        """The class's estimate, made on first use."""
        key = (tenant_id, model)
        known = self._classes.get(key)
        if known is None:
            known = self._classes[key] = Percentile95()
            if len(self._classes) > CLASSES_MAX:
                self._classes.popitem(last=False)
        else:
            self._classes.move_to_end(key)
        return known
