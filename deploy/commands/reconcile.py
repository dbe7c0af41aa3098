"""`headrace reconcile`: proves that log and ledger agree, or names what differs first."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from headrace.deploy import ledgers
from headrace.serving.config import Config
from headrace.serving.metering.ledger.reconcile import Findings, reconcile
from headrace.serving.metering.ledger.statement import parse_month

SHOWN = 10


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "reconcile",
        help="prove that log and ledger agree",
        description="Read the meter log from its first record, compute every charge again from "
        "quantities and frozen rates, and compare with the ledger that is invoiced. Exit code 1 "
        "when anything differs.",
    )
    parser.add_argument("--month", help="compare only what ended in this month: 2026-11")
    parser.add_argument(
        "--logs",
        type=Path,
        nargs="+",
        default=[],
        metavar="FOLDER",
        help="every log of the ledger, where they are not all in this home",
    )
    parser.add_argument("--home", type=Path, help="state folder (default: HEADRACE_HOME)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    config = Config.load(args.home)
    month = None if args.month is None else parse_month(args.month)
    with ledgers.invoiced(config, args.logs) as ledger:
        findings = reconcile(ledgers.sources(config, args.logs), ledger, month=month)
    if args.json:
        print(json.dumps({"agree": findings.agree} | asdict(findings)))
    else:
        _show(findings)
    return 0 if findings.agree else 1


def _show(findings: Findings) -> None:
    running = f", {findings.open_requests:,} still run" if findings.open_requests else ""
    print(f"{findings.requests:,} requests compared{running}; difference", end=" ")
    print(f"{findings.difference_femto:,} femto, {findings.differences_found:,} differences.")
    for each in findings.differences[:SHOWN]:
        print(f"  {each.what}")
    if findings.differences_found > SHOWN:
        print(f"  … and {findings.differences_found - SHOWN:,} more; see --json.")
