"""What may be configured about prices: one price book, in force before every published one."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from headrace.serving.config_reader import bounded
from headrace.serving.domain.tier import Tier
from headrace.serving.domain.usage import Price
from headrace.serving.errors import ConfigRefused


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPrice:
    """Billionths of a unit of currency for one million tokens. Whole numbers only."""

    prompt_nano_per_mtok: int = bounded(50_000_000, 0, 10**12)
    """0.05 by default."""
    cached_nano_per_mtok: int = bounded(5_000_000, 0, 10**12)
    """A tenth: the work is not done again, the memory is still held."""
    completion_nano_per_mtok: int = bounded(200_000_000, 0, 10**12)
    """0.20 by default."""
    cache_write_nano_per_mtok: int | None = bounded(None, 0, 10**12)
    """Prompt tokens that stay resident for later requests. Unset: as any prompt token."""
    reasoning_nano_per_mtok: int | None = bounded(None, 0, 10**12)
    """Tokens of thinking sections. Unset: as any completion token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TierPercents:
    """What a tier costs, in per cent of the rates."""

    reserved: int = bounded(100, 0, 10_000)
    priority: int = bounded(200, 0, 10_000)
    standard: int = bounded(100, 0, 10_000)
    flex: int = bounded(50, 0, 10_000)
    batch: int = bounded(50, 0, 10_000)


@dataclass(frozen=True, slots=True, kw_only=True)
class PricesConfig:
    """The price book. A request is charged by the book that was in force when it was accepted."""

    version: str = "demo-1"
    """Written into every record; change it with every change of a price."""
    currency: str = "USD"
    default: ModelPrice = field(default_factory=ModelPrice)
    models: Mapping[str, ModelPrice] = field(default_factory=dict[str, ModelPrice])
    """By model name, where the default does not hold."""
    tiers: TierPercents = field(default_factory=TierPercents)
    """Every rate times every per cent must be a whole number of nano: a rate of at least 100, or
    a multiple of it, always is."""

    def price(self, model: str, tier: Tier) -> Price:
        """The rates of a model in a tier."""
        book = self
        rates = book.models.get(model, book.default)
        percent = getattr(book.tiers, tier.value)

        def at(rate: int | None) -> int | None:
            return None if rate is None else rate * percent // 100

        return Price.text(
            currency=book.currency,
            version=book.version,
            prompt_nano_per_mtok=rates.prompt_nano_per_mtok * percent // 100,
            cached_nano_per_mtok=rates.cached_nano_per_mtok * percent // 100,
            completion_nano_per_mtok=rates.completion_nano_per_mtok * percent // 100,
            cache_write_nano_per_mtok=at(rates.cache_write_nano_per_mtok),
            reasoning_nano_per_mtok=at(rates.reasoning_nano_per_mtok),
        )


def check_whole_rates(book: PricesConfig, where: str) -> None:
    """Every rate in every tier is a whole number of nano: nothing is rounded before an invoice."""
    for name, rates in (("default", book.default), *book.models.items()):
        for each in fields(rates):
            for tier in Tier:
                rate, percent = getattr(rates, each.name) or 0, getattr(book.tiers, tier.value)
                if rate * percent % 100:
                    raise ConfigRefused(
                        f"{where}: prices.{name}.{each.name} is {rate}, and {tier} is {percent} %.",
                        why="A rate in a tier is a whole number of nano; this is not.",
                        fix="Make the rate a multiple of 100.",
                        field=f"prices.{name}.{each.name}",
                    )
