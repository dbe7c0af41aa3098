"""A frontend's books over several of its lives."""

import asyncio
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from headrace.serving.config import Config
from headrace.serving.domain.record import Opening, Settlement
from headrace.serving.domain.tier import Tier
from headrace.serving.domain.usage import Outcome, Price, Usage
from headrace.serving.errors import MeterLogDamaged
from headrace.serving.metering.books import Books
from headrace.serving.observe import Metrics
from headrace.serving.testing.clock import ManualClock

NOVEMBER_27 = 1_795_773_600_000
"""2026-11-27, ten in the morning UTC."""
PRICE = Price.text(
    version="book-1", prompt_nano_per_mtok=10**6, cached_nano_per_mtok=0, completion_nano_per_mtok=0
)
"""10^6 femto for each prompt token."""


class Life:
    """One life of a frontend, with the verbs of its pipeline."""

    def __init__(self, home: Path, epoch: str, clock: ManualClock) -> None:
        self.clock = clock
        self.books = Books(Config(home=home), clock=clock, metrics=Metrics(), epoch=epoch)

    def charges(self, request_id: str, tokens: int, **caller: str) -> None:
        opening = Opening(
            tenant_id="acme",
            request_id=request_id,
            key_id="k1",
            model="m",
            version="v1",
            price=PRICE,
            accepted_unix_ms=self.clock.unix_ms(),
            tier=Tier.STANDARD,
        )
        usage = Usage(prompt_tokens=tokens, completion_tokens=1)
        settlement = Settlement(
            tenant_id=caller.get("tenant_id", "acme"),
            request_id=request_id,
            usage=usage,
            outcome=Outcome.OK,
            charge_femto=PRICE.charge_femto(usage),
            version="v1",
            first_token_unix_ms=None,
            settled_unix_ms=self.clock.unix_ms(),
        )

        async def serve() -> None:
            await self.books.meter.open(replace(opening, **caller))
            await self.books.meter.settle(settlement)

        asyncio.run(serve())

    def spent(self, limit_name: str, period: str = "", *, epoch: str = "one") -> int | None:
        femto = self.books.spent_femto(epoch=epoch, limit_name=limit_name, period=period)
        return None if femto is None else femto // 10**6


@pytest.fixture
def later(tmp_path: Path):
    """The second life; the first one charged 1 + 2 + 4 + 8 tokens to various callers."""
    clock = ManualClock(NOVEMBER_27)
    one = Life(tmp_path, "one", clock)
    one.charges("a", 1)
    one.charges("b", 2, project_id="search")
    one.charges("c", 4, key_id="k2", model="other")
    one.charges("d", 8, tenant_id="globex")
    one.books.close()
    two = Life(tmp_path, "two", clock)
    two.charges("e", 16)
    yield two
    two.books.close()


@pytest.mark.parametrize(
    ("limit_name", "tokens"),
    [
        pytest.param("organisation:acme|*|budget_nano_total|USD", 7, id="an organisation"),
        pytest.param("organisation:acme|other|budget_nano_total|USD", 4, id="one of its models"),
        pytest.param("project:acme/search|*|budget_nano_total|USD", 2, id="a project"),
        pytest.param("key:k2|*|budget_nano_total|USD", 4, id="a key"),
        pytest.param("organisation:acme|*|budget_nano_total|EUR", 0, id="another currency"),
    ],
)
def test_what_a_former_life_charged_is_known_to_the_femto(later, limit_name, tokens):
    """It is what its lost lease of that budget came to: neither more nor less is given back."""
    assert later.spent(limit_name) == tokens


@pytest.mark.parametrize(
    ("period", "tokens"), [("2026-11", 7), ("2026-11-27", 7), ("2026-12", 0), ("2026-11-26", 0)]
)
def test_a_period_counts_what_was_accepted_in_it(later, period, tokens):
    assert later.spent("organisation:acme|*|budget_nano_per_month|USD", period) == tokens


def test_a_life_that_this_log_does_not_know_is_not_guessed_at(later):
    assert later.spent("organisation:acme|*|budget_nano_total|USD", epoch="elsewhere") is None


def test_a_request_is_found_as_soon_as_it_is_durable(later):
    """Whoever asks must not take a ledger that lags for one that has never heard of it."""
    later.charges("f", 32)

    assert later.books.find("acme", "f").charge_femto == 32 * 10**6
    assert later.books.find("acme", "never") is None


def test_an_older_copy_of_the_log_is_not_taken_for_the_log(tmp_path: Path):
    """A backup that was put back lacks what the ledger has: what is gone must not be run again."""
    clock = ManualClock(NOVEMBER_27)
    first = Life(tmp_path, "1", clock)
    first.charges("r1", 1)
    first.books.close()
    shutil.copytree(tmp_path / "meterlog", tmp_path / "backup")
    second = Life(tmp_path, "2", clock)
    second.charges("r2", 1)
    assert second.books.find("acme", "r2") is not None  # So the ledger has it.
    second.books.close()
    shutil.rmtree(tmp_path / "meterlog")
    (tmp_path / "backup").rename(tmp_path / "meterlog")

    with pytest.raises(MeterLogDamaged):
        Life(tmp_path, "3", clock)
