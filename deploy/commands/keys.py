"""`headrace keys`: make, list, change, rotate and revoke API keys."""

import argparse
import json
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from headrace.deploy.accounts import (
    LIST_MAX,
    Accounts,
    add_options,
    as_json,
    duration_ms,
    moment,
    opened,
    who_am_i,
)
from headrace.deploy.tables import show_table
from headrace.serving.admission.accounts import open_accounts
from headrace.serving.clock import SystemClock
from headrace.serving.config import Config
from headrace.serving.domain.account import ApiKey, NewKey
from headrace.serving.domain.record import DEFAULT_PROJECT
from headrace.serving.domain.scope import UNLIMITED, Scope
from headrace.serving.domain.tier import Tier
from headrace.serving.errors import AccountNotFound, InvalidRequest

NEVER = "never"
_ID_HELP = "the part of the key between its two underscores"
_TIERS = ", ".join(Tier)


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "keys",
        help="make, list, rotate and revoke API keys",
        description="Make, list, change, rotate and revoke API keys. Every running frontend "
        "follows within a second.",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    demo = actions.add_parser("demo", help="show the demo organisation's key, made on first use")
    demo.set_defaults(run=_demo)
    create = actions.add_parser("create", help="make a key and show it, once")
    create.add_argument("--tenant", required=True, help="the organisation; at home made if missing")
    create.add_argument("--project", default=DEFAULT_PROJECT, help=f"({DEFAULT_PROJECT})")
    create.add_argument("--key-id", default="", help="choose the id; a retry makes no second key")
    create.add_argument("--expires", default="90d", help="in 90d, 24h, …, or never (90d)")
    create.set_defaults(run=_create)
    listing = actions.add_parser("list", help="show which keys there are, not the keys themselves")
    listing.add_argument("--project", help="only of this project")
    listing.set_defaults(run=_list)
    update = actions.add_parser("update", help="change a key's scope, label or expiry")
    update.add_argument("--expires", help="in 90d, 24h, …, or never")
    update.set_defaults(run=_update)
    rotate = actions.add_parser("rotate", help="make its successor, and let it end")
    rotate.add_argument("--overlap", default="24h", help="both are good for so long (24h)")
    rotate.add_argument("--new-key-id", default="", help="choose the successor's id")
    rotate.set_defaults(run=_rotate)
    revoke = actions.add_parser("revoke", help="refuse a key from now on")
    revoke.set_defaults(run=_revoke)
    who = actions.add_parser("whoami", help="show who a token or a key is at a frontend")
    who.set_defaults(run=_who)
    pepper = actions.add_parser(
        "rotate-pepper",
        help="make new keys stand on a fresh pepper",
        description="Keys in force go on standing on the pepper before. It is kept until the next "
        "rotation, which is refused while a key in force needs it. At home only.",
    )
    pepper.set_defaults(run=_rotate_pepper)
    for action in (create, update):
        _add_scope(action)
    for action in (update, rotate, revoke):
        action.add_argument("key_id", help=_ID_HELP)
    for action in (listing, update, rotate, revoke):
        action.add_argument("--tenant", help="only of this organisation")
    for action in (create, listing, update, rotate, revoke, who):
        add_options(action)
    for action in (demo, pepper):
        action.add_argument("--home", type=Path, help="state folder (default: HEADRACE_HOME)")
        action.add_argument("--json", action="store_true", help="print JSON")


def _add_scope(parser: argparse.ArgumentParser) -> None:
    """Lists are separated by commas; what is not given stays, or takes its default."""
    parser.add_argument("--label", help="what people call it")
    parser.add_argument("--models", help="patterns of models: qwen-*,smollm2-135m (*)")
    parser.add_argument("--tiers", help=f"some of {_TIERS} (all)")
    parser.add_argument("--default-tier", choices=list(Tier), help="of requests that ask for none")
    parser.add_argument("--max-tier", choices=list(Tier), help="the strongest it may ask for")
    parser.add_argument("--methods", help="inference, batch, admin-read, admin, or Inference/List*")
    parser.add_argument("--addresses", help="networks it may be used from, or none: 10.0.0.0/8")


def _demo(args: argparse.Namespace) -> int:
    config = Config.load(args.home)
    config.prepare_home()
    with closing(open_accounts(config)) as store:
        return _show_new(store.demo(), args)


def _create(args: argparse.Namespace) -> int:
    with opened(args) as accounts:
        try:
            new = _make(accounts, args)
        except AccountNotFound:
            # Every organisation has the default project, so it is the organisation that is missing.
            if args.address is not None or args.project != DEFAULT_PROJECT:
                raise
            accounts.create_organisation(tenant_id=args.tenant)
            new = _make(accounts, args)
    return _show_once(new, args)


def _make(accounts: Accounts, args: argparse.Namespace) -> NewKey:
    return accounts.create_key(
        tenant_id=args.tenant,
        project_id=args.project,
        label=args.label or "",
        scope=_scope(args, UNLIMITED),
        expires_unix_ms=None if args.expires == NEVER else _from_now(args.expires),
        key_id=args.key_id,
    )


def _list(args: argparse.Namespace) -> int:
    found: list[ApiKey] = []
    after = ""
    with opened(args) as accounts:
        while len(found) < LIST_MAX:
            page = accounts.keys(tenant_id=args.tenant, project_id=args.project, after=after)
            found += page.items
            if not (after := page.next_token):
                break
    found.sort(key=lambda key: key.created_unix_ms)
    if args.json:
        print(json.dumps([as_json(key) for key in found]))
        return 0
    now_unix_ms = SystemClock().unix_ms()
    rows = [
        [
            key.key_id,
            key.tenant_id,
            key.project_id,
            key.label,
            moment(key.created_unix_ms),
            moment(key.expires_unix_ms),
            moment(key.last_used_unix_ms),
            _state(key, now_unix_ms),
        ]
        for key in found
    ]
    columns = ["key id", "organisation", "project", "label", "made (UTC)", "expires", "last used"]
    show_table([*columns, "state"], rows)
    return 0


def _update(args: argparse.Namespace) -> int:
    with opened(args) as accounts:
        before = accounts.key(key_id=args.key_id, tenant_id=args.tenant)
        scope = _scope(args, before.scope)
        ends = args.expires not in (None, NEVER)
        after = accounts.update_key(
            key_id=args.key_id,
            tenant_id=args.tenant,
            label=args.label,
            scope=None if scope == before.scope else scope,
            expires_unix_ms=_from_now(args.expires) if ends else None,
            never_expires=args.expires == NEVER,
        )
    if args.json:
        print(json.dumps(as_json(after)))
    else:
        print(f"Key {after.key_id} of {after.tenant_id} is changed.")
    return 0


def _rotate(args: argparse.Namespace) -> int:
    with opened(args) as accounts:
        new = accounts.rotate_key(
            key_id=args.key_id,
            tenant_id=args.tenant,
            overlap_ms=duration_ms(args.overlap, "--overlap"),
            new_key_id=args.new_key_id,
        )
    if not args.json:
        print(f"Key {args.key_id} is good for another {args.overlap} at most.", file=sys.stderr)
    return _show_once(new, args)


def _revoke(args: argparse.Namespace) -> int:
    with opened(args) as accounts:
        key = accounts.revoke_key(key_id=args.key_id, tenant_id=args.tenant)
    if args.json:
        print(json.dumps(as_json(key)))
    else:
        print(f"Key {key.key_id} of tenant {key.tenant_id} is revoked.")
    return 0


def _who(args: argparse.Namespace) -> int:
    actor, roles = who_am_i(args)
    if args.json:
        grants = [{"role": role, "tenant_id": tenant_id} for role, tenant_id in roles]
        print(json.dumps({"actor": actor, "grants": grants}))
        return 0
    print(actor)
    for role, tenant_id in roles:
        print(f"  {role} of {tenant_id or 'every organisation'}")
    return 0


def _rotate_pepper(args: argparse.Namespace) -> int:
    config = Config.load(args.home)
    config.prepare_home()
    with closing(open_accounts(config)) as store:
        store.rotate_pepper()
        pepper_id = store.peppers.current.pepper_id
    if args.json:
        print(json.dumps({"pepper_id": pepper_id}))
    else:
        print(f"New keys stand on the pepper {pepper_id}. Bring both files to every frontend.")
    return 0


def _scope(args: argparse.Namespace, base: Scope) -> Scope:
    """`base` with what the options say in its place."""
    given = {
        "models": _listed(args.models),
        "methods": _listed(args.methods),
        "addresses": () if args.addresses == "none" else _listed(args.addresses),
        "tiers": _tiers(args.tiers),
        "default_tier": args.default_tier and Tier(args.default_tier),
        "max_tier": args.max_tier and Tier(args.max_tier),
    }
    return replace(base, **{name: value for name, value in given.items() if value is not None})


def _listed(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(part.strip() for part in text.split(","))


def _tiers(text: str | None) -> tuple[Tier, ...] | None:
    names = _listed(text)
    if names is None:
        return None
    try:
        return tuple(Tier(name) for name in names)
    except ValueError as error:
        raise InvalidRequest(
            f"--tiers is {text!r}.",
            why=f"The tiers are {_TIERS}.",
            fix="Write it like --tiers standard,flex.",
            field="tiers",
        ) from error


def _from_now(text: str) -> int:
    return SystemClock().unix_ms() + duration_ms(text, "--expires")


def _state(key: ApiKey, now_unix_ms: int) -> str:
    if key.revoked_unix_ms is not None:
        return f"revoked {moment(key.revoked_unix_ms)}"
    return "in force" if key.is_in_force(now_unix_ms) else "expired"


def _show_once(new: NewKey, args: argparse.Namespace) -> int:
    if not args.json:
        print("Keep this key: it is not stored and cannot be shown again.", file=sys.stderr)
    return _show_new(new, args)


def _show_new(new: NewKey, args: argparse.Namespace) -> int:
    if args.json:
        print(json.dumps({"key": new.key} | as_json(new.stored)))
    else:
        print(new.key)
    return 0
