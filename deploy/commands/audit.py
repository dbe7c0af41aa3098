"""`headrace audit`: show who changed what, and check that nobody changed that."""

import argparse
import json
from dataclasses import asdict

from headrace.deploy.accounts import LIST_MAX, add_options, moment, opened
from headrace.deploy.tables import show_table
from headrace.serving.domain.account import AuditRecord
from headrace.serving.errors import InvalidRequest

PAGE = 1_000


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "audit",
        help="show and verify who changed what",
        description="Every change of organisations, projects and keys is in a log that only grows, "
        "each record chained to the one before by its hash.",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="show the newest records first")
    listing.add_argument("--tenant", help="only of this organisation")
    listing.add_argument("--limit", type=int, default=50, help="most records shown (50)")
    listing.set_defaults(run=_list)
    verify = actions.add_parser(
        "verify",
        help="check the whole chain; exit code 1 when it is broken",
        description="Prints the hash of the last record. Kept where nobody who can write the "
        "accounts can write, and given with --head later, it proves that nothing up to there "
        "changed since.",
    )
    verify.add_argument("--head", default="", help="a hash that was noted earlier")
    verify.set_defaults(run=_verify)
    for action in (listing, verify):
        add_options(action)


def _list(args: argparse.Namespace) -> int:
    if not 1 <= args.limit <= LIST_MAX:
        raise InvalidRequest(
            f"--limit is {args.limit}.",
            why=f"It is 1 to {LIST_MAX:,}.",
            fix="Show fewer, or those of one organisation with --tenant.",
            field="limit",
        )
    found: list[AuditRecord] = []
    before_seq: int | None = None
    with opened(args) as accounts:
        while len(found) < args.limit:
            limit = min(PAGE, args.limit - len(found))
            page = accounts.audit(tenant_id=args.tenant, before_seq=before_seq, limit=limit)
            found += page.items
            if not page.next_token:
                break
            before_seq = int(page.next_token)
    if args.json:
        print(json.dumps([asdict(record) for record in found]))
        return 0
    rows = [[str(r.seq), moment(r.unix_ms), r.actor, r.action, r.target, r.changed] for r in found]
    show_table(["no.", "time (UTC)", "who", "what", "to what", "changed"], rows, numbers=["no."])
    return 0


def _verify(args: argparse.Namespace) -> int:
    with opened(args) as accounts:
        verdict = accounts.verify_audit(head=args.head)
    if args.json:
        print(json.dumps(asdict(verdict) | {"ok": not verdict.problem}))
    elif verdict.problem:
        print(f"The audit log was tampered with. {verdict.problem}")
    else:
        print(f"{verdict.records:,} records, all right. Head: {verdict.head}")
    return 1 if verdict.problem else 0
