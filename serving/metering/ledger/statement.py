"""A tenant's month: what was used, at which price, and what is owed.

A line is one (project, model, tier, unit, price). Its quantity times its rate is exact; it is
rounded once, to the smallest coin of the currency, and the total is the sum of the lines as they
are shown. So a line is off by at most half a coin, and nothing is rounded twice.

A request belongs to the month in which it ended, UTC. Work that is not charged (faults of ours) is
not here; corrections and credits have lines of their own.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from headrace.serving.domain.usage import Outcome
from headrace.serving.errors import InvalidRequest
from headrace.serving.metering import outcomes
from headrace.serving.metering.ledger.currency import minor_of
from headrace.serving.metering.ledger.database import exact, sum_of
from headrace.serving.metering.ledger.ledger import Ledger
from headrace.serving.metering.ledger.schema import WHY_CREDITED

LINES_MAX = 100_000
"""Lines of one statement: projects times models times tiers times units; 50 MB here."""

_CHARGED = tuple(
    outcome.value
    for outcome, rule in outcomes.RULES.items()
    if rule.charged is not outcomes.Charged.NOTHING
)
assert Outcome.OK.value in _CHARGED


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line of usage."""

    project_id: str
    model: str
    tier: str
    """As asked: its price was frozen."""
    unit: str
    price_version: str
    rate_nano_per_million: int
    quantity: int
    exact_femto: int
    amount_minor: int
    """What is owed: `exact_femto`, rounded half to even."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """One adjustment or credit; negative is given back."""

    kind: str
    """`adjustment` or `credit`."""
    correction_id: str
    project_id: str
    request_id: str
    reason: str
    exact_femto: int
    amount_minor: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Statement:
    """A month of one tenant in one currency."""

    tenant_id: str
    month: int
    """A number like 202611."""
    currency: str
    lines: Sequence[Line]
    corrections: Sequence[Correction]

    @property
    def total_minor(self) -> int:
        """What is owed, in the smallest coins; below zero, what is in the tenant's favour."""
        return sum(each.amount_minor for each in (*self.lines, *self.corrections))

    @property
    def exact_femto(self) -> int:
        return sum(each.exact_femto for each in (*self.lines, *self.corrections))

    def as_json(self) -> dict[str, object]:
        """What scripts rely on: names stay, more may be added. Amounts are integers."""
        return {
            "tenant_id": self.tenant_id,
            "month": month_text(self.month),
            "currency": self.currency,
            "total_minor": self.total_minor,
            "exact_femto": self.exact_femto,
            "lines": [asdict(each) for each in self.lines],
            "corrections": [asdict(each) for each in self.corrections],
        }


def statements(ledger: Ledger, *, tenant_id: str, month: int) -> list[Statement]:
    """One for each currency in which the tenant has anything this month.

    Raises:
        LedgerUnavailable: the ledger cannot be read.
        InvalidRequest: a currency that cannot be charged in, or more than LINES_MAX lines.
    """
    ledger.prepare()
    lines = _lines(ledger, tenant_id, month)
    corrections = _corrections(ledger, tenant_id, month)
    return [
        Statement(
            tenant_id=tenant_id,
            month=month,
            currency=currency,
            lines=lines.get(currency, []),
            corrections=corrections.get(currency, []),
        )
        for currency in sorted(lines.keys() | corrections.keys())
    ]


def parse_month(text: str) -> int:
    """`2026-11` as 202611.

    Raises:
        InvalidRequest: it is no month.
    """
    year, dash, month = text.partition("-")
    digits = (year + month).isascii() and (year + month).isdigit()
    if not (dash and digits and len(year) == 4 and len(month) == 2 and 1 <= int(month) <= 12):
        raise InvalidRequest(
            f"The month is {text[:32]!r}.",
            why="A month is a year and two digits.",
            fix="Write it like 2026-11.",
            field="month",
        )
    return int(year) * 100 + int(month)


def month_text(month: int) -> str:
    """202611 as `2026-11`."""
    return f"{month // 100:04d}-{month % 100:02d}"


def _lines(ledger: Ledger, tenant_id: str, month: int) -> Mapping[str, list[Line]]:
    marks = ", ".join("?" for _ in _CHARGED)
    rows = ledger.database.rows(
        "SELECT price.currency, request.project_id, request.model, request.tier, quantity.unit,"
        f" price.version, price.rates, {sum_of('quantity.quantity')} FROM request"
        " JOIN quantity ON quantity.log_no = request.log_no AND quantity.seq = request.seq"
        " JOIN price ON price.price_id = request.price_id"
        f" WHERE request.tenant_id = ? AND request.month = ? AND request.outcome IN ({marks})"
        " GROUP BY price.currency, request.project_id, request.model, request.tier, quantity.unit,"
        " price.version, price.rates"
        " ORDER BY price.currency, request.project_id, request.model, request.tier, quantity.unit,"
        " price.version, price.rates LIMIT ?",
        (tenant_id, month, *_CHARGED, LINES_MAX + 1),
    )
    _check_count(len(rows), tenant_id, month)
    lines: dict[str, list[Line]] = {}
    for currency, project_id, model, tier, unit, version, rates, high, low in rows:
        quantity, rate = exact(high, low), json.loads(rates).get(unit, 0)
        line = Line(
            project_id=project_id,
            model=model,
            tier=tier,
            unit=unit,
            price_version=version,
            rate_nano_per_million=rate,
            quantity=quantity,
            exact_femto=quantity * rate,
            amount_minor=minor_of(quantity * rate, currency),
        )
        lines.setdefault(currency, []).append(line)
    return lines


def _corrections(ledger: Ledger, tenant_id: str, month: int) -> Mapping[str, list[Correction]]:
    adjustments = ledger.database.rows(
        "SELECT currency, 'adjustment', adjustment_id, project_id, request_id, reason,"
        " amount_femto FROM adjustment WHERE tenant_id = ? AND month = ?"
        " ORDER BY adjustment_id LIMIT ?",
        (tenant_id, month, LINES_MAX + 1),
    )
    # A slice of a budget is no gift: only credit that no budget bounds is taken off.
    granted = ledger.database.rows(
        f"SELECT currency, 'credit', grant_id, project_id, '', {WHY_CREDITED},"
        " -amount_femto FROM credit WHERE tenant_id = ? AND month = ? AND budget_id = ''"
        " ORDER BY grant_id LIMIT ?",
        (tenant_id, month, LINES_MAX + 1),
    )
    _check_count(len(adjustments) + len(granted), tenant_id, month)
    corrections: dict[str, list[Correction]] = {}
    for currency, kind, correction_id, project_id, request_id, reason, femto in (
        *adjustments,
        *granted,
    ):
        correction = Correction(
            kind=kind,
            correction_id=correction_id,
            project_id=project_id,
            request_id=request_id,
            reason=reason,
            exact_femto=femto,
            amount_minor=minor_of(femto, currency),
        )
        corrections.setdefault(currency, []).append(correction)
    return corrections


def _check_count(lines: int, tenant_id: str, month: int) -> None:
    if lines > LINES_MAX:
        raise InvalidRequest(
            f"The month {month_text(month)} of {tenant_id!r} has more than {LINES_MAX:,} lines.",
            why="A line is one project, model, tier, unit and price; nobody reads more.",
            fix="Use `headrace usage export`.",
        )
