"""`headrace adjust`: correct what an organisation owes."""

import argparse
import json
import uuid

from headrace.deploy.accounts import add_options
from headrace.deploy.corrections import nano, opened
from headrace.deploy.tables import money
from headrace.serving.admission.accounts import local_actor
from headrace.serving.domain.record import DEFAULT_PROJECT, Adjustment
from headrace.serving.domain.usage import FEMTO_PER_NANO


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "adjust",
        help="correct what an organisation owes",
        description="Add a correction to what is owed this month; a negative one gives back. What "
        "was written before stays. At home the log is written directly, unless a frontend runs: "
        "that one asks for a token.",
    )
    parser.add_argument("--tenant", required=True, help="whose account")
    parser.add_argument("--project", default=DEFAULT_PROJECT, help=f"({DEFAULT_PROJECT})")
    parser.add_argument("--amount", required=True, help="in units of currency: =-3.20 gives back")
    parser.add_argument("--currency", default="USD", help="that of the price book (USD)")
    parser.add_argument("--request-id", default="", help="the request that it corrects")
    parser.add_argument("--id", help="chosen by you: the same again changes nothing (random)")
    parser.add_argument("--reason", required=True, help="shown on the statement")
    add_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    adjustment = Adjustment(
        adjustment_id=uuid.uuid4().hex if args.id is None else args.id,
        tenant_id=args.tenant,
        project_id=args.project,
        request_id=args.request_id,
        amount_femto=nano(args.amount) * FEMTO_PER_NANO,
        currency=args.currency,
        reason=args.reason,
        actor=local_actor(),
    )
    with opened(args) as writer:
        log_id, seq = writer.write(adjustment)
    if args.json:
        print(json.dumps(as_json(adjustment, log_id=log_id, seq=seq)))
    else:
        print(
            f"Adjustment {adjustment.adjustment_id}: {shown_amount(adjustment)} for"
            f" {adjustment.tenant_id}, record {seq:,} of log {log_id}."
        )
    return 0


def shown_amount(adjustment: Adjustment) -> str:
    return money(adjustment.amount_femto // FEMTO_PER_NANO, adjustment.currency)


def as_json(
    adjustment: Adjustment, *, log_id: str | None, seq: int | None
) -> dict[str, str | int | None]:
    """What scripts rely on: names stay, more may be added. No record: it is not written."""
    return {
        "adjustment_id": adjustment.adjustment_id,
        "tenant_id": adjustment.tenant_id,
        "project_id": adjustment.project_id,
        "request_id": adjustment.request_id,
        "amount_nano": adjustment.amount_femto // FEMTO_PER_NANO,
        "currency": adjustment.currency,
        "reason": adjustment.reason,
        "log_id": log_id,
        "seq": seq,
    }
