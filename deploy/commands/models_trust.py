"""`headrace models key|trust`: who may have built what is served here."""

import argparse
import json
from pathlib import Path

from headrace.compile.signing import distrust, signing_key, trust, trusted
from headrace.deploy.commands.models_shared import add_shared, home_of, wants_json
from headrace.deploy.tables import show_table
from headrace.serving.engine.signature import KEY_BYTES_MAX
from headrace.serving.errors import InvalidRequest


def add_verbs(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    own = verbs.add_parser("key", help="print the public key that this home signs with")
    add_shared(own)
    own.set_defaults(run=run_key)
    trusting = verbs.add_parser("trust", help="whose artifacts are loaded here")
    actions = trusting.add_subparsers(dest="action", metavar="ACTION", required=True)
    add = actions.add_parser("add", help="trust a public key, as `models key` prints it")
    add.add_argument("file", metavar="FILE", type=Path)
    add_shared(add)
    add.set_defaults(run=run_add)
    listing = actions.add_parser("list", help="the keys that are trusted")
    add_shared(listing)
    listing.set_defaults(run=run_list)
    remove = actions.add_parser("remove", help="load nothing any more that this key signed")
    remove.add_argument("key_id", metavar="KEY_ID")
    add_shared(remove)
    remove.set_defaults(run=run_remove)


def run_key(args: argparse.Namespace) -> int:
    key = signing_key(home_of(args, prepared=True))
    if wants_json(args):
        print(json.dumps({"key_id": key.key_id, "public_pem": key.public_pem}))
    else:
        print(key.public_pem, end="")
    return 0


def run_add(args: argparse.Namespace) -> int:
    try:
        with args.file.open("rb") as file:
            pem = file.read(KEY_BYTES_MAX + 1)
    except OSError as error:
        raise InvalidRequest(
            f"The file {args.file} cannot be read: {error.strerror}.",
            why="A public key in PEM is wanted.",
            fix="Save what `headrace models key` prints in the home that is to be trusted.",
            field="file",
        ) from error
    key_id = trust(home_of(args, prepared=True), pem, where=str(args.file))
    return _said(args, key_id, f"Artifacts signed with {key_id} are loaded here from now on.")


def run_list(args: argparse.Namespace) -> int:
    found = trusted(home_of(args))
    if wants_json(args):
        rows = [{"key_id": e.key_id, "is_own": e.is_own, "public_pem": e.pem} for e in found]
        print(json.dumps(rows))
    elif not found:
        print("No key is trusted yet; `headrace compile` makes this home's own.")
    else:
        show_table(("key", ""), [(e.key_id, "this home's own" if e.is_own else "") for e in found])
    return 0


def run_remove(args: argparse.Namespace) -> int:
    distrust(home_of(args), args.key_id)
    return _said(args, args.key_id, f"What {args.key_id} signed is not loaded here any more.")


def _said(args: argparse.Namespace, key_id: str, text: str) -> int:
    print(json.dumps({"key_id": key_id}) if wants_json(args) else text)
    return 0
