"""What a receipt says: the times at the gateway's edge, and the verdict."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.serving.domain.tier import Objective, Terms, Tier, Verdict
from headrace.serving.domain.usage import Outcome
from headrace.serving.domain.verdict import Measured, judge
from headrace.serving.errors import (
    BudgetExhausted,
    Draining,
    EngineFault,
    InvalidRequest,
    Overloaded,
    ServingError,
    TierUnavailable,
)
from headrace.serving.gaps import GROWTH, Gaps
from headrace.serving.receipts import Stopwatch, receipt_of

PROMISED = Objective(ttft_ms_max=1_000, itl_ms_max=50, deadline_ms_max=10_000)
GOOD = Measured(ttft_us=1_000_000, itl_p50_us=20_000, itl_p99_us=50_000, elapsed_us=10_000_000)
SLOW = Measured(ttft_us=1_000_001, itl_p50_us=20_000, itl_p99_us=50_001, elapsed_us=10_000_001)
EARLY = Measured(elapsed_us=900_000)
WAITED = Measured(elapsed_us=1_200_000)


@pytest.mark.parametrize(
    ("measured", "outcome", "verdict", "missed"),
    [
        pytest.param(GOOD, Outcome.OK, "met", (), id="everything in time, to the microsecond"),
        pytest.param(
            SLOW, Outcome.OK, "missed", ("ttft", "itl", "deadline"), id="a microsecond late each"
        ),
        pytest.param(GOOD, Outcome.BUDGET, "met", (), id="ended by the caller's budget"),
        pytest.param(EARLY, Outcome.CANCELLED, "excluded", (), id="the caller left early"),
        pytest.param(
            WAITED, Outcome.CANCELLED, "missed", ("ttft",), id="the caller left after it was late"
        ),
        pytest.param(EARLY, Outcome.DEADLINE, "excluded", (), id="the caller allowed too little"),
        pytest.param(SLOW, Outcome.FAILED, "missed", ("availability",), id="a fault of ours"),
        pytest.param(EARLY, Outcome.EXPIRED, "missed", ("availability",), id="the frontend died"),
        pytest.param(EARLY, Outcome.REJECTED, "excluded", (), id="refused: the caller's reason"),
    ],
)
def test_the_verdict_follows_from_what_was_promised_and_measured(
    measured: Measured, outcome: Outcome, verdict: str, missed: tuple[str, ...]
) -> None:
    assert judge(PROMISED, measured, outcome) == (Verdict(verdict), missed)


def test_where_nothing_is_promised_nothing_is_missed() -> None:
    assert judge(Objective(), SLOW, Outcome.OK) == (Verdict.MET, ())


def test_an_answer_without_gaps_cannot_miss_them() -> None:
    one_chunk = Measured(ttft_us=1_000, elapsed_us=2_000)

    assert judge(PROMISED, one_chunk, Outcome.OK) == (Verdict.MET, ())


@pytest.mark.parametrize(
    ("kind", "outcome", "is_ours"),
    [
        pytest.param(Overloaded, Outcome.REJECTED, True, id="no capacity"),
        pytest.param(Draining, Outcome.REJECTED, True, id="we were shutting down"),
        pytest.param(EngineFault, Outcome.FAILED, True, id="a fault"),
        pytest.param(InvalidRequest, Outcome.REJECTED, False, id="cannot be answered"),
        pytest.param(BudgetExhausted, Outcome.REJECTED, False, id="its money is spent"),
        pytest.param(TierUnavailable, Outcome.REJECTED, False, id="beyond its lease"),
    ],
)
def test_a_refusal_counts_against_us_where_the_reason_is_ours(
    kind: type[ServingError], outcome: Outcome, is_ours: bool
) -> None:
    receipt = receipt_of(Terms(objective=PROMISED), EARLY, outcome, kind("", why="", fix=""))

    assert (receipt.verdict is Verdict.MISSED) == is_ours
    assert receipt.missed == (("availability",) if is_ours else ())


def test_a_receipt_names_the_tier_asked_for_and_the_one_that_served() -> None:
    terms = Terms(tier_asked=Tier.RESERVED, tier_served=Tier.STANDARD)

    receipt = receipt_of(terms, GOOD, Outcome.OK)

    assert (receipt.tier_asked, receipt.tier_served) == (Tier.RESERVED, Tier.STANDARD)
    assert (receipt.ttft_us, receipt.itl_p99_us) == (1_000_000, 50_000)


def test_gaps_are_those_between_chunks_of_one_answer() -> None:
    """Two answers in turn: each has chunks 40 ms apart, though one comes every 20."""
    stopwatch = Stopwatch(accepted_ms=100.0)
    for number in range(6):
        stopwatch.chunk(number % 2, 150.0 + 20 * number)

    measured = stopwatch.measured(now_ms=300.0)

    assert measured.ttft_us == 50_000
    assert (measured.itl_p50_us, measured.itl_p99_us) == (40_000, 40_000)
    assert measured.elapsed_us == 200_000


@given(
    gaps=st.lists(st.integers(0, 10**9), min_size=1, max_size=300), ppm=st.integers(1, 1_000_000)
)
@settings(deadline=None)
def test_a_quantile_is_never_below_the_exact_one_and_at_most_a_hundredth_above(
    gaps: list[int], ppm: int
) -> None:
    counted = Gaps()
    for gap in gaps:
        counted.add(gap)

    exact = sorted(max(gap, 1) for gap in gaps)[-(-len(gaps) * ppm // 1_000_000) - 1]
    found = counted.quantile_us(ppm)
    assert found is not None
    assert exact <= found <= exact * GROWTH * (1 + 1e-9)


def test_a_million_different_gaps_take_a_bounded_memory() -> None:
    counted = Gaps()
    for gap in range(1, 1_000_000, 37):
        counted.add(gap * 4_000)

    assert len(counted._counts) <= 2_212
    assert counted.quantile_us(1_000_000) == 3_600_000_000
