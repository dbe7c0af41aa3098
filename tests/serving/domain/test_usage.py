"""Money: what a request costs, in integers."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.serving.domain.usage import Price, Usage

prices = st.builds(
    Price,
    version=st.just("v"),
    prompt_nano_per_mtok=st.integers(0, 10**15),
    cached_nano_per_mtok=st.integers(0, 10**15),
    completion_nano_per_mtok=st.integers(0, 10**15),
)


@st.composite
def usages(draw) -> Usage:
    prompt, completion = draw(st.integers(0, 10**7)), draw(st.integers(0, 10**7))
    return Usage(
        prompt_tokens=prompt,
        cached_tokens=draw(st.integers(0, prompt)),
        completion_tokens=completion,
        reasoning_tokens=draw(st.integers(0, completion)),
    )


def test_a_worked_example():
    """90 fresh, 10 cached and 20 completion tokens at 1, 0.1 and 2 dollars per million."""
    price = Price(
        version="v",
        prompt_nano_per_mtok=10**9,
        cached_nano_per_mtok=10**8,
        completion_nano_per_mtok=2 * 10**9,
    )

    usage = Usage(prompt_tokens=100, cached_tokens=10, completion_tokens=20)

    assert price.charge_nano(usage) == 131_000


@given(prices, usages())
def test_the_charge_is_the_exact_price_rounded_up_once(price: Price, usage: Usage):
    exact = Fraction(
        (usage.prompt_tokens - usage.cached_tokens) * price.prompt_nano_per_mtok
        + usage.cached_tokens * price.cached_nano_per_mtok
        + usage.completion_tokens * price.completion_nano_per_mtok,
        10**6,
    )

    charge = price.charge_nano(usage)

    assert isinstance(charge, int)
    assert 0 <= charge - exact < 1


@given(prices)
def test_nothing_used_is_nothing_charged(price: Price):
    assert price.charge_nano(Usage()) == 0


@given(prices, usages())
def test_a_charge_that_prices_allow_fits_a_64_bit_column(price: Price, usage: Usage):
    """10^15 nano a million tokens, 2 * 10^7 tokens: 2 * 10^16, far below 9 * 10^18."""
    assert price.charge_nano(usage) < 1 << 63


@pytest.mark.parametrize(
    "counts",
    [
        {"prompt_tokens": 1, "cached_tokens": 2},
        {"completion_tokens": 1, "reasoning_tokens": 2},
        {"prompt_tokens": -1, "cached_tokens": -1},
    ],
)
def test_a_part_is_never_more_than_its_whole(counts):
    with pytest.raises(AssertionError):
        Usage(**counts)
