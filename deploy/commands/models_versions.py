"""`headrace models versions|promote|rollback`: a model's builds, and which one is current."""

import argparse
import json
from dataclasses import asdict

from headrace.compile.signing import keys_of
from headrace.compile.store import Store
from headrace.deploy.commands.models_remote import add_endpoint, remote_of
from headrace.deploy.commands.models_shared import (
    add_shared,
    home_of,
    version_number,
    wants_json,
)
from headrace.deploy.commands.models_verify import verified_as_json, verified_in_words
from headrace.deploy.tables import show_table
from headrace.serving.errors import ModelNotFound

_COLUMNS = ("version", "variant", "current", "since", "size", "artifact", "verified")
_REMOTE_COLUMNS = ("version", "variant", "pushed", "size", "artifact")
SHOWN_MAX = 100
"""Versions on a store that are shown, the newest: each is a request."""


def add_verbs(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    versions = verbs.add_parser("versions", help="every build of a model, and which is current")
    versions.add_argument("model", metavar="MODEL")
    versions.add_argument("--at", metavar="URL", help="of a store: the versions there")
    add_endpoint(versions)
    add_shared(versions)
    versions.set_defaults(run=run_versions)
    promote = verbs.add_parser("promote", help="make a version current of its variant")
    promote.add_argument("model", metavar="MODEL")
    promote.add_argument("version", metavar="VERSION")
    add_shared(promote)
    promote.set_defaults(run=run_promote)
    rollback = verbs.add_parser(
        "rollback",
        help="make current what was current before",
        description="Each call goes one step further back; nothing is deleted, and `promote` takes "
        "any version again.",
    )
    rollback.add_argument("model", metavar="MODEL")
    rollback.add_argument("--variant", help="which, as cpu/int8; where there are several")
    add_shared(rollback)
    rollback.set_defaults(run=run_rollback)


def run_versions(args: argparse.Namespace) -> int:
    if args.at:
        return _run_remote(args)
    store = Store(home_of(args))
    found, history = store.builds(args.model), store.index(args.model).history
    if not found:
        raise ModelNotFound(
            f"There is no model {args.model!r} here.",
            why="It was neither compiled nor fetched.",
            fix="`headrace models` shows what there is.",
        )
    if wants_json(args):
        builds = [
            {
                **asdict(each.version),
                "is_current": each.is_current,
                "total_bytes": each.total_bytes,
                "problem": each.problem,
                "verified": verified_as_json(each.manifest) if each.manifest else None,
            }
            for each in found
        ]
        changes = [asdict(each) for each in history]
        print(json.dumps({"model": args.model, "versions": builds, "history": changes}))
        return 0
    rows = [
        (
            str(each.version.version),
            each.version.variant,
            "current" if each.is_current else "",
            each.version.registered_at,
            f"{each.total_bytes / 1e6:,.0f} MB",
            each.version.artifact_id[:12],
            verified_in_words(each.manifest),
        )
        for each in found
    ]
    show_table(_COLUMNS, rows, numbers=("version", "size"))
    for each in found:
        if each.problem:
            print(f"Version {each.version.version} cannot be served: {each.problem}")
    return 0


def _run_remote(args: argparse.Namespace) -> int:
    remote = remote_of(args.at, args.endpoint_url)
    from headrace.compile.remote.descriptor import read_descriptor, versions_of

    trusted, there = keys_of(home_of(args)), versions_of(remote, args.model)[-SHOWN_MAX:]
    found = [read_descriptor(remote, args.model, number, trusted) for number in there]
    if wants_json(args):
        rows = [
            {
                "version": each.version,
                "variant": each.variant,
                "artifact_id": each.artifact_id,
                "pushed_at": each.pushed_at,
                "total_bytes": each.total_bytes,
            }
            for each in found
        ]
        print(json.dumps({"model": args.model, "url": args.at, "versions": rows}))
    elif not found:
        print(f"There is no version of {args.model} at {args.at}.")
    else:
        rows = [
            (
                str(each.version),
                each.variant,
                each.pushed_at,
                f"{each.total_bytes / 1e6:,.0f} MB",
                each.artifact_id[:12],
            )
            for each in found
        ]
        show_table(_REMOTE_COLUMNS, rows, numbers=("version", "size"))
    return 0


def run_promote(args: argparse.Namespace) -> int:
    number = version_number(args.version)
    found = Store(home_of(args)).promote(args.model, number)
    return _said(args, found.version, found.variant)


def run_rollback(args: argparse.Namespace) -> int:
    found = Store(home_of(args)).rollback(args.model, args.variant)
    return _said(args, found.version, found.variant)


def _said(args: argparse.Namespace, version: int, variant: str) -> int:
    if wants_json(args):
        print(json.dumps({"model": args.model, "version": version, "variant": variant}))
    else:
        print(f"{args.model} {variant} is version {version}.")
    return 0
