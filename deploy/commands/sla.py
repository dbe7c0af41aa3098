"""`headrace sla`: a tenant's month as a signed statement, and its check by anyone."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from headrace.deploy import corrections, ledgers, sla_credits
from headrace.deploy.accounts import add_options
from headrace.deploy.commands.adjust import as_json, shown_amount
from headrace.deploy.tables import money, show_table
from headrace.serving.admission.key_store import secret_file
from headrace.serving.clock import SystemClock
from headrace.serving.config import Config
from headrace.serving.domain.usage import nano_of
from headrace.serving.errors import InvalidRequest
from headrace.serving.metering.ledger.reader import LedgerReader, Which
from headrace.serving.metering.sla import Statement, statement
from headrace.serving.metering.sla_month import Month
from headrace.serving.metering.sla_signature import (
    STATEMENT_BYTES_MAX,
    StatementKey,
    statement_json,
    verify,
)

_NUMBERS = ("requests", "promised", "attained", "credit")


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "sla",
        help="state what a month promised and gave, signed",
        description="Attainment, breaches and credits of a tenant's month, from its receipts.",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    state = actions.add_parser("statement", help="make the statement of one month")
    state.add_argument("--tenant", required=True, help="whose month")
    state.add_argument("--month", required=True, help="in UTC, like 2026-11")
    state.add_argument("--out", type=Path, help="write the signed statement to this file")
    state.set_defaults(run=_state)
    credit = actions.add_parser(
        "credits",
        help="show the credits of one month, and give them",
        description="The statement is this home's; --address says which frontend writes.",
    )
    credit.add_argument("--tenant", required=True, help="whose month")
    credit.add_argument("--month", required=True, help="in UTC, like 2026-11")
    credit.add_argument("--apply", action="store_true", help="write them: twice gives once")
    credit.set_defaults(run=_credit)
    add_options(credit)
    check = actions.add_parser("verify", help="check a signed statement and print what it says")
    check.add_argument("file", type=Path, help="as --out wrote it")
    check.add_argument("--key", type=Path, help="the issuer's public key (default: this home's)")
    check.set_defaults(run=_verify)
    key = actions.add_parser("key", help="print the public key that statements verify with")
    key.set_defaults(run=_show_key)
    for action in (state, check, key):
        action.add_argument("--home", type=Path, help="state folder (default: HEADRACE_HOME)")
        action.add_argument("--json", action="store_true", help="print JSON")


def _state(args: argparse.Namespace) -> int:
    config = Config.load(args.home)
    made = _made(config, args.tenant, Month.parse(args.month))
    if args.out is not None:
        signed = _key(config).sign(made, issued_unix_ms=SystemClock().unix_ms())
        args.out.write_text(signed + "\n", "ascii")
        print(f"signed in {args.out}", file=sys.stderr)
    if args.json:
        print(json.dumps(statement_json(made)))
    else:
        _show(made)
    return 0


def _made(config: Config, tenant_id: str, month: Month) -> Statement:
    which = Which(
        tenant_id=tenant_id,
        since_unix_ms=month.begins_unix_ms,
        until_unix_ms=month.ends_unix_ms,
    )
    with ledgers.invoiced(config) as ledger:
        return statement(
            LedgerReader(ledger).stream(which),
            tenant_id=tenant_id,
            month=month,
            objective_of=config.tiers.objective,
        )


def _credit(args: argparse.Namespace) -> int:
    month = Month.parse(args.month)
    found = sla_credits.adjustments(_made(Config.load(args.home), args.tenant, month))
    records: list[tuple[str, int] | tuple[None, None]] = [(None, None)] * len(found)
    if args.apply:
        sla_credits.check_over(month, unix_ms=SystemClock().unix_ms())
    if args.apply and found:
        with corrections.opened(args) as writer:
            records = [writer.write(each) for each in found]
    shown = list(zip(found, records, strict=True))
    if args.json:
        print(json.dumps([as_json(each, log_id=log, seq=seq) for each, (log, seq) in shown]))
    elif not shown:
        print(f"No credit is due to {args.tenant} for {month}.")
    for each, (log, seq) in () if args.json else shown:
        where = "not written" if seq is None else f"record {seq:,} of log {log}"
        print(f"{shown_amount(each)}  {each.reason}  ({where})")
    return 0


def _verify(args: argparse.Namespace) -> int:
    said = verify(_read(args.file), _public_jwk(args))
    if args.json:
        print(json.dumps(said))
    else:
        print(f"The statement of {said['tenant_id']} for {said['month']} is genuine.")
    return 0


def _show_key(args: argparse.Namespace) -> int:
    print(json.dumps(_key(Config.load(args.home)).public_jwk))
    return 0


def _public_jwk(args: argparse.Namespace) -> dict[str, str]:
    if args.key is None:
        return _key(Config.load(args.home)).public_jwk
    try:
        jwk: Any = json.loads(_read(args.key))
        return {name: str(jwk[name]) for name in ("kty", "crv", "x")}
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidRequest(
            f"{args.key} is not a public key.",
            why="It is one JSON object, as `headrace sla key` prints it.",
            fix="Ask the issuer for it.",
            field="key",
        ) from error


def _key(config: Config) -> StatementKey:
    """The key of this home, made on first use."""
    config.prepare_home()
    path = config.sla_key_path
    return StatementKey(secret_file(path), where=str(path))


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(STATEMENT_BYTES_MAX + 1).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(
            f"{path} cannot be read: {error}.",
            why="A signed statement and a public key are files of text.",
            fix="Name the file that was written.",
            field="file",
        ) from error


def _show(made: Statement) -> None:
    if not made.lines:
        print(f"{made.tenant_id} asked for nothing in {made.month}.")
        return
    rows = [
        [
            line.model,
            line.tier.value,
            each.objective,
            f"{each.counted:,}",
            _percent(each.promised_ppm),
            _percent(each.attained_ppm),
            _percent(each.credit_ppm),
        ]
        for line in made.lines
        for each in line.attainments
    ]
    show_table(["model", "tier", "objective", *_NUMBERS], rows, numbers=_NUMBERS)
    for each in made.adjustments():
        print(f"credit {money(nano_of(-each.amount_femto), each.currency)}  {each.reason}")


def _percent(ppm: int) -> str:
    return f"{ppm / 10_000:.2f} %"
