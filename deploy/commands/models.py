"""`headrace models`: which artifacts are here, and pulling models of the catalog."""

import argparse
import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from headrace.compile.store import Store, Stored
from headrace.deploy.tables import show_table
from headrace.serving.config import Config

_COLUMNS = ("model", "precision", "engine", "size", "perplexity", "artifact")
_NUMBERS = ("size", "perplexity")


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "models",
        help="pull, list and inspect models",
        description="Without a verb: the artifacts that are here.",
    )
    _add_shared(parser)
    parser.set_defaults(run=run)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")
    listing = verbs.add_parser("list", help="the artifacts that are here (the default)")
    _add_shared(listing)
    listing.set_defaults(run=run)
    fetching = verbs.add_parser("pull", help="fetch a model of the catalog as a checkpoint")
    fetching.add_argument("name", metavar="NAME", help="for example smollm2-135m")
    _add_shared(fetching)
    fetching.set_defaults(run=run_pull)


def _add_shared(parser: argparse.ArgumentParser) -> None:
    # Suppressed, or a verb's absent flag would undo what stood before the verb.
    parser.add_argument(
        "--home",
        type=Path,
        default=argparse.SUPPRESS,
        help="state folder (default: HEADRACE_HOME)",
    )
    parser.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON")


def run(args: argparse.Namespace) -> int:
    config = Config.load(getattr(args, "home", None))
    found = Store(config.home).list()
    if getattr(args, "json", False):
        print(json.dumps([_as_json(stored) for stored in found]))
    elif not found:
        print("No models yet. Try `headrace models pull smollm2-135m`, then `headrace compile`.")
    else:
        _show(found)
    return 0


def run_pull(args: argparse.Namespace) -> int:
    # Pulling brings the converters; listing should answer without them.
    from headrace.compile.progress import Silent, bars
    from headrace.compile.pull import pull

    config = Config.load(getattr(args, "home", None))
    config.prepare_home()
    as_json = getattr(args, "json", False)
    with nullcontext(Silent()) if as_json else bars() as progress:
        pulled = pull(args.name, home=config.home, progress=progress)
    if as_json:
        print(json.dumps({"folder": str(pulled.folder), "fetched": pulled.fetched}))
    elif pulled.fetched:
        print(f"Pulled {args.name} into {pulled.folder}. Next: `headrace compile {args.name}`.")
    else:
        print(f"{args.name} is here already: {pulled.folder}. Nothing was fetched.")
    return 0


def _show(found: Sequence[Stored]) -> None:
    rows = [
        (
            stored.manifest.model,
            stored.manifest.precision.value,
            stored.manifest.engine,
            f"{stored.total_bytes / 1e6:,.0f} MB",
            f"{stored.manifest.verification.perplexity_delta:+.2%}",
            stored.manifest.artifact_id[:12],
        )
        for stored in found
    ]
    show_table(_COLUMNS, rows, numbers=_NUMBERS)
    print("Perplexity: against the same model in transformers, fp32.")


def _as_json(stored: Stored) -> dict[str, object]:
    """What scripts rely on: names stay, more may be added."""
    manifest = stored.manifest
    return {
        "model": manifest.model,
        "precision": manifest.precision.value,
        "target": manifest.target,
        "engine": manifest.engine,
        "family": manifest.family,
        "artifact_id": manifest.artifact_id,
        "folder": str(stored.folder),
        "total_bytes": stored.total_bytes,
        "weight_bytes": manifest.weight_bytes,
        "context_tokens": manifest.decoder.context_tokens,
        "perplexity_delta": manifest.verification.perplexity_delta,
        "source": manifest.source,
    }
