"""`headrace meterlog`: proves that the log of usage is whole, prints it, makes ledgers from it."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from headrace.deploy import ledgers
from headrace.deploy.tables import show_table
from headrace.serving.config import Config
from headrace.serving.errors import InvalidRequest, MeterLogDamaged
from headrace.serving.metering.ledger.ledger import Ledger
from headrace.serving.metering.ledger.replay import open_database, replay
from headrace.serving.metering.meterlog.reader import Logged, LogReader
from headrace.serving.metering.meterlog.verify import Verified, verify

EXIT_DAMAGED = 1
OPEN_SHOWN_MAX = 20
"""Open holds that a person is shown; --json has them all."""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "meterlog",
        help="verify, print and replay the log that usage is charged by",
        description="The meter log in <home>/meterlog. May be read beside a running frontend.",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    proof = actions.add_parser(
        "verify",
        help="check every record, seal and hold",
        description="Check every checksum and sequence number, every Merkle root, the chain of "
        "seals, and that every hold ends exactly once. Exit status 1 and the place of the first "
        "damage if there is any.",
    )
    proof.set_defaults(run=_verify)
    dump = actions.add_parser(
        "dump",
        help="print records, one JSON object a line",
        description="Print durable records in order, one JSON object a line: log_id, seq, unix_ms, "
        "and the event under its name. Hashes are hex; fields that are zero or empty are left out.",
    )
    dump.add_argument("--after", type=int, default=0, metavar="SEQ", help="only what follows it")
    dump.set_defaults(run=_dump)
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
    for action in (proof, dump, again):
        action.add_argument("--home", type=Path, help="state folder (default: HEADRACE_HOME)")
        action.add_argument("--json", action="store_true", help="print JSON (dump always does)")


def _verify(args: argparse.Namespace) -> int:
    folder = Config.load(args.home).meterlog_dir
    try:
        verified = verify(folder)
    except MeterLogDamaged as damage:
        if args.json:
            place = {"file": damage.path, "offset": damage.offset, "seq": damage.seq}
            print(json.dumps({"ok": False, **place, "what": damage.what}))
        else:
            print(f"DAMAGED  {damage.what}\n  why: {damage.why}\n  fix: {damage.fix}")
        return EXIT_DAMAGED
    if args.json:
        print(json.dumps({"ok": True, **asdict(verified)}))
    else:
        _show(verified)
    return 0


def _dump(args: argparse.Namespace) -> int:
    if args.after < 0:
        raise InvalidRequest(
            f"--after is {args.after}.",
            why="Sequence numbers count from 1; 0 is before the first.",
            fix="Leave it out to print everything.",
            field="after",
        )
    reader = LogReader(Config.load(args.home).meterlog_dir)
    seq = args.after
    while records := reader.after(seq):
        for record in records:
            print(json.dumps(as_json(record)))
        seq = records[-1].seq
    return 0


def _replay(args: argparse.Namespace) -> int:
    config = Config.load(args.home)
    target = Ledger(open_database(args.into))
    try:
        with ledgers.invoiced(config) as before:
            records = replay(ledgers.sources(config, args.logs), target, before=before)
    finally:
        target.close()
    if args.json:
        print(json.dumps({"records": records, "into": target.name}))
    else:
        print(f"{records:,} records applied to {target.name}.")
    return 0


def as_json(record: Logged) -> dict[str, object]:
    """What scripts rely on: names stay, more may be added."""
    return {"log_id": record.log_id, "seq": record.seq, **_plain(record.event)}


def _plain(message: Message) -> dict[str, object]:
    """The fields that are set, as JSON values. Whole numbers stay whole numbers."""
    return {field.name: _value(field, value) for field, value in message.ListFields()}


def _value(field: FieldDescriptor, value: Any) -> object:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return dict(value.items())
    if field.is_repeated:
        return [_single(field, each) for each in value]
    return _single(field, value)


def _single(field: FieldDescriptor, value: Any) -> object:
    if isinstance(value, Message):
        return _plain(value)
    if isinstance(value, bytes):
        return value.hex()
    if field.enum_type is not None:
        return field.enum_type.values_by_number[value].name
    return value


def _show(verified: Verified) -> None:
    print("whole")
    print(f"log        {verified.log_id}")
    print(f"records    {verified.records:,}")
    print(f"segments   {verified.segments:,}, sealed {verified.sealed:,}")
    print(f"chain      {verified.chain}")
    print(f"open holds {len(verified.open):,}")
    if verified.torn_bytes:
        print(f"{verified.torn_bytes:,} bytes at the end are of a write that is not finished")
    if verified.open:
        rows = [[str(h.reserve), h.tenant_id, h.request_id] for h in verified.open]
        show_table(["record", "tenant", "request"], rows[:OPEN_SHOWN_MAX], numbers=["record"])
