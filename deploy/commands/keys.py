"""`headrace keys`: make, list and revoke API keys, on the machine that holds their digests."""

import argparse
import json
import sys
from datetime import UTC, datetime
from pathlib import Path

from headrace.deploy.tables import show_table
from headrace.serving.admission.key_store import KeyStore, NewKey, StoredKey
from headrace.serving.clock import SystemClock
from headrace.serving.config import Config


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "keys",
        help="make, list and revoke API keys",
        description="Make, list and revoke API keys. A running frontend follows within a second.",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    demo = actions.add_parser("demo", help="show the demo tenant's key, made on first use")
    demo.set_defaults(run=_demo)
    create = actions.add_parser("create", help="make a key and show it, once")
    create.add_argument("--tenant", required=True, help="who it belongs to and who is charged")
    create.set_defaults(run=_create)
    listing = actions.add_parser("list", help="show which keys there are, not the keys themselves")
    listing.set_defaults(run=_list)
    revoke = actions.add_parser("revoke", help="refuse a key from now on")
    revoke.add_argument("key_id", help="the part of the key between its two underscores")
    revoke.set_defaults(run=_revoke)
    for action in (demo, create, listing, revoke):
        action.add_argument("--home", type=Path, help="state folder (default: HEADRACE_HOME)")
        action.add_argument("--json", action="store_true", help="print JSON")


def _demo(args: argparse.Namespace) -> int:
    return _show_key(_store(args).demo(), args)


def _create(args: argparse.Namespace) -> int:
    new = _store(args).create(tenant_id=args.tenant)
    if not args.json:
        print("Keep this key: it is not stored and cannot be shown again.", file=sys.stderr)
    return _show_key(new, args)


def _list(args: argparse.Namespace) -> int:
    keys = sorted(_store(args).read().values(), key=lambda key: key.created_unix_ms)
    if args.json:
        print(json.dumps([_as_json(key) for key in keys]))
        return 0
    rows = [
        [
            key.key_id,
            key.tenant_id,
            _date(key.created_unix_ms),
            "in force" if key.revoked_unix_ms is None else f"revoked {_date(key.revoked_unix_ms)}",
        ]
        for key in keys
    ]
    show_table(["key id", "tenant", "made (UTC)", "state"], rows)
    return 0


def _revoke(args: argparse.Namespace) -> int:
    key = _store(args).revoke(args.key_id)
    if args.json:
        print(json.dumps(_as_json(key)))
    else:
        print(f"Key {key.key_id} of tenant {key.tenant_id} is revoked.")
    return 0


def _store(args: argparse.Namespace) -> KeyStore:
    config = Config.load(args.home)
    config.prepare_home()
    return KeyStore(config.keys_path, config.pepper_path, clock=SystemClock())


def _show_key(new: NewKey, args: argparse.Namespace) -> int:
    if args.json:
        print(json.dumps({"key": new.key} | _as_json(new.stored)))
    else:
        print(new.key)
    return 0


def _as_json(key: StoredKey) -> dict[str, str | int | None]:
    return {
        "key_id": key.key_id,
        "tenant_id": key.tenant_id,
        "created_unix_ms": key.created_unix_ms,
        "revoked_unix_ms": key.revoked_unix_ms,
    }


def _date(unix_ms: int) -> str:
    return datetime.fromtimestamp(unix_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")
