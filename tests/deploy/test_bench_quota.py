"""The benchmark of admission: every figure is there, in the unit that its name says."""

from pathlib import Path

import pytest

from headrace.deploy.bench import machine, quota
from headrace.deploy.bench.machine import Machine

MACHINE = Machine(
    cpu="a CPU",
    cores=2,
    flags=["avx2"],
    memory_gb=24,
    kernel="6.1",
    python="3.11",
    read_gb_s={"1": 30.0},
    int8_gop_s=None,
    load_average=0.1,
    others_cores=0.4,
)


def test_a_short_run_reports_every_figure_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "measure", lambda: MACHINE)

    report = quota.bench_quota(
        quota.Options(rounds=1, blocks=1), tmp_path / "home", lambda line: None
    )

    acts = ["decision_p50_us", "decision_p99_us", "cover_p50_us", "settle_p50_us"]
    assert [(row.name, row.metric) for row in report.rows] == [
        *(("admission/6 limits", act) for act in acts),
        *(("admission/0 limits", act) for act in acts),
        ("admission/lease", "lease_p50_ms"),
    ]
    assert all(row.metric.endswith(f"_{row.unit}") and row.value > 0 for row in report.rows)
    assert list((tmp_path / "home").iterdir()) == [], "the authority's file stayed behind"
