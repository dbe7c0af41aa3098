"""`headrace invoice`: issues a month's invoices once log and ledger agree, and lists them."""

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path

from headrace.deploy import ledgers
from headrace.deploy.tables import show_table
from headrace.serving.clock import SystemClock
from headrace.serving.config import Config
from headrace.serving.errors import InvalidRequest
from headrace.serving.metering.ledger import invoice
from headrace.serving.metering.ledger.currency import decimal, minor_digits
from headrace.serving.metering.ledger.invoice import Invoice
from headrace.serving.metering.ledger.reconcile import reconcile
from headrace.serving.metering.ledger.statement import month_text, parse_month


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "invoice",
        help="issue a month's invoices, or list them",
        description="Issue the invoices of a tenant for a month that is over, one for each "
        "currency. Refused while log and ledger differ. Asked again, it shows the same ones.",
    )
    parser.add_argument("--tenant", help="whose")
    parser.add_argument("--month", help="for example 2026-11, UTC")
    parser.add_argument(
        "--logs",
        type=Path,
        nargs="+",
        default=[],
        metavar="FOLDER",
        help="every log of the ledger, where they are not all in this home",
    )
    parser.add_argument("--list", action="store_true", help="issue nothing, show what was issued")
    parser.add_argument("--home", type=Path, help="state folder (default: HEADRACE_HOME)")
    parser.add_argument("--json", action="store_true", help="print a list of JSON objects")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    month = None if args.month is None else parse_month(args.month)
    config = Config.load(args.home)
    changed: set[int] = set()
    with ledgers.invoiced(config, args.logs) as ledger:
        if args.list:
            found = invoice.issued_for(ledger, tenant_id=args.tenant, month=month)
            changed = {each.number for each in invoice.changed_since(ledger)}
        elif args.tenant is None or month is None:
            raise InvalidRequest(
                "It is not said whose invoices to issue, or for which month.",
                why="An invoice is never changed.",
                fix="Give --tenant and --month, or --list.",
                field="tenant" if args.tenant is None else "month",
            )
        else:
            found = invoice.issue(
                ledger,
                reconcile(ledgers.sources(config, args.logs), ledger),
                tenant_id=args.tenant,
                month=month,
                now_unix_ms=SystemClock().unix_ms(),
            )
    if args.json:
        known = [each.as_json() | {"is_outdated": each.number in changed} for each in found]
        print(json.dumps(known))
    else:
        _show(found, changed)
    return 0


def _show(invoices: list[Invoice], changed: set[int]) -> None:
    """`changed` are those whose month came to something else since: they need a correction."""
    rows = [
        [
            each.invoice_id,
            each.tenant_id,
            month_text(each.month),
            datetime.fromtimestamp(each.issued_unix_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S"),
            f"{decimal(each.total_minor, minor_digits(each.currency))} {each.currency}",
            "needs a correction" if each.number in changed else "",
        ]
        for each in invoices
    ]
    show_table(
        ["invoice", "tenant", "month", "issued (UTC)", "total", ""], rows, numbers=("total",)
    )
