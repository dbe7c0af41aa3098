"""`headrace usage`: what each request used and what it was charged, from the usage records."""

import argparse
import json
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from headrace.deploy.tables import money, show_table
from headrace.serving.clock import Clock, SystemClock
from headrace.serving.config import Config
from headrace.serving.domain.record import UsageRecord
from headrace.serving.errors import InvalidRequest
from headrace.serving.metering.usage_reader import RECORDS_MAX, Totals, UsageReader, Which

_UNITS_MS = {"s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_AGO = re.compile(r"([0-9]{1,6})([smhd])")
_NUMBERS = ("prompt", "cached", "completion", "charge")


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "usage",
        help="show what requests used and cost",
        description="The newest requests first, with totals over all that match. Reads the "
        "records beside a running frontend.",
    )
    parser.add_argument("--tenant", help="only this tenant's requests")
    parser.add_argument("--request-id", help="only this request")
    parser.add_argument(
        "--since",
        metavar="TIME",
        help="accepted since: 90s, 15m, 2h, 7d, or 2026-01-31T12:00 (UTC)",
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
    reader = UsageReader(Config.load(args.home).ledger_path)
    records = reader.records(which, limit=args.limit)
    if args.json:
        print(json.dumps([as_json(record) for record in records]))
    elif not records:
        print("No requests yet. Try `headrace chat`." if which == Which() else "No such requests.")
    else:
        _show(records, reader.totals(which))
    return 0


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
        "outcome": record.outcome.value,
        "charge_nano": record.charge_nano,
        "currency": record.currency,
        "price_version": record.price_version,
        "accepted_unix_ms": record.accepted_unix_ms,
        "first_token_unix_ms": record.first_token_unix_ms,
        "settled_unix_ms": record.settled_unix_ms,
        "replicas_tried": record.replicas_tried,
    }


def since_unix_ms(text: str, clock: Clock) -> int:
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
            f"--since is {text!r}.",
            why="It is how long ago, or a date and time.",
            fix="Write it like 90s, 15m, 2h, 7d, 2026-01-31 or 2026-01-31T12:00.",
            field="since",
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
