"""The frontend benchmark's arithmetic."""

import pytest

from headrace.deploy.bench.figures import Answer
from headrace.deploy.bench.frontend import BARE, SERVE, to_rows
from headrace.deploy.bench.frontend_client import summarise

PACED, FAST = "frontend/64 streams at 45 tok/s", "frontend/64 streams at 300 tok/s"


def values(messages_s: float, ttft_ms: float) -> list[dict[str, float]]:
    return [{"tok_s": messages_s, "messages_s": messages_s, "ttft_p50_ms": ttft_ms}]


def found(results):
    return {(row.name, row.peer, row.metric): row for row in to_rows(results)}


def test_ours_is_compared_with_bare_grpc_and_the_first_tokens_overhead_is_a_difference() -> None:
    rows = found({(PACED, BARE): values(2880, 1.2), (PACED, "headrace"): values(2736, 2.7)})

    assert rows[PACED, "headrace", "tok_s"].ratio == pytest.approx(0.95)
    assert rows[PACED, "headrace", "ttft_over_bare_p50_ms"].value == pytest.approx(1.5)
    assert rows[PACED, BARE, "tok_s"].ratio is None


def test_saturated_is_the_most_that_a_server_delivered_at_any_pace() -> None:
    """A server that collapses under more than it can carry is judged by its better pace."""
    rows = found(
        {
            (PACED, SERVE): values(2400, 9.0),
            (FAST, SERVE): values(1600, 90.0),
            (PACED, "headrace"): values(2880, 2.0),
            (FAST, "headrace"): values(14_400, 60.0),
        }
    )

    assert rows["frontend/saturated", SERVE, "messages_s"].value == 2400
    assert rows["frontend/saturated", "headrace", "messages_s"].ratio == pytest.approx(6.0)


def test_only_what_arrives_after_the_ramp_is_counted() -> None:
    answers = [
        Answer(0.0, [(0.5, 1), (1.5, 1), (2.5, 2)]),
        Answer(2.0, [(2.1, 1), (3.5, 1)]),
    ]

    got = summarise(answers, from_s=1.0, to_s=3.0)

    assert got.tok_s == pytest.approx(4 / 2)
    assert got.messages_s == pytest.approx(3 / 2)
    assert got.ttft_p50_ms == pytest.approx(100)
    assert got.messages_in_all == 5


def test_a_server_that_answers_nobody_twice_is_timed_by_its_first_answers() -> None:
    got = summarise([Answer(0.0, [(0.2, 1), (1.4, 1)])], from_s=1.0, to_s=3.0)

    assert got.ttft_p50_ms == pytest.approx(200)
