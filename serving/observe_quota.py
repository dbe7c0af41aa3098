"""The metrics of limits and budgets. Part of the table that observe.py begins."""

from collections.abc import Iterable, Sequence
from enum import StrEnum

from prometheus_client import CollectorRegistry, Counter, Gauge

from headrace.serving.domain.limit import Limit, Metric
from headrace.serving.domain.usage import FEMTO_PER_NANO
from headrace.serving.observe import Spec


class Decision(StrEnum):
    """What a limit did to a request."""

    ALLOWED = "allowed"
    REFUSED = "refused"
    ENDED = "ended"
    """A hard budget ended it in the middle."""
    WARNED = "warned"
    """A soft budget is spent; the request went on."""


DECISIONS = Spec(
    "headrace_quota_decisions_total",
    "What limits did to requests: by metric, `all` when everything passed.",
    "Refusals of one metric rise: see `headrace limits list` for who is at the limit.",
    ("metric", "result"),
)
BUDGET_LEFT = Spec(
    "headrace_budget_left_ratio",
    "Share that is left of the budget that is nearest to its end, by metric.",
    "Near 0: see `headrace budgets`, and tell the tenant before requests end in the middle.",
    ("metric",),
)
TABLE: Sequence[Spec] = (DECISIONS, BUDGET_LEFT)

_ALL = "all"


class QuotaMetrics:
    """Labels are closed sets: nothing that a caller or an operator names becomes one."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        """In a process's registry, or in one of its own."""
        registry = registry or CollectorRegistry()
        decisions = Counter(
            DECISIONS.name,
            f"{DECISIONS.what} {DECISIONS.act}",
            DECISIONS.labels,
            registry=registry,
        )
        self._decisions = {
            (metric, result): decisions.labels(metric or _ALL, result)
            for metric in (None, *Metric)
            for result in Decision
            if (metric is None) == (result is Decision.ALLOWED)
        }
        self._left = Gauge(
            BUDGET_LEFT.name,
            f"{BUDGET_LEFT.what} {BUDGET_LEFT.act}",
            BUDGET_LEFT.labels,
            registry=registry,
        )

    def decided(self, metric: Metric | None, result: Decision) -> None:
        """`metric` is the limit that decided; None when everything passed."""
        self._decisions[metric, result].inc()

    def budgets(self, left: Iterable[tuple[Limit, int]]) -> None:
        """Budgets with what is left of each, in femto-currency."""
        least: dict[Metric, float] = {}
        for limit, femto in left:
            if limit.metric.is_budget:
                share = max(0.0, femto / (limit.limit * FEMTO_PER_NANO))
                least[limit.metric] = min(share, least.get(limit.metric, 1.0))
        self._left.clear()
        for metric, share in least.items():
            self._left.labels(metric).set(share)
