"""`headrace usage export`: usage in FOCUS columns, streamed to a file or to standard output."""

import argparse
import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path

from headrace.deploy import ledgers
from headrace.serving.config import Config
from headrace.serving.errors import ConfigRefused, InvalidRequest
from headrace.serving.metering.ledger import focus, focus_files
from headrace.serving.metering.ledger.focus import FocusRow
from headrace.serving.metering.ledger.reader import Which
from headrace.serving.metering.ledger.statement import parse_month

FORMATS = ("csv", "json", "parquet")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--format", choices=FORMATS, default="csv", help="default: csv")
    parser.add_argument("--focus", default="1.2", metavar="VERSION", help="default: 1.2")
    parser.add_argument("--month", default=None, help="only what ended in this month: 2026-11")
    parser.add_argument("--output", type=Path, default=None, help="default: standard output")
    parser.add_argument("--home", type=Path, help="state folder (default: HEADRACE_HOME)")


def run(args: argparse.Namespace, which: Callable[..., Which]) -> int:
    focus.check_version(args.focus)
    chosen = which(args, month=None if args.month is None else parse_month(args.month))
    with ledgers.invoiced(Config.load(args.home)) as ledger:
        rows = focus.rows(ledger, chosen)
        if args.format == "parquet":
            count = _parquet(rows, args.output)
        else:
            write = focus_files.write_csv if args.format == "csv" else focus_files.write_json
            opened = (
                nullcontext(sys.stdout)
                if args.output is None
                else args.output.open("w", newline="", encoding="utf-8")
            )
            with opened as file:
                count = write(rows, file)
    if args.output is not None:
        print(f"{count:,} rows in {args.output}")
    return 0


def _parquet(rows: Iterable[FocusRow], output: Path | None) -> int:
    if output is None:
        raise InvalidRequest(
            "Parquet is not written to standard output.",
            why="Its index is at the end, and readers want a file.",
            fix="Name one with --output.",
            field="output",
        )
    try:
        from headrace.serving.metering.ledger.focus_parquet import write_parquet
    except ImportError as error:
        raise ConfigRefused(
            "The Parquet library is not installed.",
            why="An embedded installation does not need it.",
            fix="Run `pip install 'headrace[parquet]'`, or choose --format csv.",
        ) from error
    return write_parquet(rows, output)
