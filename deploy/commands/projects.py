"""`headrace projects`: make, list, suspend and resume the projects of an organisation."""

import argparse
import json
from collections.abc import Callable

from headrace.deploy.accounts import add_options, as_json, moment, opened
from headrace.deploy.tables import show_table
from headrace.serving.domain.account import AccountState, Project


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "projects",
        help="make, list and suspend projects",
        description="A project is a part of an organisation with its own keys and limits. What is "
        "changed holds everywhere within a second.",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    create = actions.add_parser("create", help="make one")
    create.set_defaults(run=_create)
    listing = actions.add_parser("list", help="show which an organisation has")
    listing.set_defaults(run=_list)
    suspend = actions.add_parser("suspend", help="refuse all its keys until it is resumed")
    suspend.set_defaults(run=_setting(AccountState.SUSPENDED))
    resume = actions.add_parser("resume", help="let its keys in again")
    resume.set_defaults(run=_setting(AccountState.ACTIVE))
    for action in (create, suspend, resume):
        action.add_argument("project_id", help="its id: 1 to 40 characters of [a-z0-9-]")
    for action in (create, listing, suspend, resume):
        action.add_argument("--tenant", required=True, help="the organisation's id")
        add_options(action)


def _create(args: argparse.Namespace) -> int:
    with opened(args) as accounts:
        made = accounts.create_project(tenant_id=args.tenant, project_id=args.project_id)
    return _show(made, args)


def _list(args: argparse.Namespace) -> int:
    found: list[Project] = []
    after = ""
    with opened(args) as accounts:
        # An organisation has at most a thousand projects.
        while True:
            page = accounts.projects(tenant_id=args.tenant, after=after)
            found += page.items
            if not (after := page.next_token):
                break
    if args.json:
        print(json.dumps([as_json(each) for each in found]))
        return 0
    rows = [[p.project_id, p.tenant_id, moment(p.created_unix_ms), p.state] for p in found]
    show_table(["project", "organisation", "made (UTC)", "state"], rows)
    return 0


def _setting(state: AccountState) -> Callable[[argparse.Namespace], int]:
    def run(args: argparse.Namespace) -> int:
        with opened(args) as accounts:
            after = accounts.set_project_state(
                tenant_id=args.tenant, project_id=args.project_id, state=state
            )
        return _show(after, args)

    return run


def _show(project: Project, args: argparse.Namespace) -> int:
    if args.json:
        print(json.dumps(as_json(project)))
    else:
        print(f"Project {project.project_id} of {project.tenant_id} is {project.state}.")
    return 0
