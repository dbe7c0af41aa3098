"""`headrace ledger`: how far each log is in the ledger."""

import argparse
import json
from pathlib import Path

from headrace.deploy import ledgers
from headrace.deploy.tables import show_table
from headrace.serving.config import Config


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "ledger",
        help="show how far the ledger is",
        description="The ledger is a projection of the meter logs; `headrace meterlog replay` "
        "makes it again.",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    status = actions.add_parser("status", help="show how far each log is in the ledger")
    status.set_defaults(run=_status)
    status.add_argument("--home", type=Path, help="state folder (default: HEADRACE_HOME)")
    status.add_argument("--json", action="store_true", help="print JSON")


def _status(args: argparse.Namespace) -> int:
    config = Config.load(args.home)
    rows: list[dict[str, str | int]] = []
    for name, opened in (("local", ledgers.local), ("invoiced", ledgers.invoiced)):
        if name == "invoiced" and config.ledger.postgres_dsn_file is None:
            continue
        with opened(config) as ledger:
            found = ledger.database.rows("SELECT log_id, seq FROM log ORDER BY log_id")
            rows += [{"ledger": ledger.name, "log_id": log, "seq": seq} for log, seq in found]
    if args.json:
        print(json.dumps(rows))
    else:
        shown = [[str(row["ledger"]), str(row["log_id"]), f"{row['seq']:,}"] for row in rows]
        show_table(["ledger", "log", "records"], shown, numbers=("records",))
    return 0
