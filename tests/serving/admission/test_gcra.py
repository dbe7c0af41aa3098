"""A rate is exact: to the token, to the nanosecond, whatever is taken and given back when."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.serving.admission.gcra import MINUTE_NS, GaugeBucket, RateBucket

SECOND_NS = 1_000_000_000


def bucket(limit: int = 60, burst: int = 10) -> RateBucket:
    """60 a minute: one each second."""
    return RateBucket(limit=limit, burst=burst, now_ns=0)


def test_a_burst_is_served_at_once_and_not_one_more():
    rate = bucket(limit=60, burst=10)

    assert [rate.take(1, 0) for _ in range(11)] == [True] * 10 + [False]
    assert rate.remaining(0) == 0


def test_a_token_is_there_again_to_the_nanosecond():
    """7 a minute: one each 8,571,428,571.43 ns, which no rounding may shorten."""
    rate = bucket(limit=7, burst=1)
    assert rate.take(1, 0)

    wait_ns = rate.wait_ns(1, 0)

    assert wait_ns == 8_571_428_572
    assert not rate.take(1, wait_ns - 1)
    assert rate.take(1, wait_ns)


def test_remaining_and_reset_are_exact():
    rate = bucket(limit=60, burst=10)
    rate.take(4, 0)

    assert (rate.remaining(0), rate.reset_ns(0)) == (6, 4 * SECOND_NS)
    assert (rate.remaining(1_500_000_000), rate.reset_ns(1_500_000_000)) == (7, 2_500_000_000)
    assert (rate.remaining(4 * SECOND_NS), rate.reset_ns(4 * SECOND_NS)) == (10, 0)


def test_what_is_given_back_can_be_taken_again_but_no_more_than_was_taken():
    rate = bucket(limit=60, burst=10)
    rate.take(10, 0)

    rate.give_back(3, 0)
    assert rate.remaining(0) == 3
    rate.give_back(100, 0)
    assert rate.remaining(0) == 10


def test_more_than_the_burst_never_fits():
    rate = bucket(limit=60, burst=10)

    assert rate.wait_ns(11, 0) is None
    assert not rate.take(11, 3600 * SECOND_NS)
    assert rate.remaining(3600 * SECOND_NS) == 10


def test_a_forced_charge_delays_what_comes_later():
    """An answer that grew longer than expected is not cut off; the next request waits for it."""
    rate = bucket(limit=60, burst=10)
    rate.charge(15)

    assert rate.remaining(0) == -5
    assert rate.wait_ns(1, 0) == 6 * SECOND_NS


def test_a_clock_that_is_set_back_refills_nothing_twice():
    rate = bucket(limit=60, burst=10)
    rate.take(10, 100 * SECOND_NS)

    assert not rate.take(1, 50 * SECOND_NS)
    assert not rate.take(1, 100 * SECOND_NS)
    assert rate.take(1, 101 * SECOND_NS)


def test_a_changed_limit_keeps_what_was_taken():
    """5 of 10 taken, then the rate is doubled: the same 5 tokens drain in half the time."""
    rate = bucket(limit=60, burst=10)
    rate.take(5, 0)

    rate.change(limit=120, burst=20, now_ns=0)

    assert (rate.remaining(0), rate.reset_ns(0)) == (15, 2_500_000_000)


def test_no_limit_loses_time_to_rounding():
    """A billion a minute is 16.67 tokens a microsecond: an hour of them is exact."""
    rate = RateBucket(limit=10**9, burst=10**9, now_ns=0)
    taken = 0
    for step in range(1, 3601):
        taken += rate.remaining(step * SECOND_NS)
        rate.charge(rate.remaining(step * SECOND_NS))

    assert taken == 10**9 + 10**9 * 3599 // 60


Act = tuple[int, int, bool]
ACTS = st.lists(
    st.tuples(st.integers(0, 3 * MINUTE_NS // 60), st.integers(0, 30), st.booleans()), max_size=40
)


@given(st.integers(1, 10_000), st.integers(1, 40), ACTS)
def test_a_bucket_agrees_with_a_sliding_window_over_everything_that_ever_happened(
    limit: int, burst: int, acts: list[Act]
):
    """Over every span that ends now: what was taken in it, less what the span lets drain."""
    rate = RateBucket(limit=limit, burst=burst, now_ns=0)
    history: list[tuple[int, int]] = []
    now = 0

    def debt() -> Fraction:
        sums, total = [Fraction(0)], 0
        for at, num in reversed(history):
            total += num
            sums.append(total - Fraction((now - at) * limit, MINUTE_NS))
        return max(sums)

    for pause, num, gives in acts:
        now += pause
        if gives:
            rate.give_back(num, now)
            history.append((now, -num))
        else:
            fits = debt() + num <= burst
            assert rate.take(num, now) is fits
            if fits:
                history.append((now, num))
        assert rate.remaining(now) == (burst - debt()).__floor__()
        assert rate.reset_ns(now) == (debt() * MINUTE_NS / limit).__ceil__()


@given(st.integers(1, 10**12), st.integers(1, 10**12), st.integers(0, 10**19), st.data())
def test_the_time_to_wait_is_the_first_at_which_it_fits(limit: int, burst: int, now: int, data):
    rate = RateBucket(limit=limit, burst=burst, now_ns=now)
    rate.charge(data.draw(st.integers(0, 2 * burst)))
    num = data.draw(st.integers(1, burst))

    wait_ns = rate.wait_ns(num, now)

    assert wait_ns is not None
    assert wait_ns == 0 or not rate.fits(num, now + wait_ns - 1)
    assert rate.fits(num, now + wait_ns)


def test_places_are_taken_and_given_back():
    places = GaugeBucket(limit=2)
    places.charge(1)
    places.charge(1)

    assert not places.fits(1, 0)
    assert places.wait_ns(3, 0) is None
    places.give_back(1, 0)
    assert places.fits(1, 0)
    with pytest.raises(AssertionError, match="more than was taken"):
        places.give_back(2, 0)
