"""`headrace credit`: give an organisation money."""

import argparse
import json
import uuid

from headrace.deploy.accounts import add_options
from headrace.deploy.corrections import nano, opened
from headrace.deploy.tables import money
from headrace.serving.admission.accounts import local_actor
from headrace.serving.domain.record import Grant
from headrace.serving.domain.usage import FEMTO_PER_NANO


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "credit",
        help="give an organisation money",
        description="Give credit, which is taken off what the organisation owes this month. At "
        "home the log is written directly, unless a frontend runs: that one asks for a token.",
    )
    parser.add_argument("--tenant", required=True, help="who gets it")
    parser.add_argument("--project", default="", help="(the organisation as a whole)")
    parser.add_argument("--amount", required=True, help="in units of currency: 12.50")
    parser.add_argument("--currency", default="USD", help="that of the price book (USD)")
    parser.add_argument("--id", help="chosen by you: the same again gives nothing twice (random)")
    parser.add_argument("--reason", required=True, help="shown on the statement")
    add_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    amount_nano = nano(args.amount)
    granted = Grant(
        grant_id=uuid.uuid4().hex if args.id is None else args.id,
        tenant_id=args.tenant,
        project_id=args.project,
        amount_femto=amount_nano * FEMTO_PER_NANO,
        currency=args.currency,
        reason=args.reason,
        actor=local_actor(),
    )
    with opened(args) as writer:
        log_id, seq = writer.write(granted)
    if args.json:
        shown = {
            "grant_id": granted.grant_id,
            "tenant_id": granted.tenant_id,
            "project_id": granted.project_id,
            "amount_nano": amount_nano,
            "currency": granted.currency,
            "reason": granted.reason,
            "log_id": log_id,
            "seq": seq,
        }
        print(json.dumps(shown))
    else:
        print(
            f"Credit {granted.grant_id}: {money(amount_nano, granted.currency)} for"
            f" {granted.tenant_id}, record {seq:,} of log {log_id}."
        )
    return 0
