"""`headrace bench meter`: rows that compare our commits with the bare disk's."""

from headrace.deploy.bench.meter import NO_METER, RAW, Options, bare_disk, run, to_rows
from headrace.deploy.bench.report import OURS


def test_our_commits_are_compared_with_the_disks_in_the_same_round():
    results = {
        (16, RAW): [{"commit_p50_ms": 2.0, "commit_p99_ms": 9.0, "events_s": 400.0}],
        (16, NO_METER): [{"cpu_us": 4.0}],
        (16, OURS): [
            {"commit_p50_ms": 3.0, "commit_p99_ms": 9.0, "events_s": 8_000.0, "cpu_us": 20.0},
            {"commit_p50_ms": 5.0, "commit_p99_ms": 9.0, "events_s": 6_000.0, "cpu_us": 22.0},
        ],
    }

    rows = {(row.peer, row.metric): row for row in to_rows(results)}

    assert rows[OURS, "commit_p50_ms"].value == 4.0
    assert rows[OURS, "commit_p50_ms"].ratio == 2.0
    assert rows[OURS, "events_s"].ratio == 17.5
    assert rows[OURS, "cpu_us"].ratio is None
    assert rows[NO_METER, "cpu_us"].value == 4.0
    assert {row.name for row in rows.values()} == {"meter/producers=16"}


def test_the_bare_disk_leaves_nothing_behind(tmp_path):
    figures = bare_disk(tmp_path)

    assert 0 < figures["commit_p50_ms"] <= figures["commit_p99_ms"]
    assert list(tmp_path.iterdir()) == []


def test_a_short_run_has_every_figure(tmp_path):
    report = run(Options(producers=(4,), rounds=1, seconds=0.1), tmp_path, lambda _: None)

    found = {(row.peer, row.metric) for row in report.rows}
    wanted = {(OURS, metric) for metric in ("events_s", "commit_p50_ms", "commit_p99_ms", "cpu_us")}
    assert wanted <= found
    assert report.roofline["fdatasync_p50_ms"]
    assert list((tmp_path / "bench").iterdir()) == []
