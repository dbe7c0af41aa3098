"""`headrace receipts`: what each request was promised, what it got, and whether that is enough."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from headrace.deploy import ledgers
from headrace.deploy.commands.usage import moment, since_unix_ms
from headrace.deploy.tables import show_table
from headrace.serving.clock import SystemClock
from headrace.serving.config import Config
from headrace.serving.domain.record import UsageRecord
from headrace.serving.errors import InvalidRequest
from headrace.serving.metering.ledger.reader import RECORDS_MAX, LedgerReader, Which

_NUMBERS = ("ttft ms", "itl p50 ms", "itl p99 ms")


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "receipts",
        help="show what requests were promised and got",
        description="The newest requests first: tier asked and served, times at the gateway's "
        "edge, and the verdict.",
    )
    parser.add_argument("--tenant", help="only this tenant's requests")
    parser.add_argument("--request-id", help="only this request")
    parser.add_argument(
        "--since", metavar="TIME", help="accepted since: 90s, 15m, 2h, 7d, or a date"
    )
    parser.add_argument("--limit", type=int, default=20, help="most requests shown (default: 20)")
    parser.add_argument("--home", type=Path, help="state folder (default: HEADRACE_HOME)")
    parser.add_argument("--json", action="store_true", help="print a list of JSON objects")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if not 0 < args.limit <= RECORDS_MAX:
        raise InvalidRequest(
            f"--limit is {args.limit}.",
            why=f"It lies between 1 and {RECORDS_MAX:,}.",
            fix="Narrow the question with --since or --tenant.",
            field="limit",
        )
    since = None if args.since is None else since_unix_ms(args.since, SystemClock())
    which = Which(tenant_id=args.tenant, request_id=args.request_id, since_unix_ms=since)
    with ledgers.local(Config.load(args.home)) as ledger:
        records = LedgerReader(ledger).records(which, limit=args.limit)
    if args.json:
        print(json.dumps([as_json(record) for record in records]))
    elif not records:
        print("No such requests.")
    else:
        _show(records)
    return 0


def as_json(record: UsageRecord) -> dict[str, object]:
    """What scripts rely on: names stay, more may be added. None: no receipt, or no such time."""
    receipt = record.receipt
    return {
        "request_id": record.request_id,
        "tenant_id": record.tenant_id,
        "project_id": record.project_id,
        "model": record.model,
        "outcome": record.outcome.value,
        "accepted_unix_ms": record.accepted_unix_ms,
        "tier_asked": receipt and receipt.tier_asked.value,
        "tier_served": receipt and receipt.tier_served.value,
        "ttft_us": receipt and receipt.ttft_us,
        "itl_p50_us": receipt and receipt.itl_p50_us,
        "itl_p99_us": receipt and receipt.itl_p99_us,
        "verdict": receipt and receipt.verdict.value,
        "missed": list(receipt.missed) if receipt else [],
    }


def _show(records: Sequence[UsageRecord]) -> None:
    columns = ["time (UTC)", "request", "tenant", "model", "asked", "served", *_NUMBERS, "verdict"]
    show_table(columns, [_row(record) for record in records], numbers=_NUMBERS)


def _row(record: UsageRecord) -> Sequence[str]:
    named = [moment(record.accepted_unix_ms), record.request_id, record.tenant_id, record.model]
    receipt = record.receipt
    if receipt is None:
        return [*named, "", "", "", "", "", "no receipt"]
    verdict = receipt.verdict.value
    return [
        *named,
        receipt.tier_asked.value,
        receipt.tier_served.value,
        *map(_ms, (receipt.ttft_us, receipt.itl_p50_us, receipt.itl_p99_us)),
        f"{verdict}: {', '.join(receipt.missed)}" if receipt.missed else verdict,
    ]


def _ms(us: int | None) -> str:
    return "" if us is None else f"{us / 1000:,.1f}"
