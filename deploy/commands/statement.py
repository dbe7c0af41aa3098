"""`headrace statement`: what a tenant used in a month, at which price, and what is owed."""

import argparse
import json
from pathlib import Path

from headrace.deploy import ledgers
from headrace.deploy.tables import show_table
from headrace.serving.config import Config
from headrace.serving.metering.ledger.currency import FEMTO_DIGITS, decimal, minor_digits
from headrace.serving.metering.ledger.statement import Statement, parse_month, statements


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "statement",
        help="show what a tenant owes for a month",
        description="Lines of one project, model, tier, unit and price; each is exact and rounded "
        "once, to the smallest coin. A month that is not over is shown as far as it is.",
    )
    parser.add_argument("--tenant", required=True, help="whose")
    parser.add_argument("--month", required=True, help="for example 2026-11, UTC")
    parser.add_argument("--home", type=Path, help="state folder (default: HEADRACE_HOME)")
    parser.add_argument("--json", action="store_true", help="print a list of JSON objects")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    month = parse_month(args.month)
    with ledgers.invoiced(Config.load(args.home)) as ledger:
        found = statements(ledger, tenant_id=args.tenant, month=month)
    if args.json:
        print(json.dumps([each.as_json() for each in found]))
    elif not found:
        print(f"Nothing of {args.tenant} in {args.month}.")
    for statement in () if args.json else found:
        show(statement)
    return 0


def show(statement: Statement) -> None:
    """Print one statement as a table."""
    currency = statement.currency
    digits = minor_digits(currency)
    rows = [
        [
            line.project_id,
            line.model,
            line.tier,
            line.unit,
            line.price_version,
            f"{line.quantity:,}",
            decimal(line.exact_femto, FEMTO_DIGITS),
            decimal(line.amount_minor, digits),
        ]
        for line in statement.lines
    ]
    rows += [
        [
            each.project_id,
            each.kind,
            "",
            each.correction_id,
            each.reason,
            "",
            decimal(each.exact_femto, FEMTO_DIGITS),
            decimal(each.amount_minor, digits),
        ]
        for each in statement.corrections
    ]
    columns = ["project", "model", "tier", "unit", "price", "quantity", "exact", currency]
    footer = ["total", *[""] * 5, decimal(statement.exact_femto, FEMTO_DIGITS)]
    footer.append(decimal(statement.total_minor, digits))
    show_table(columns, rows, numbers=("quantity", "exact", currency), footer=footer)
