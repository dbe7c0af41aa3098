"""`headrace usage`: what each request used and what it was charged, from the usage records."""

import argparse
import json
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from headrace.deploy import ledgers
from headrace.deploy.commands import usage_export
from headrace.deploy.tables import money, show_table
from headrace.serving.clock import Clock, SystemClock
from headrace.serving.config import Config
from headrace.serving.domain.record import UsageRecord
from headrace.serving.domain.tier import Tier
from headrace.serving.errors import InvalidRequest
from headrace.serving.metering.ledger.reader import RECORDS_MAX, LedgerReader, Totals, Which

_UNITS_MS = {"s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_AGO = re.compile(r"([0-9]{1,6})([smhd])")
_NUMBERS = ("prompt", "cached", "completion", "charge")


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "usage",
        help="show what requests used and cost",
        description="The newest requests first, with totals over all that match. Reads this "
        "home's ledger beside a running frontend, after bringing it up to the meter log.",
    )
    add_filters(parser)
    parser.add_argument("--limit", type=int, default=20, help="most requests shown (default: 20)")
    parser.add_argument("--home", type=Path, help="state folder (default: HEADRACE_HOME)")
    parser.add_argument("--json", action="store_true", help="print a list of JSON objects")
    parser.set_defaults(run=run)
    actions = parser.add_subparsers(metavar="[ACTION]")
    export = actions.add_parser(
        "export",
        help="write usage in FOCUS columns as CSV, JSON or Parquet",
        description="One row for each unit of each request that ended, and for each correction; "
        "from the ledger that is invoiced. Amounts are exact decimals.",
        # What stands before `export` holds unless it is said again.
        argument_default=argparse.SUPPRESS,
    )
    add_filters(export)
    usage_export.add_arguments(export)
    export.set_defaults(run=_export)


def add_filters(parser: argparse.ArgumentParser) -> None:
    """Options that choose requests; `which` reads them."""
    parser.add_argument("--tenant", help="only this tenant's requests")
    parser.add_argument("--project", help="only this project's")
    parser.add_argument("--key", metavar="KEY_ID", help="only those made with this key")
    parser.add_argument("--model", help="only those for this model")
    parser.add_argument("--tier", choices=[tier.value for tier in Tier], help="as asked")
    parser.add_argument("--request-id", help="only this request")
    when = "90s, 15m, 2h, 7d ago, or 2026-01-31T12:00 (UTC)"
    parser.add_argument("--since", metavar="TIME", help=f"accepted since: {when}")
    parser.add_argument("--until", metavar="TIME", help=f"accepted before: {when}")


def run(args: argparse.Namespace) -> int:
    if not 0 < args.limit <= RECORDS_MAX:
        raise InvalidRequest(
            f"--limit is {args.limit}.",
            why=f"It lies between 1 and {RECORDS_MAX:,}.",
            fix="Narrow the question with --since or --tenant.",
            field="limit",
        )
    chosen = which(args)
    config = Config.load(args.home)
    with ledgers.local(config) as ledger:
        reader = LedgerReader(ledger)
        records = reader.records(chosen, limit=args.limit)
        if args.json:
            print(json.dumps([as_json(record) for record in records]))
        elif not records:
            none = "No requests yet. Try `headrace chat`."
            print(none if chosen == Which() else "No such requests.")
        else:
            _show(records, reader.totals(chosen))
    return 0


def which(args: argparse.Namespace, *, month: int | None = None) -> Which:
    """The requests that `add_filters` chose.

    Raises:
        InvalidRequest: a time that is none.
    """
    clock = SystemClock()
    return Which(
        tenant_id=args.tenant,
        project_id=args.project,
        key_id=args.key,
        model=args.model,
        tier=None if args.tier is None else Tier(args.tier),
        request_id=args.request_id,
        since_unix_ms=None if args.since is None else since_unix_ms(args.since, clock),
        until_unix_ms=None if args.until is None else since_unix_ms(args.until, clock, "until"),
        month=month,
    )


def _export(args: argparse.Namespace) -> int:
    return usage_export.run(args, which)


def as_json(record: UsageRecord) -> dict[str, str | int | None]:
    """What scripts rely on: names stay, more may be added."""
    usage = record.usage
    return {
        "request_id": record.request_id,
        "tenant_id": record.tenant_id,
        "key_id": record.key_id,
        "model": record.model,
        "version": record.version,
        "prompt_tokens": usage.prompt_tokens,
        "cached_tokens": usage.cached_tokens,
        "completion_tokens": usage.completion_tokens,
        "reasoning_tokens": usage.reasoning_tokens,
        "cache_write_tokens": usage.cache_write_tokens,
        "project_id": record.project_id,
        "tier": record.tier.value,
        "tier_served": record.receipt.tier_served.value if record.receipt else None,
        "outcome": record.outcome.value,
        "charge_nano": record.charge_nano,
        "charge_femto": record.charge_femto,
        "waived_femto": record.waived_femto,
        "currency": record.currency,
        "price_version": record.price_version,
        "accepted_unix_ms": record.accepted_unix_ms,
        "first_token_unix_ms": record.first_token_unix_ms,
        "settled_unix_ms": record.settled_unix_ms,
        "replicas_tried": record.replicas_tried,
    }


def since_unix_ms(text: str, clock: Clock, option: str = "since") -> int:
    """`15m` ago, or a date and time, as milliseconds since 1970 UTC.

    Raises:
        InvalidRequest: it is neither.
    """
    if ago := _AGO.fullmatch(text):
        return clock.unix_ms() - int(ago[1]) * _UNITS_MS[ago[2]]
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise InvalidRequest(
            f"--{option} is {text!r}.",
            why="It is how long ago, or a date and time.",
            fix="Write it like 90s, 15m, 2h, 7d, 2026-01-31 or 2026-01-31T12:00.",
            field=option,
        ) from error
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return max(0, int(moment.timestamp() * 1000))


def _show(records: Sequence[UsageRecord], totals: Sequence[Totals]) -> None:
    columns = ["time (UTC)", "request", "tenant", "model", *_NUMBERS[:3], "outcome", "charge"]
    rows = [
        [
            moment(record.accepted_unix_ms),
            record.request_id,
            record.tenant_id,
            record.model,
            f"{record.usage.prompt_tokens:,}",
            f"{record.usage.cached_tokens:,}",
            f"{record.usage.completion_tokens:,}",
            record.outcome.value,
            money(record.charge_nano, record.currency),
        ]
        for record in records
    ]
    # One currency is the rule; a second one after a change of the price book gets its own lines.
    footer = [
        "\n".join(lines)
        for lines in zip(*(_footer(each, shown=len(records)) for each in totals), strict=True)
    ]
    show_table(columns, rows, numbers=_NUMBERS, footer=footer)


def _footer(totals: Totals, *, shown: int) -> Sequence[str]:
    rest = "" if totals.requests <= shown else f", {shown:,} shown"
    return [
        "total",
        f"{totals.requests:,} requests{rest}",
        "",
        "",
        f"{totals.usage.prompt_tokens:,}",
        f"{totals.usage.cached_tokens:,}",
        f"{totals.usage.completion_tokens:,}",
        "",
        money(totals.charge_nano, totals.currency),
    ]


def moment(unix_ms: int) -> str:
    """For tables, in UTC."""
    return datetime.fromtimestamp(unix_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")
