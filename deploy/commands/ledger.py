"""`headrace ledger`: how far each log is in the ledger; and the ledger made again from the logs."""

import argparse
import json
from pathlib import Path

from headrace.deploy import ledgers
from headrace.deploy.tables import show_table
from headrace.serving.config import Config
from headrace.serving.metering.ledger.ledger import Ledger
from headrace.serving.metering.ledger.replay import open_database, replay


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "ledger",
        help="show how far the ledger is, or make it again from the logs",
        description="The ledger is a projection of the meter logs.",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    status = actions.add_parser("status", help="show how far each log is in the ledger")
    status.set_defaults(run=_status)
    again = actions.add_parser(
        "replay",
        help="make a ledger again from the logs",
        description="Fill a new ledger from the first record of every log. Invoices are in no log "
        "and are taken from the ledger in use. May be stopped and begun again.",
    )
    again.add_argument(
        "--into", required=True, metavar="TARGET", help="a file, or postgres://user@host/database"
    )
    again.add_argument(
        "--logs", type=Path, nargs="+", default=[], metavar="FOLDER", help="default: the home's"
    )
    again.set_defaults(run=_replay)
    for action in (status, again):
        action.add_argument("--home", type=Path, help="state folder (default: HEADRACE_HOME)")
        action.add_argument("--json", action="store_true", help="print JSON")


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


def _replay(args: argparse.Namespace) -> int:
    config = Config.load(args.home)
    target = Ledger(open_database(args.into))
    try:
        with ledgers.invoiced(config) as before:
            records = replay(
                ledgers.sources(config, args.logs),
                target,
                before=before,
            )
    finally:
        target.close()
    if args.json:
        print(json.dumps({"records": records, "into": target.name}))
    else:
        print(f"{records:,} records applied to {target.name}.")
    return 0
