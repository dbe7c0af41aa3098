"""Price books: versions of what a unit costs, each in force from a moment on.

A book is a file of YAML or JSON:

    version: 2026-11
    currency: USD
    effective_from: 2026-11-01T00:00:00Z
    models:
      smollm2-135m: {prompt_tokens: 50000000, cache_read_tokens: 5000000, …}
      wan-tiny: {video_ms/720p/24fps/silent: 50000000000}
    default: {…}          # for models that are not listed; without it they have no price
    tiers: {priority: 200, flex: 50}

Rates are nano-currency for a million units, tiers per cent of them. A rate that is not there is no
price of zero: work in such a unit is refused. A published book never changes; a request keeps the
rates of the book that was in force when it was accepted.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import cast

from headrace.serving.config_prices import ModelPrice, PricesConfig, TierPercents
from headrace.serving.config_reader import read_yaml
from headrace.serving.domain import units
from headrace.serving.domain.tier import Tier
from headrace.serving.domain.usage import Price
from headrace.serving.errors import AmountOutOfRange, InvalidRequest, UnknownUnit
from headrace.serving.metering.ledger.currency import minor_digits

RATE_MAX = 10**15
"""A whole unit of currency for one token: no price is higher, a slip of the pen is."""
PERCENT_MAX = 10_000
MODELS_MAX = 10_000
VERSION_CHARS_MAX = 64
_VERSION_CHARS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
_KEYS = ("version", "currency", "effective_from", "models", "default", "tiers")

Rates = Mapping[str, int]
"""Unit to nano-currency for a million of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PriceBook:
    """One version, checked."""

    version: str
    currency: str
    effective_unix_ms: int
    """In force from here on, until a later book is."""
    models: Mapping[str, Rates]
    default: Rates | None
    """For models that are not listed; None: they have no price."""
    tiers: Mapping[Tier, int]
    """Per cent; every rate times every per cent is a whole number of nano."""

    def price(self, model: str, tier: Tier, *, needs: Collection[str] = ()) -> Price:
        """The rates of a model in a tier.

        Args:
            model: by its name.
            tier: as asked.
            needs: units that the work may be counted in; for text, `units.TEXT_UNITS`.

        Raises:
            UnknownUnit: the book has no rates for this model, or none for a unit it needs. Asked
                before the work is done, because afterwards there is nothing left to refuse.
        """
        rates = self.models.get(model, self.default)
        if rates is None:
            raise UnknownUnit(
                f"The price book {self.version!r} has no prices for model {model!r}.",
                why="Work that has no price is not done.",
                fix="Publish a price book that lists the model, or has a default.",
                field="model",
            )
        if missing := [unit for unit in needs if unit not in rates]:
            raise UnknownUnit(
                f"The price book {self.version!r} has no rate for {missing[0]} of {model!r}.",
                why="Work that has no price is not done.",
                fix="Publish a price book with this unit.",
                field="model",
            )
        percent = self.tiers[tier]
        return Price(
            currency=self.currency,
            version=self.version,
            rates=MappingProxyType({unit: rate * percent // 100 for unit, rate in rates.items()}),
        )


def embedded(prices: PricesConfig) -> PriceBook:
    """The book of config.yaml, in force before every published one."""
    return PriceBook(
        version=prices.version,
        currency=prices.currency,
        effective_unix_ms=0,
        models={name: _text_rates(each) for name, each in prices.models.items()},
        default=_text_rates(prices.default),
        tiers={tier: getattr(prices.tiers, tier.value) for tier in Tier},
    )


def _text_rates(price: ModelPrice) -> Rates:
    each = {entry.name: getattr(price, entry.name) for entry in fields(price)}
    return Price.text(version="", **each).rates


def read(path: Path) -> PriceBook:
    """A book from its file.

    Raises:
        ConfigRefused: the file cannot be read, or is not YAML.
        InvalidRequest, UnknownUnit, AmountOutOfRange: what is wrong in it, and where.
    """
    raw = read_yaml(path)
    where = path.name
    if not isinstance(raw, dict) or not raw:
        raise _refused(where, "it holds no keys and values", "Write `version: …` and so on.")
    book = cast("dict[object, object]", raw)
    for key in book:
        if key not in _KEYS:
            raise _refused(where, f"{key!r} is not a key of one", f"Keys: {', '.join(_KEYS)}.")
    currency = _text(where, book, "currency")
    minor_digits(currency)
    models = _mapping(where, book.get("models"), "models")
    if len(models) > MODELS_MAX:
        raise _refused(where, f"it has {len(models):,} models", f"At most {MODELS_MAX:,}.")
    default = book.get("default")
    checked = PriceBook(
        version=_version(where, book),
        currency=currency,
        effective_unix_ms=_moment(where, book),
        models={name: _rates(where, each, f"models.{name}") for name, each in models.items()},
        default=None if default is None else _rates(where, default, "default"),
        tiers=_tiers(where, book.get("tiers")),
    )
    _check_whole(where, checked)
    return checked


def _text(where: str, book: Mapping[object, object], key: str) -> str:
    value = book.get(key)
    if not isinstance(value, str) or not value:
        raise _refused(where, f"{key} is {value!r}", "Write a text, in quotes if need be.")
    return value


def _version(where: str, book: Mapping[object, object]) -> str:
    version = _text(where, book, "version")
    if (
        len(version) > VERSION_CHARS_MAX
        or not set(version) <= _VERSION_CHARS
        or version.startswith(".")
    ):
        raise _refused(
            where,
            f"version is {version[:80]!r}",
            f"Use at most {VERSION_CHARS_MAX} letters, digits, dots, dashes and underscores.",
        )
    return version


def _moment(where: str, book: Mapping[object, object]) -> int:
    """YAML reads an unquoted time as one; JSON has a text."""
    value = book.get("effective_from")
    try:
        moment = value if isinstance(value, datetime) else datetime.fromisoformat(str(value))
    except ValueError:
        moment = None
    if moment is None:
        raise _refused(where, f"effective_from is {value!r}", "Write 2026-11-01T00:00:00Z.")
    # PyYAML gives back UTC without saying so; a text without a zone is taken the same way.
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    since_1970 = moment - datetime(1970, 1, 1, tzinfo=UTC)
    unix_ms = (since_1970.days * 86_400 + since_1970.seconds) * 1000
    if unix_ms <= 0:
        raise _refused(where, f"effective_from is {value}", "It lies after 1970.")
    return unix_ms


def _mapping(where: str, raw: object, path: str) -> dict[str, object]:
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise _refused(where, f"{path} is {str(raw)[:60]!r}", "Write `name: value` lines.")
    pairs = cast("dict[object, object]", raw)
    if bad := next((key for key in pairs if not isinstance(key, str) or not key), None):
        raise _refused(where, f"{path} has the key {bad!r}", "Write a name, in quotes if need be.")
    return {str(key): value for key, value in pairs.items()}


def _rates(where: str, raw: object, path: str) -> Rates:
    rates: dict[str, int] = {}
    for unit, rate in _mapping(where, raw, path).items():
        try:
            units.check_unit(unit)
        except UnknownUnit as error:
            raise UnknownUnit(
                f"{where}: {path}: {error.what}", why=error.why, fix=error.fix
            ) from error
        rates[unit] = _whole(where, rate, f"{path}.{unit}", RATE_MAX)
    if not rates:
        raise _refused(where, f"{path} has no rates", "Write `unit: nano for a million` lines.")
    return rates


def _tiers(where: str, raw: object) -> Mapping[Tier, int]:
    given = _mapping(where, raw, "tiers")
    known = {tier.value for tier in Tier}
    for name in given:
        if name not in known:
            raise _refused(where, f"{name!r} is no tier", f"Tiers: {', '.join(Tier)}.")
    defaults = {each.name: getattr(TierPercents(), each.name) for each in fields(TierPercents)}
    return {
        tier: _whole(
            where, given.get(tier.value, defaults[tier.value]), f"tiers.{tier}", PERCENT_MAX
        )
        for tier in Tier
    }


def _whole(where: str, value: object, path: str, most: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise _refused(where, f"{path} is {value!r}", "Write a whole number.")
    if not 0 <= value <= most:
        raise AmountOutOfRange(
            f"{where}: {path} is {value:,}.",
            why=f"It lies between 0 and {most:,}.",
            fix="Rates are nano-currency for a million units, tiers per cent.",
            field=path,
        )
    return value


def _check_whole(where: str, book: PriceBook) -> None:
    """Every rate in every tier is a whole number of nano: nothing is rounded before an invoice."""
    for name, rates in (("default", book.default or {}), *book.models.items()):
        for unit, rate in rates.items():
            for tier, percent in book.tiers.items():
                if rate * percent % 100:
                    raise _refused(
                        where,
                        f"the rate {rate} of {name}.{unit} at {percent} % for {tier} is no whole"
                        " number",
                        "Make the rate a multiple of 100.",
                    )


def _refused(where: str, what: str, fix: str) -> InvalidRequest:
    return InvalidRequest(
        f"The price book {where} cannot be used: {what}.",
        why="What a price book says is charged, so that nothing in it is guessed.",
        fix=fix,
        field="prices",
    )
