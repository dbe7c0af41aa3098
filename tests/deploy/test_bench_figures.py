"""From arrival times to figures."""

import pytest

from headrace.deploy.bench.figures import (
    Answer,
    best,
    medians,
    percentile,
    ratio,
    summarise,
)


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [
        pytest.param([7.0], 99, 7.0, id="one value is every percentile"),
        pytest.param([4.0, 1.0, 3.0, 2.0], 50, 2.5, id="between two neighbours in proportion"),
        pytest.param([1.0, 2.0, 3.0], 0, 1.0, id="the first is 0"),
        pytest.param([1.0, 2.0, 3.0], 100, 3.0, id="the last is 100"),
        pytest.param([float(n) for n in range(101)], 99, 99.0, id="p99 of a hundred steps"),
    ],
)
def test_a_percentile_is_read_off_the_sorted_values(values, percent, expected) -> None:
    assert percentile(values, percent) == pytest.approx(expected)


def test_a_percentile_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no values"):
        percentile([], 50)


def test_a_rate_is_all_tokens_from_the_first_question_to_the_last_token() -> None:
    """Two callers overlap; time in which nobody was answered yet counts."""
    answers = [
        Answer(10.0, [(10.5, 1), (10.6, 1), (10.8, 2)]),
        Answer(10.2, [(11.0, 1), (12.0, 3)]),
    ]

    found = summarise(answers, tokens_asked=8)

    assert found.values["tok_s"] == pytest.approx(8 / 2.0)
    assert found.values["ttft_p50_ms"] == pytest.approx(650)
    assert found.values["itl_p50_ms"] == pytest.approx(200)
    assert found.cut is False


def test_a_chunk_of_several_tokens_is_one_wait_for_its_reader() -> None:
    """Counting such tokens one by one would report gaps of zero that nobody sees."""
    answer = Answer(0.0, [(1.0, 1), (1.5, 4)])

    assert answer.tokens == 5
    assert answer.gaps_ms == [500]


def test_a_loop_that_was_cut_off_says_so_and_counts_what_came() -> None:
    found = summarise([Answer(0.0, [(1.0, 1), (2.0, 1)]), Answer(1.9)], tokens_asked=256)

    assert found.cut is True
    assert found.values["tok_s"] == pytest.approx(1.0)


def test_an_engine_that_delivers_nothing_has_no_figures() -> None:
    with pytest.raises(ValueError, match="no token arrived"):
        summarise([Answer(0.0)], tokens_asked=128)


def test_a_median_is_over_the_rounds_that_have_the_metric() -> None:
    rounds = [{"tok_s": 90.0}, {"tok_s": 110.0, "itl_p99_ms": 5.0}, {"tok_s": 100.0}]

    assert medians(rounds) == {"tok_s": 100.0, "itl_p99_ms": 5.0}
    assert medians([]) == {}


def test_the_best_rate_is_the_highest_and_the_best_time_the_lowest() -> None:
    assert best([3.0, 9.0], "tok/s") == 9.0
    assert best([3.0, 9.0], "ms") == 3.0
    assert best([], "ms") is None


def test_without_a_peer_there_is_no_ratio() -> None:
    assert ratio(150.0, 100.0) == pytest.approx(1.5)
    assert ratio(150.0, None) is None
