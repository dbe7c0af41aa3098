"""Money: what a request costs, in integers."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.serving.domain.units import ImageUsage, VideoUsage, check_unit, video_unit
from headrace.serving.domain.usage import Price, Usage
from headrace.serving.errors import AmountOutOfRange, UnknownUnit

prices = st.builds(
    Price.text,
    version=st.just("v"),
    prompt_nano_per_mtok=st.integers(0, 10**11),
    cached_nano_per_mtok=st.integers(0, 10**11),
    completion_nano_per_mtok=st.integers(0, 10**11),
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
    price = Price.text(
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
def test_units_are_disjoint_and_complete(price: Price, usage: Usage):
    """Every token is in exactly one unit, so that no sum over units counts one twice."""
    assert sum(usage.quantities().values()) == usage.prompt_tokens + usage.completion_tokens
    assert price.charge_femto(usage) == sum(
        quantity * price.rates[unit] for unit, quantity in usage.quantities().items()
    )


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


def test_work_without_a_rate_is_not_priced_at_nothing():
    """A forgotten rate must not make video free."""
    price = Price(version="v", rates={"image_pixels": 5})
    video = VideoUsage(duration_ms=5_000, width=832, height=480, fps=16)

    with pytest.raises(UnknownUnit, match=r"no rate for video_ms/480p/16fps/silent"):
        price.charge_femto(video)


def test_a_video_is_charged_by_the_millisecond_of_its_class():
    """5 s at 480p, 16 frames a second, at 0.05 dollars a second: 0.25 dollars."""
    rates = {"video_ms/480p/16fps/silent": 50_000 * 10**6}
    video = VideoUsage(duration_ms=5_000, width=832, height=480, fps=16)

    assert Price(version="v", rates=rates).charge_nano(video) == 250_000_000


def test_images_are_charged_by_the_pixel():
    price = Price(version="v", rates={"image_pixels": 1_000})

    assert (
        price.charge_femto(ImageUsage(images=2, width=1024, height=512)) == 2 * 1024 * 512 * 1_000
    )


def test_a_sum_that_no_column_holds_is_refused():
    price = Price(version="v", rates={"image_pixels": 10**12})

    with pytest.raises(AmountOutOfRange):
        price.charge_femto(ImageUsage(images=10, width=1 << 10, height=1 << 10))


@pytest.mark.parametrize(
    ("width", "height", "unit"),
    [
        pytest.param(832, 480, "video_ms/480p/24fps/audio", id="below the class's bound"),
        pytest.param(480, 832, "video_ms/480p/24fps/audio", id="upright"),
        pytest.param(1280, 720, "video_ms/720p/24fps/audio", id="at the bound"),
        pytest.param(1281, 720, "video_ms/1080p/24fps/audio", id="just over it"),
    ],
)
def test_a_resolution_belongs_to_the_smallest_class_that_holds_it(width, height, unit):
    assert video_unit(width=width, height=height, fps=24, has_audio=True) == unit
    assert check_unit(unit) == unit


@pytest.mark.parametrize(
    "unit", ["tokens", "video_ms/8k/24fps/audio", "video_ms/480p/0fps/silent", ""]
)
def test_an_unknown_unit_is_refused(unit):
    with pytest.raises(UnknownUnit):
        check_unit(unit)
