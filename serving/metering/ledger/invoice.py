"""Invoices: statements that are over, checked against the logs, numbered, and never changed.

An invoice is issued once for a tenant, month and currency. What becomes known afterwards goes into
a later month as a correction: the log has no other way to say it either.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from headrace.serving.errors import InvalidRequest, InvoiceBlocked
from headrace.serving.metering.ledger import schema
from headrace.serving.metering.ledger.database import Execute, Row, columns_of
from headrace.serving.metering.ledger.ledger import Ledger
from headrace.serving.metering.ledger.reconcile import Findings
from headrace.serving.metering.ledger.record_fields import month_of
from headrace.serving.metering.ledger.statement import Statement, month_text, statements

INVOICES_SHOWN = 1_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Invoice:
    """One issued invoice, as it was issued."""

    number: int
    """1, 2, 3 …, without a gap, in each ledger."""
    tenant_id: str
    month: int
    currency: str
    issued_unix_ms: int
    total_minor: int
    body: dict[str, Any]
    """`Statement.as_json`, as it was then."""

    @property
    def invoice_id(self) -> str:
        return f"HR-{self.month // 100:04d}-{self.number:06d}"

    def as_json(self) -> dict[str, object]:
        issued = {"invoice_id": self.invoice_id, "issued_unix_ms": self.issued_unix_ms}
        return issued | self.body


def issue(
    ledger: Ledger, findings: Findings, *, tenant_id: str, month: int, now_unix_ms: int
) -> list[Invoice]:
    """Issue what is not issued yet; answers the month's invoices, one for each currency.

    Idempotent: asked again, it answers the same invoices.

    Args:
        ledger: caught up with every log.
        findings: of a reconciliation of these very books.
        tenant_id: whose.
        month: which is over.
        now_unix_ms: when.

    Raises:
        InvalidRequest: the month is not over, or there is nothing to invoice.
        InvoiceBlocked: the books differ.
        LedgerUnavailable: nothing is issued, or the acknowledgement was lost: repeat it.
    """
    if month >= month_of(now_unix_ms):
        raise InvalidRequest(
            f"The month {month_text(month)} is not over.",
            why="An invoice is never changed, so that it waits for everything that belongs to it.",
            fix=f"See `headrace statement --tenant {tenant_id} --month {month_text(month)}`.",
            field="month",
        )
    if not findings.agree:
        raise blocked(findings)
    month_statements = statements(ledger, tenant_id=tenant_id, month=month)
    issued = issued_for(ledger, tenant_id=tenant_id, month=month)
    missing = {each.currency for each in month_statements} - {each.currency for each in issued}
    if missing:
        with ledger.database.transaction() as execute:
            execute(ledger.database.dialect.lock, ())
            for each in month_statements:
                if each.currency in missing:
                    _insert(execute, each, now_unix_ms)
        issued = issued_for(ledger, tenant_id=tenant_id, month=month)
    if not issued:
        raise InvalidRequest(
            f"There is nothing to invoice {tenant_id!r} for {month_text(month)}.",
            why="No request ended in that month, and nothing was corrected.",
            fix="Check the tenant and the month with `headrace statement`.",
            field="month",
        )
    return issued


def issued_for(
    ledger: Ledger, *, tenant_id: str | None = None, month: int | None = None
) -> list[Invoice]:
    """Invoices that were issued, the newest last; at most INVOICES_SHOWN."""
    ledger.prepare()
    chosen = {"tenant_id = ?": tenant_id, "month = ?": month}
    conditions = {text: value for text, value in chosen.items() if value is not None}
    where = f"WHERE {' AND '.join(conditions)}" if conditions else ""
    rows = ledger.database.rows(
        f"SELECT {columns_of(schema.INVOICE)} FROM invoice {where} ORDER BY number DESC LIMIT ?",
        [*conditions.values(), INVOICES_SHOWN],
    )
    return [_invoice(row) for row in reversed(rows)]


def changed_since(ledger: Ledger) -> list[Invoice]:
    """Invoices whose month says something else by now: what came late needs a correction."""
    return [
        each
        for each in issued_for(ledger)
        if _now(ledger, each) != (each.body["total_minor"], each.body["exact_femto"])
    ]


def copy_invoices(source: Ledger, target: Ledger) -> int:
    """Invoices are in no log: a ledger that is made again takes them from the one before.

    Raises:
        InvalidRequest: the target has issued other invoices under these numbers.
    """
    source.prepare()
    rows = source.database.rows(f"SELECT {columns_of(schema.INVOICE)} FROM invoice ORDER BY number")
    target.prepare()
    with target.database.transaction() as execute:
        for row in rows:
            execute(f"{_INSERT} ON CONFLICT DO NOTHING", row)
            if execute(_SELECT_ONE, row[:1]) != [row]:
                raise InvalidRequest(
                    f"Invoice {row[0]} is another one in {target.name}.",
                    why="A number stands for one invoice, for ever.",
                    fix="Fill an empty ledger.",
                )
    return len(rows)


def blocked(findings: Findings) -> InvoiceBlocked:
    return InvoiceBlocked(
        f"The books differ in {findings.differences_found:,} places:"
        f" {findings.differences[0].what}",
        why="What log, ledger and rates do not agree on is not invoiced.",
        fix="See `headrace reconcile`; correct by an adjustment, or make the ledger again with"
        " `headrace meterlog replay`.",
    )


_INSERT = (
    f"INSERT INTO invoice ({columns_of(schema.INVOICE)})"
    f" VALUES ({', '.join('?' for _ in schema.INVOICE)})"
)

_SELECT_ONE = f"SELECT {columns_of(schema.INVOICE)} FROM invoice WHERE number = ?"


def _insert(execute: Execute, statement: Statement, now_unix_ms: int) -> None:
    ((number,),) = execute("SELECT coalesce(max(number), 0) + 1 FROM invoice", ())
    execute(
        f"{_INSERT} ON CONFLICT (tenant_id, month, currency) DO NOTHING",
        (
            number,
            statement.tenant_id,
            statement.month,
            statement.currency,
            now_unix_ms,
            statement.total_minor,
            json.dumps(statement.as_json(), separators=(",", ":")),
        ),
    )


def _invoice(row: Row) -> Invoice:
    number, tenant_id, month, currency, issued_unix_ms, total_minor, body = row
    return Invoice(
        number=number,
        tenant_id=tenant_id,
        month=month,
        currency=currency,
        issued_unix_ms=issued_unix_ms,
        total_minor=total_minor,
        body=json.loads(body),
    )


def _now(ledger: Ledger, invoice: Invoice) -> tuple[int, int]:
    found: Sequence[Statement] = [
        each
        for each in statements(ledger, tenant_id=invoice.tenant_id, month=invoice.month)
        if each.currency == invoice.currency
    ]
    return (found[0].total_minor, found[0].exact_femto) if found else (0, 0)
