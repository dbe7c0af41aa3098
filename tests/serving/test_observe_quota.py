"""Metrics of limits: closed labels, and budgets by the one that is nearest to its end."""

from headrace.serving.domain.limit import Limit, Metric
from headrace.serving.observe import Metrics
from headrace.serving.observe_quota import TABLE, Decision, QuotaMetrics


def scrape(metrics: Metrics) -> str:
    return metrics.render()[0].decode()


def budget(subject: str, nano: int) -> Limit:
    return Limit(subject=subject, metric=Metric.BUDGET_DAY, limit=nano)


def test_decisions_are_counted_by_what_decided():
    metrics = Metrics()
    quota = QuotaMetrics(metrics.registry)
    for _ in range(3):
        quota.decided(None, Decision.ALLOWED)
    quota.decided(Metric.KV_TOKENS, Decision.REFUSED)

    seen = scrape(metrics)
    assert 'headrace_quota_decisions_total{metric="all",result="allowed"} 3.0' in seen
    assert 'headrace_quota_decisions_total{metric="kv_tokens",result="refused"} 1.0' in seen


def test_of_many_budgets_the_one_nearest_to_its_end_is_shown_and_nobody_is_named():
    metrics = Metrics()
    quota = QuotaMetrics(metrics.registry)
    quota.budgets([(budget("organisation:a", 100), 90 * 10**6), (budget("key:b", 10), 10**6)])

    seen = scrape(metrics)
    assert 'headrace_budget_left_ratio{metric="budget_nano_per_day"} 0.1' in seen
    assert "organisation:a" not in seen
    quota.budgets([(budget("key:b", 10), -5)])
    assert 'headrace_budget_left_ratio{metric="budget_nano_per_day"} 0.0' in scrape(metrics)


def test_every_metric_of_limits_has_advice_and_appears_in_a_scrape():
    metrics = Metrics()
    QuotaMetrics(metrics.registry)

    for spec in TABLE:
        assert spec.what.endswith(".")
        assert spec.act.endswith(".")
        assert f"# HELP {spec.name} " in scrape(metrics)
