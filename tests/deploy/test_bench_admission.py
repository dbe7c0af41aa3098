"""The admission benchmark: which figures there are, and that they come from real checks."""

from headrace.deploy.bench.admission import bench_key_check
from headrace.deploy.bench.report import OURS


def test_a_key_is_checked_whether_it_is_good_wrong_or_unknown():
    rows = bench_key_check()

    assert [row.name for row in rows] == [
        "admission/key check, good",
        "admission/key check, wrong",
        "admission/key check, unknown",
    ]
    assert {(row.peer, row.metric, row.unit) for row in rows} == {(OURS, "check_p50_us", "us")}
    assert all(row.value > 0 for row in rows)
