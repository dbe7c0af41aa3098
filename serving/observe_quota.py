"""The metrics of limits and budgets. Part of the table that observe.py begins."""

from collections.abc import Iterable, Sequence
from enum import StrEnum

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric as MetricFamily
from prometheus_client.registry import Collector

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


class QuotaMetrics(Collector):
    """Labels are closed sets: nothing that a caller or an operator names becomes one.

    Counts are plain numbers of one event loop, put into a scrape's form when it comes: a decision
    takes five microseconds, and a locked counter would be a tenth of it.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        """In a process's registry, or in none."""
        self._decisions = {
            (metric, result): 0
            for metric in (None, *Metric)
            for result in Decision
            if (metric is None) == (result is Decision.ALLOWED)
        }
        self._left: dict[Metric, float] = {}
        if registry is not None:
            registry.register(self)

    def decided(self, metric: Metric | None, result: Decision) -> None:
        """`metric` is the limit that decided; None when everything passed."""
        self._decisions[metric, result] += 1

    def budgets(self, left: Iterable[tuple[Limit, int]]) -> None:
        """Budgets with what is left of each, in femto-currency."""
        self._left = {}
        for limit, femto in left:
            if limit.metric.is_budget:
                share = max(0.0, femto / (limit.limit * FEMTO_PER_NANO))
                self._left[limit.metric] = min(share, self._left.get(limit.metric, 1.0))

    def collect(self) -> Iterable[MetricFamily]:
        decisions = CounterMetricFamily(DECISIONS.name, _help(DECISIONS), labels=DECISIONS.labels)
        for (metric, result), count in self._decisions.items():
            decisions.add_metric([metric or _ALL, result], count)
        left = GaugeMetricFamily(BUDGET_LEFT.name, _help(BUDGET_LEFT), labels=BUDGET_LEFT.labels)
        for metric, share in self._left.items():
            left.add_metric([metric], share)
        return [decisions, left]


def _help(spec: Spec) -> str:
    return f"{spec.what} {spec.act}"
