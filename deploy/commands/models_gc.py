"""`headrace models gc`: room, without touching what is deployed."""

import argparse
import json

from headrace.compile.collector import Collected, collect
from headrace.compile.store import Store
from headrace.deploy.amounts import parse_bytes
from headrace.deploy.commands.models_shared import add_shared, config_of, wants_json


def add_verbs(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = verbs.add_parser(
        "gc",
        help="remove artifacts, the longest unused first",
        description="Never removed: what config.yaml names (current, pinned, and the version that "
        "a rollback would bring back) and what a running process has loaded.",
    )
    parser.add_argument(
        "--keep-bytes", required=True, metavar="SIZE", help="what may remain, as 50GiB or 0"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would go; remove nothing")
    add_shared(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    config = config_of(args)
    keep_bytes = parse_bytes(args.keep_bytes, flag="--keep-bytes", least=0)
    found = collect(Store(config.home), config.models, keep_bytes=keep_bytes, dry_run=args.dry_run)
    if wants_json(args):
        print(json.dumps(_as_json(found, dry_run=args.dry_run)))
    else:
        _show(found, keep_bytes, dry_run=args.dry_run)
    return 0


def _show(found: Collected, keep_bytes: int, *, dry_run: bool) -> None:
    would = "Would remove" if dry_run else "Removed"
    for each in found.removed:
        print(f"{would} {each.artifact_id[:12]}, {each.total_bytes / 1e6:,.0f} MB")
    for path in found.leavings:
        print(f"{would} {path}, left by something that was killed")
    print(
        f"{found.kept_bytes / 1e6:,.0f} MB remain, {found.freed_bytes / 1e6:,.0f} MB "
        f"{'would be' if dry_run else 'are'} freed."
    )
    if found.kept_bytes > keep_bytes:
        print("That is more than was asked for: the rest is configured or loaded.")


def _as_json(found: Collected, *, dry_run: bool) -> dict[str, object]:
    return {
        "dry_run": dry_run,
        "removed": [
            {
                "artifact_id": each.artifact_id,
                "total_bytes": each.total_bytes,
                "used_unix_s": each.used_unix_s,
            }
            for each in found.removed
        ],
        "leavings": list(found.leavings),
        "freed_bytes": found.freed_bytes,
        "kept_bytes": found.kept_bytes,
        "needed": dict(found.needed),
    }
