"""Reads a ledger: requests, sums and balances, from any process, while others write it."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from headrace.serving.domain.record import UsageRecord
from headrace.serving.domain.tier import Receipt, Tier, Verdict
from headrace.serving.domain.usage import Outcome, Price, Usage, nano_of
from headrace.serving.metering.ledger import schema
from headrace.serving.metering.ledger.database import (
    Columns,
    Row,
    Value,
    columns_of,
    exact,
    sum_of,
)
from headrace.serving.metering.ledger.fold import UNIT_FEMTO, Request
from headrace.serving.metering.ledger.ledger import Ledger

RECORDS_MAX = 100_000
"""Most records of one answer: about 100 MB here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Which:
    """Which requests: every field that is set must match."""

    tenant_id: str | None = None
    project_id: str | None = None
    key_id: str | None = None
    model: str | None = None
    tier: Tier | None = None
    """As asked."""
    request_id: str | None = None
    since_unix_ms: int | None = None
    """Accepted at this time or later."""
    until_unix_ms: int | None = None
    """Accepted before this time."""
    month: int | None = None
    """Ended in this UTC month, a number like 202611."""

    @property
    def names_requests(self) -> bool:
        """Whether it asks for what only a request has."""
        asked = (self.key_id, self.model, self.tier, self.request_id)
        return any(each is not None for each in asked)

    def clause(self) -> tuple[str, list[Value]]:
        """The WHERE clause and its values; only what is set, so that an index can serve it."""
        conditions: dict[str, Value] = {
            "request.tenant_id = ?": self.tenant_id,
            "request.project_id = ?": self.project_id,
            "request.key_id = ?": self.key_id,
            "request.model = ?": self.model,
            "request.tier = ?": None if self.tier is None else self.tier.value,
            "request.request_id = ?": self.request_id,
            "request.accepted_unix_ms >= ?": self.since_unix_ms,
            "request.accepted_unix_ms < ?": self.until_unix_ms,
            "request.month = ?": self.month,
        }
        chosen = {text: value for text, value in conditions.items() if value is not None}
        text = f"WHERE {' AND '.join(chosen)}" if chosen else ""
        return text, list(chosen.values())


ALL = Which()


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """Sums over requests of one currency."""

    currency: str
    requests: int
    usage: Usage
    charge_femto: int

    @property
    def charge_nano(self) -> int:
        """Of the exact sum, rounded up once."""
        return nano_of(self.charge_femto)


@dataclass(frozen=True, slots=True, kw_only=True)
class MonthBalance:
    """What one project came to in one month. Femto, of any size."""

    tenant_id: str
    project_id: str
    currency: str
    month: int
    requests: int
    charge_femto: int
    adjusted_femto: int
    """Added to what is owed; negative gives back."""
    credit_femto: int
    """Granted to the tenant; taken off what is owed."""


class LedgerReader:
    """Questions to one ledger; for one thread at a time, like the ledger.

    Every method raises LedgerUnavailable when the database does not answer.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._database = ledger.database

    def records(self, which: Which = ALL, *, limit: int = 100) -> list[UsageRecord]:
        """The newest requests first, at most `limit`."""
        assert 0 < limit <= RECORDS_MAX
        self._ledger.prepare()
        where, values = which.clause()
        return [
            record_of(row)
            for row in self._database.rows(f"{_RECORDS} {where} {_NEWEST}", [*values, limit])
        ]

    def stream(self, which: Which = ALL) -> Iterator[UsageRecord]:
        """Every request that matches, oldest first; a bounded number of them in memory."""
        self._ledger.prepare()
        where, values = which.clause()
        order = "ORDER BY request.accepted_unix_ms, request.log_no, request.seq"
        yield from map(record_of, self._database.stream(f"{_RECORDS} {where} {order}", values))

    def totals(self, which: Which = ALL) -> list[Totals]:
        """Sums over every request that matches, one entry for each currency."""
        self._ledger.prepare()
        where, values = which.clause()
        rows = self._database.rows(
            f"SELECT price.currency, count(*), {', '.join(map(sum_of, _SUMMED))} {_FROM} {where}"
            " GROUP BY price.currency ORDER BY price.currency",
            values,
        )
        return [_totals(row) for row in rows]

    def balances(
        self, *, tenant_id: str | None = None, month: int | None = None
    ) -> list[MonthBalance]:
        self._ledger.prepare()
        chosen = {"tenant_id = ?": tenant_id, "month = ?": month}
        conditions = {text: value for text, value in chosen.items() if value is not None}
        where = f"WHERE {' AND '.join(conditions)}" if conditions else ""
        rows = self._database.rows(
            f"SELECT {columns_of(schema.BALANCE)} FROM balance {where}"
            " ORDER BY tenant_id, project_id, currency, month",
            list(conditions.values()),
        )
        return [_balance(row) for row in rows]


_FROM = "FROM request JOIN price ON price.price_id = request.price_id"
_PRICE: Columns = {"currency": "text", "version": "text"}
_RECORDS = (
    f"SELECT {columns_of(schema.REQUEST, prefix='request.')},"
    f" {columns_of(_PRICE, prefix='price.')} {_FROM}"
)
_NEWEST = "ORDER BY request.accepted_unix_ms DESC, request.log_no DESC, request.seq DESC LIMIT ?"
_TOKENS = ("prompt", "cached", "cache_write", "completion", "reasoning")
_SUMMED = (*(f"{name}_tokens" for name in _TOKENS), "charge_femto")


def record_of(row: Row) -> UsageRecord:
    """A row of REQUEST's columns and the price's currency and version."""
    *columns, currency, price_version = row
    request = Request(**dict(zip(schema.REQUEST, columns, strict=True)))
    return UsageRecord(
        tenant_id=request.tenant_id,
        request_id=request.request_id,
        key_id=request.key_id,
        model=request.model,
        version=request.version,
        usage=_usage(
            request.prompt_tokens,
            request.cached_tokens,
            request.cache_write_tokens,
            request.completion_tokens,
            request.reasoning_tokens,
        ),
        outcome=Outcome(request.outcome),
        charge_nano=nano_of(request.charge_femto),
        currency=currency,
        price_version=price_version,
        accepted_unix_ms=request.accepted_unix_ms,
        first_token_unix_ms=request.first_token_unix_ms,
        settled_unix_ms=request.settled_unix_ms,
        replicas_tried=request.replicas_tried,
        project_id=request.project_id,
        charge_femto=request.charge_femto,
        receipt=_receipt(request),
        tier=Tier(request.tier),
        hold_femto=request.hold_femto,
        waived_femto=request.waived_femto,
        idempotency_digest=bytes.fromhex(request.idempotency_digest),
    )


def _receipt(request: Request) -> Receipt | None:
    if request.tier_served is None or request.verdict is None:
        return None
    return Receipt(
        tier_asked=Tier(request.tier),
        tier_served=Tier(request.tier_served),
        ttft_us=request.ttft_us,
        itl_p50_us=request.itl_p50_us,
        itl_p99_us=request.itl_p99_us,
        verdict=Verdict(request.verdict),
        missed=tuple(request.missed.split(",")) if request.missed else (),
    )


def price_of(*, currency: str, version: str, rates: str) -> Price:
    """A row of `price`."""
    return Price(currency=currency, version=version, rates=json.loads(rates))


def _totals(row: Row) -> Totals:
    currency, requests, *parts = row
    *tokens, charge_femto = _sums(parts)
    return Totals(
        currency=currency, requests=requests, usage=_usage(*tokens), charge_femto=charge_femto
    )


def _sums(parts: Sequence[object]) -> list[int]:
    return [exact(high, low) for high, low in zip(parts[::2], parts[1::2], strict=True)]


def _usage(prompt: int, cached: int, cache_write: int, completion: int, reasoning: int) -> Usage:
    return Usage(
        prompt_tokens=prompt,
        cached_tokens=cached,
        cache_write_tokens=cache_write,
        completion_tokens=completion,
        reasoning_tokens=reasoning,
    )


def _balance(row: Row) -> MonthBalance:
    tenant_id, project_id, currency, month, requests, *amounts = row
    charge, adjusted, credit = (
        units * UNIT_FEMTO + femto for units, femto in zip(amounts[::2], amounts[1::2], strict=True)
    )
    return MonthBalance(
        tenant_id=tenant_id,
        project_id=project_id,
        currency=currency,
        month=month,
        requests=requests,
        charge_femto=charge,
        adjusted_femto=adjusted,
        credit_femto=credit,
    )
