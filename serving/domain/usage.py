"""What a request used, what that costs, and how it ended."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Protocol

from headrace.serving.domain import units
from headrace.serving.domain.units import Quantities
from headrace.serving.errors import AmountOutOfRange, UnknownUnit

FEMTO_PER_NANO = 1_000_000
CHARGE_FEMTO_MAX = (1 << 63) - 1
"""9,223 units of currency: what a signed 64-bit column holds, and more than any request costs."""


class Outcome(StrEnum):
    """How a request ended. Low cardinality: a label of metrics and a column of records."""

    OPEN = "open"
    OK = "ok"
    BUDGET = "budget"
    """A hard budget ended it in the middle; what was delivered is charged."""
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    REJECTED = "rejected"
    """Refused before any work."""
    FAILED = "failed"
    """A fault of ours: never charged."""
    RECOVERED = "recovered"
    """The frontend died; settled at its last checkpoint when the next one started."""
    EXPIRED = "expired"
    """The frontend died before anything was delivered; the hold was released."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens one request consumed, as counted by the engine that ran it.

    `cached_tokens` and `cache_write_tokens` are disjoint subsets of `prompt_tokens`, and
    `reasoning_tokens` is one of `completion_tokens`, so that totals never count a token twice.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    cache_write_tokens: int = 0
    """Computed for this request, and resident afterwards."""

    def __post_init__(self) -> None:
        assert self.cached_tokens >= 0
        assert self.cache_write_tokens >= 0
        assert self.cached_tokens + self.cache_write_tokens <= self.prompt_tokens
        assert 0 <= self.reasoning_tokens <= self.completion_tokens

    def quantities(self) -> Quantities:
        """By unit, disjoint. Units of zero are left out."""
        each = {
            units.PROMPT: self.prompt_tokens - self.cached_tokens - self.cache_write_tokens,
            units.CACHE_READ: self.cached_tokens,
            units.CACHE_WRITE: self.cache_write_tokens,
            units.COMPLETION: self.completion_tokens - self.reasoning_tokens,
            units.REASONING: self.reasoning_tokens,
        }
        return {unit: quantity for unit, quantity in each.items() if quantity}


class Countable(Protocol):
    """Work that a price can be put on: `Usage`, `ImageUsage`, `VideoUsage`."""

    def quantities(self) -> Quantities: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """Rates of one version of a price book, for one model and tier; frozen into every request.

    A rate is nano-currency for a million units, so one unit costs `rate` femto-currency exactly.
    Integers throughout, because money does not round-trip floats.
    """

    currency: str = "USD"
    version: str
    rates: Mapping[str, int]
    """Unit (see units.py) to nano-currency for a million of it."""

    @classmethod
    def text(
        cls,
        *,
        version: str,
        prompt_nano_per_mtok: int,
        cached_nano_per_mtok: int,
        completion_nano_per_mtok: int,
        cache_write_nano_per_mtok: int | None = None,
        reasoning_nano_per_mtok: int | None = None,
        currency: str = "USD",
    ) -> "Price":
        """Rates of a text model. Unset: a cache write is a prompt token, thinking is answering."""
        rates = {
            units.PROMPT: prompt_nano_per_mtok,
            units.CACHE_READ: cached_nano_per_mtok,
            units.CACHE_WRITE: (
                prompt_nano_per_mtok
                if cache_write_nano_per_mtok is None
                else cache_write_nano_per_mtok
            ),
            units.COMPLETION: completion_nano_per_mtok,
            units.REASONING: (
                completion_nano_per_mtok
                if reasoning_nano_per_mtok is None
                else reasoning_nano_per_mtok
            ),
        }
        return cls(currency=currency, version=version, rates=MappingProxyType(rates))

    @property
    def prompt_nano_per_mtok(self) -> int:
        return self.rates[units.PROMPT]

    @property
    def cached_nano_per_mtok(self) -> int:
        return self.rates[units.CACHE_READ]

    @property
    def completion_nano_per_mtok(self) -> int:
        return self.rates[units.COMPLETION]

    def dearest_femto(self) -> tuple[int, int]:
        """The most that a token of a prompt, and one of an answer, can cost."""
        rate = self.rates.get
        prompt, write, read = (
            rate(units.PROMPT, 0),
            rate(units.CACHE_WRITE, 0),
            rate(units.CACHE_READ, 0),
        )
        completion, reasoning = rate(units.COMPLETION, 0), rate(units.REASONING, 0)
        if write > prompt or read > prompt:  # Rarely: three comparisons cost more than two.
            prompt = max(write, read)
        return prompt, completion if completion > reasoning else reasoning  # noqa: FURB136

    def charge_femto(self, work: Countable) -> int:
        """What `work` costs, exactly: the sum of quantity times rate over its units.

        90 fresh, 10 cached and 20 completion tokens at 1, 0.1 and 2 USD a million:
        90 * 10**9 + 10 * 10**8 + 20 * 2 * 10**9 = 131 * 10**9 femto-USD = 131,000 nano-USD.

        Raises:
            UnknownUnit: this price has no rate for one of them.
            AmountOutOfRange: more than CHARGE_FEMTO_MAX.
        """
        femto = 0
        for unit, quantity in work.quantities().items():
            rate = self.rates.get(unit)
            if rate is None:
                raise UnknownUnit(
                    f"The price book {self.version!r} has no rate for {unit}.",
                    why="Work that has no price is not done.",
                    fix="Publish a price book with this unit.",
                    field="unit",
                )
            femto += quantity * rate
        if femto > CHARGE_FEMTO_MAX:
            raise AmountOutOfRange(
                f"The work would cost {femto // 10**15:,} {self.currency}.",
                why=f"One request costs at most {CHARGE_FEMTO_MAX // 10**15:,}.",
                fix="Ask for less, or correct the price book.",
            )
        return femto

    def charge_nano(self, work: Countable) -> int:
        """`charge_femto` in whole nano, rounded up: what one request shows.

        Invoices add up femto and round once, so a thousand requests do not pay a thousand
        roundings.
        """
        return nano_of(self.charge_femto(work))


def nano_of(femto: int) -> int:
    """Whole nano-currency, rounded up."""
    return -(-femto // FEMTO_PER_NANO)
