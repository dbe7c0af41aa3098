"""`headrace orgs`: make, list, suspend and resume organisations."""

import argparse
import json
from collections.abc import Callable

from headrace.deploy.accounts import LIST_MAX, add_options, as_json, moment, opened
from headrace.deploy.tables import show_table
from headrace.serving.domain.account import AccountState, Organisation


def add_parser(
    subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str = "orgs"
) -> None:
    parser = subparsers.add_parser(
        name,
        help="make, list and suspend organisations",
        description="An organisation is who is charged: its id is the tenant of every record. It "
        "has projects, and they have keys. What is changed holds everywhere within a second.",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    create = actions.add_parser("create", help="make one, with a project `default`")
    create.add_argument("tenant_id", help="its id: 1 to 40 characters of [a-z0-9-]")
    create.add_argument("--name", default="", help="what people call it")
    create.set_defaults(run=_create)
    listing = actions.add_parser("list", help="show which there are")
    listing.set_defaults(run=_list)
    suspend = actions.add_parser("suspend", help="refuse all its keys until it is resumed")
    suspend.set_defaults(run=_setting(AccountState.SUSPENDED))
    resume = actions.add_parser("resume", help="let its keys in again")
    resume.set_defaults(run=_setting(AccountState.ACTIVE))
    for action in (suspend, resume):
        action.add_argument("tenant_id", help="its id")
    for action in (create, listing, suspend, resume):
        add_options(action)


def _create(args: argparse.Namespace) -> int:
    with opened(args) as accounts:
        made = accounts.create_organisation(tenant_id=args.tenant_id, display_name=args.name)
    return _show(made, args)


def _list(args: argparse.Namespace) -> int:
    found: list[Organisation] = []
    after = ""
    with opened(args) as accounts:
        while len(found) < LIST_MAX:
            page = accounts.organisations(after=after)
            found += page.items
            if not (after := page.next_token):
                break
    if args.json:
        print(json.dumps([as_json(each) for each in found]))
        return 0
    rows = [[o.tenant_id, o.display_name, moment(o.created_unix_ms), o.state] for o in found]
    show_table(["organisation", "name", "made (UTC)", "state"], rows)
    return 0


def _setting(state: AccountState) -> Callable[[argparse.Namespace], int]:
    def run(args: argparse.Namespace) -> int:
        with opened(args) as accounts:
            after = accounts.set_organisation_state(tenant_id=args.tenant_id, state=state)
        return _show(after, args)

    return run


def _show(organisation: Organisation, args: argparse.Namespace) -> int:
    if args.json:
        print(json.dumps(as_json(organisation)))
    else:
        print(f"Organisation {organisation.tenant_id} is {organisation.state}.")
    return 0
