"""Metrics: what a scrape shows, and that nothing a caller sends can make it grow."""

import re
from dataclasses import dataclass

import pytest

from headrace.serving.domain.usage import Outcome, Usage
from headrace.serving.errors import Overloaded
from headrace.serving.observe import MODELS_MAX, OTHER, TABLE, Metrics


@dataclass
class Load:
    running: int = 3
    waiting: int = 2
    kv_blocks_free: int = 25
    kv_blocks_total: int = 100
    step_ms: float = 20.0
    step_rows: int = 8
    step_tokens: int = 40
    rows_max: int = 32
    recomputed_tokens_total: int = 0
    overhead_share: float = 0.05


def scrape(metrics: Metrics) -> dict[str, float]:
    lines = metrics.render()[0].decode().splitlines()
    return {
        name: float(value)
        for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    }


def test_tokens_are_counted_once_each_by_kind():
    """10 prompt tokens of which 4 cached, 7 answered of which 2 thought: 6 + 4 + 5 + 2 = 17."""
    metrics = Metrics()

    metrics.model("m").settled(
        Outcome.OK,
        Usage(prompt_tokens=10, cached_tokens=4, completion_tokens=7, reasoning_tokens=2),
    )

    seen = scrape(metrics)
    kinds = ("prompt", "cached", "completion", "reasoning")
    counts = [seen[f'headrace_tokens_total{{kind="{kind}",model="m"}}'] for kind in kinds]
    assert counts == [6, 4, 5, 2]
    assert seen['headrace_requests_total{model="m",outcome="ok"}'] == 1


def test_a_steps_load_becomes_step_time_occupancy_and_gauges():
    metrics = Metrics()

    metrics.model("m").step("replica-1", Load())

    seen = scrape(metrics)
    assert seen['headrace_step_seconds_sum{model="m"}'] == pytest.approx(0.02)
    assert seen['headrace_batch_occupancy_ratio_sum{model="m"}'] == pytest.approx(8 / 32)
    assert seen['headrace_step_overhead_ratio_sum{model="m"}'] == pytest.approx(0.05)
    assert seen['headrace_step_tokens_total{model="m"}'] == 40
    assert seen['headrace_kv_used_ratio{model="m"}'] == pytest.approx(0.75)


def test_gauges_show_the_fullest_replica_and_forget_one_that_left():
    """An average would hide the replica that preempts."""
    metrics = Metrics()
    metrics.model("m").heartbeat("a", Load(kv_blocks_free=90, running=1, waiting=0))
    metrics.model("m").heartbeat("b", Load(kv_blocks_free=10, running=5, waiting=4))
    both = scrape(metrics)

    metrics.replica_left("b")
    metrics.replica_left("b")

    left = scrape(metrics)
    assert both['headrace_kv_used_ratio{model="m"}'] == pytest.approx(0.9)
    assert both['headrace_sequences_running{model="m"}'] == 6
    assert left['headrace_kv_used_ratio{model="m"}'] == pytest.approx(0.1)
    assert left['headrace_sequences_waiting{model="m"}'] == 0


def test_a_heartbeat_is_no_step():
    metrics = Metrics()

    metrics.model("m").heartbeat("a", Load())
    metrics.model("m").step("a", Load(step_rows=0))

    assert scrape(metrics)['headrace_step_seconds_count{model="m"}'] == 0


def test_recomputed_tokens_are_counted_from_the_replicas_own_total():
    """A frontend that joins late must not claim what happened before."""
    metrics = Metrics()

    for total in (1000, 1000, 1064):
        metrics.model("m").heartbeat("a", Load(recomputed_tokens_total=total))

    assert scrape(metrics)['headrace_recomputed_tokens_total{model="m"}'] == 64


def test_models_beyond_the_bound_share_one_label():
    metrics = Metrics()

    for i in range(MODELS_MAX + 10):
        metrics.model(f"m{i}").first_token(0.1)

    seen = scrape(metrics)
    labels = {name for name in seen if name.startswith("headrace_ttft_seconds_count")}
    assert len(labels) == MODELS_MAX + 1
    assert seen[f'headrace_ttft_seconds_count{{model="{OTHER}"}}'] == 10


def test_a_reason_that_is_not_ours_is_counted_as_other():
    metrics = Metrics()

    metrics.rejected(Overloaded.reason)
    metrics.rejected("made-up by a caller")

    seen = scrape(metrics)
    assert seen['headrace_rejections_total{reason="OVERLOADED"}'] == 1
    assert seen['headrace_rejections_total{reason="other"}'] == 1
    assert not any("made-up" in name for name in seen)


def test_open_streams_are_counted_down_however_they_end():
    metrics = Metrics()

    with metrics.stream():
        during = scrape(metrics)["headrace_streams_open"]
        with pytest.raises(OSError, match="gone"), metrics.stream():
            raise OSError("gone")

    assert (during, scrape(metrics)["headrace_streams_open"]) == (1, 0)


def test_every_metric_has_a_lawful_name_a_bound_and_advice():
    """The table is the operator's manual: a metric without advice is noise."""
    names = [spec.name for spec in TABLE]

    assert len(names) == len(set(names)) >= 20
    for spec in TABLE:
        assert re.fullmatch(r"headrace_[a-z_]+", spec.name)
        assert spec.what.endswith(".")
        assert spec.act.endswith(".")
        assert set(spec.labels) <= {"model", "kind", "outcome", "reason", "stored", "version"}
        assert list(spec.buckets) == sorted(spec.buckets)


def test_every_metric_of_the_table_appears_in_a_scrape():
    metrics = Metrics(version="1")
    metrics.model("m").step("a", Load())
    metrics.replicas_ready("m", 1)

    body = metrics.render()[0].decode()

    for spec in TABLE:
        assert f"# HELP {spec.name} " in body, spec.name


def test_a_scraper_gets_the_format_it_asks_for():
    plain, openmetrics = Metrics().render(""), Metrics().render("application/openmetrics-text")

    assert plain[1].startswith("text/plain")
    assert openmetrics[1].startswith("application/openmetrics-text")
    assert openmetrics[0].endswith(b"# EOF\n")


def test_two_frontends_in_one_process_do_not_share_counters():
    first, second = Metrics(), Metrics()

    first.model("m").failed_over()

    assert 'headrace_failovers_total{model="m"}' not in scrape(second)
