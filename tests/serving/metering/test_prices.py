"""Price books: checked once, published for good, in force from their moment on."""

from pathlib import Path

import pytest

from headrace.serving.config import Config
from headrace.serving.domain.tier import Tier
from headrace.serving.domain.units import TEXT_UNITS
from headrace.serving.errors import AmountOutOfRange, ConfigRefused, InvalidRequest, UnknownUnit
from headrace.serving.metering import price_book
from headrace.serving.metering.price_shelf import PriceShelf

NOVEMBER = """
version: 2026-11
currency: USD
effective_from: 2026-11-01T00:00:00Z
models:
  chat: {prompt_tokens: 50000000, cache_read_tokens: 5000000, completion_tokens: 200000000}
  film: {video_ms/720p/24fps/audio: 100000000000}
tiers: {priority: 250}
"""
NOVEMBER_MS = 1_793_491_200_000


class Shop:
    """A home whose prices somebody publishes."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.shelf = PriceShelf(home / "prices", price_book.embedded(Config(home=home).prices))

    def writes(self, text: str, name: str = "draft.yaml") -> Path:
        path = self.home / name
        path.write_text(text)
        return path

    def publishes(self, text: str):
        return self.shelf.publish(self.writes(text))


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(tmp_path)


def test_a_book_is_in_force_from_its_moment_on(shop):
    shop.publishes(NOVEMBER)
    shop.publishes(NOVEMBER.replace("2026-11", "2026-12").replace("50000000,", "60000000,"))

    def at(unix_ms: int) -> tuple[str, int]:
        price = shop.shelf.price("chat", Tier.STANDARD, unix_ms=unix_ms)
        return price.version, price.prompt_nano_per_mtok

    assert at(NOVEMBER_MS - 1) == ("demo-1", 50_000_000)
    assert at(NOVEMBER_MS) == ("2026-11", 50_000_000)
    assert at(NOVEMBER_MS + 30 * 86_400_000) == ("2026-12", 60_000_000)


def test_a_tier_is_a_percentage_of_every_rate(shop):
    shop.publishes(NOVEMBER)

    book = shop.shelf.at(NOVEMBER_MS)

    assert book.price("chat", Tier.PRIORITY).completion_nano_per_mtok == 500_000_000
    assert book.price("chat", Tier.FLEX).completion_nano_per_mtok == 100_000_000
    assert dict(book.price("film", Tier.BATCH).rates) == {"video_ms/720p/24fps/audio": 5 * 10**10}


def test_work_without_a_rate_is_refused(shop):
    """An unknown price is not zero: neither of a model nor of a unit."""
    shop.publishes(NOVEMBER)
    book = shop.shelf.at(NOVEMBER_MS)

    with pytest.raises(UnknownUnit, match="no prices for model 'other'"):
        book.price("other", Tier.STANDARD)
    with pytest.raises(UnknownUnit, match="no rate for cache_write_tokens of 'chat'"):
        book.price("chat", Tier.STANDARD, needs=TEXT_UNITS)


def test_the_book_of_the_configuration_holds_until_one_is_published(shop):
    price = shop.shelf.price("anything", Tier.PRIORITY, unix_ms=1)

    assert price == Config(home=shop.home).price_for("anything", Tier.PRIORITY)


def test_publishing_the_same_again_changes_nothing(shop):
    first, is_new = shop.publishes(NOVEMBER)
    second, is_new_again = shop.publishes(NOVEMBER)

    assert (is_new, is_new_again) == (True, False)
    assert first == second
    assert (shop.home / "prices" / "2026-11.yaml").stat().st_mode & 0o777 == 0o444


def test_a_published_version_never_says_something_else(shop):
    shop.publishes(NOVEMBER)

    with pytest.raises(InvalidRequest, match="says something else"):
        shop.publishes(NOVEMBER.replace("50000000,", "60000000,"))
    with pytest.raises(InvalidRequest, match="at the same moment"):
        shop.publishes(NOVEMBER.replace("version: 2026-11", "version: other"))
    with pytest.raises(InvalidRequest, match=r"the one of config\.yaml"):
        shop.publishes(NOVEMBER.replace("version: 2026-11", "version: demo-1"))


def test_a_book_that_was_changed_on_disk_is_refused(shop):
    shop.publishes(NOVEMBER)
    path = shop.home / "prices" / "2026-11.yaml"
    path.chmod(0o600)
    path.write_text(NOVEMBER.replace("50000000,", "60000000,"))

    with pytest.raises(ConfigRefused, match="was changed after it was published"):
        Shop(shop.home)


def test_a_running_frontend_takes_in_what_another_process_publishes(shop):
    frontend = Shop(shop.home)
    shop.publishes(NOVEMBER)

    assert frontend.shelf.refresh()
    assert not frontend.shelf.refresh()
    assert frontend.shelf.at(NOVEMBER_MS).version == "2026-11"


def test_json_is_yaml_too(shop):
    path = shop.writes(
        '{"version": "j1", "currency": "JPY", "effective_from": "2026-11-01T09:00:00+09:00",'
        ' "models": {}, "default": {"image_pixels": 4000000}}',
        "book.json",
    )

    book = price_book.read(path)

    assert (book.currency, book.effective_unix_ms) == ("JPY", NOVEMBER_MS)
    assert dict(book.price("any", Tier.STANDARD).rates) == {"image_pixels": 4_000_000}


BAD = {
    "an unknown unit": ("prompt_tokens:", "prompt_words:", UnknownUnit),
    "a negative rate": ("50000000,", "-50000000,", AmountOutOfRange),
    "an overflowing rate": ("50000000,", f"{1 << 70},", AmountOutOfRange),
    "a rate in floats": ("50000000,", "0.05,", InvalidRequest),
    "a rate that a tier splits": ("50000000,", "50000001,", InvalidRequest),
    "a currency that is none": ("USD", "XXX", InvalidRequest),
    "no moment": ("2026-11-01T00:00:00Z", "soon", InvalidRequest),
    "a version that leaves the folder": ("version: 2026-11", "version: ../x", InvalidRequest),
    "an unknown key": ("tiers:", "teirs:", InvalidRequest),
    "an unknown tier": ("priority:", "urgent:", InvalidRequest),
    "a tier above all bounds": ("250", "10001", AmountOutOfRange),
    "no rates": ("{video_ms/720p/24fps/audio: 100000000000}", "{}", InvalidRequest),
    "a key that stands twice": ("currency: USD", "currency: USD\ncurrency: EUR", ConfigRefused),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_book_with_a_fault_is_not_published(shop, fault):
    before, after, refusal = BAD[fault]
    assert before in NOVEMBER

    with pytest.raises(refusal):
        shop.publishes(NOVEMBER.replace(before, after, 1))

    assert shop.shelf.published() == []
