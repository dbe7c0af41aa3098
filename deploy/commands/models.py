"""`headrace models`: what is compiled, in which versions, and where it goes to and comes from."""

import argparse
import json
from collections.abc import Sequence
from contextlib import nullcontext

from headrace.compile.store import Store, Stored
from headrace.deploy.commands import (
    models_gc,
    models_remote,
    models_trust,
    models_verify,
    models_versions,
)
from headrace.deploy.commands.models_shared import add_shared, home_of, wants_json
from headrace.deploy.commands.models_verify import verified_as_json, verified_in_words
from headrace.deploy.tables import show_table

_COLUMNS = ("model", "variant", "version", "engine", "size", "perplexity", "artifact", "verified")
_NUMBERS = ("version", "size", "perplexity")


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "models",
        help="pull, list and inspect models",
        description="Without a verb: the artifacts that are current.",
    )
    add_shared(parser)
    parser.set_defaults(run=run)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")
    listing = verbs.add_parser("list", help="the artifacts that are current (the default)")
    add_shared(listing)
    listing.set_defaults(run=run)
    fetching = verbs.add_parser("pull", help="fetch a model of the catalog as a checkpoint")
    fetching.add_argument("name", metavar="NAME", help="for example smollm2-135m")
    add_shared(fetching)
    fetching.set_defaults(run=run_pull)
    for others in (models_versions, models_verify, models_remote, models_gc, models_trust):
        others.add_verbs(verbs)


def run(args: argparse.Namespace) -> int:
    found = Store(home_of(args)).list()
    if wants_json(args):
        print(json.dumps([as_json(stored) for stored in found]))
    elif not found:
        print("No models yet. Try `headrace models pull smollm2-135m`, then `headrace compile`.")
    else:
        _show(found)
    return 0


def run_pull(args: argparse.Namespace) -> int:
    # Pulling brings the converters; listing should answer without them.
    from headrace.compile.progress import Silent, bars
    from headrace.compile.pull import pull

    home = home_of(args, prepared=True)
    with nullcontext(Silent()) if wants_json(args) else bars() as progress:
        pulled = pull(args.name, home=home, progress=progress)
    if wants_json(args):
        print(json.dumps({"folder": str(pulled.folder), "fetched": pulled.fetched}))
    elif pulled.fetched:
        print(f"Pulled {args.name} into {pulled.folder}. Next: `headrace compile {args.name}`.")
    else:
        print(f"{args.name} is here already: {pulled.folder}. Nothing was fetched.")
    return 0


def _show(found: Sequence[Stored]) -> None:
    show_table(_COLUMNS, [_row(stored) for stored in found], numbers=_NUMBERS)
    print("Perplexity: against the same model in transformers, fp32.")
    for stored in found:
        if stored.problem:
            print(f"{stored.model} {stored.version.variant} cannot be served: {stored.problem}")


def _row(stored: Stored) -> tuple[str, ...]:
    manifest = stored.manifest
    return (
        stored.model,
        stored.version.variant,
        str(stored.version.version),
        manifest.engine if manifest else "?",
        f"{stored.total_bytes / 1e6:,.0f} MB",
        f"{manifest.verification.perplexity_delta:+.2%}" if manifest else "?",
        stored.version.artifact_id[:12],
        verified_in_words(manifest),
    )


def as_json(stored: Stored) -> dict[str, object]:
    """What scripts rely on: names stay, more may be added.

    What is only known from a manifest is absent where that cannot be read.
    """
    version, manifest = stored.version, stored.manifest
    found: dict[str, object] = {
        "model": stored.model,
        "variant": version.variant,
        "version": version.version,
        "is_current": stored.is_current,
        "registered_at": version.registered_at,
        "artifact_id": version.artifact_id,
        "folder": str(stored.folder),
        "total_bytes": stored.total_bytes,
        "problem": stored.problem,
    }
    if manifest is None:
        return found
    return found | {
        "precision": manifest.precision.value,
        "target": manifest.target,
        "engine": manifest.engine,
        "family": manifest.family,
        "weight_bytes": manifest.weight_bytes,
        "context_tokens": manifest.decoder.context_tokens,
        "perplexity_delta": manifest.verification.perplexity_delta,
        "verified": verified_as_json(manifest),
        "source": manifest.source,
    }
