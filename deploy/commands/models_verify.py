"""`headrace models verify`: an engine is run where its device is, and its manifest says so."""

import argparse
import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

from headrace.compile.progress import Silent, bars
from headrace.compile.store import Store
from headrace.deploy.commands.models_shared import (
    add_shared,
    home_of,
    model_and_version,
    wants_json,
)
from headrace.serving.config import cores
from headrace.serving.domain.artifact import Manifest


def add_verbs(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = verbs.add_parser(
        "verify",
        help="run an engine against transformers, and sign that it was",
        description="For engines that were built where no device could run them: serving refuses "
        "those. Run it where the device is, with the checkpoint at hand. The manifest is replaced "
        "and signed with this home's key; outside the tolerance nothing changes.",
    )
    parser.add_argument("model", metavar="MODEL[@VERSION]")
    parser.add_argument("--variant", help="which of its variants, as rtx/bf16")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="PATH",
        help="what it was built of (default: where its manifest says)",
    )
    add_shared(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    store, (model, number) = Store(home_of(args)), model_and_version(args.model)
    version = store.chosen(model, number, args.variant)
    # The compilers' half: the other verbs answer without it.
    from headrace.compile.verify_stored import verify_stored

    with nullcontext(Silent()) if wants_json(args) else bars() as progress:
        manifest = verify_stored(
            store,
            store.folder(version.artifact_id),
            checkpoint=args.checkpoint,
            threads=cores(),
            progress=progress,
        )
    found = manifest.verification
    if wants_json(args):
        stated = {"model": model, **asdict(version), "verified": verified_as_json(manifest)}
        numbers = {**asdict(found), "perplexity_delta": found.perplexity_delta}
        print(json.dumps({**stated, "verification": numbers}))
        return 0
    print(
        f"{model} {version.variant}, version {version.version}, is verified: its engine was run "
        f"on {found.host}."
    )
    print(
        f"Against {found.reference}, {found.tokens} positions: logit error "
        f"{found.logit_error:.2g}, top-1 {found.top1_agreement:.1%}, perplexity "
        f"{found.perplexity:.2f} ({found.perplexity_delta:+.2%})"
    )
    return 0


def verified_as_json(manifest: Manifest) -> Mapping[str, str]:
    """How it was verified, on what, and when: for scripts."""
    found = manifest.verification
    return {"method": found.method.value, "host": found.host, "at": found.verified_at}


def verified_in_words(manifest: Manifest | None) -> str:
    """The same in a column of a table, for example "engine 0a1b2c3d4e5f6789 cpu 2026-11-02"."""
    if manifest is None:
        return "?"
    found = manifest.verification
    words = (found.method.value, found.host, found.verified_at.partition("T")[0])
    return " ".join(word for word in words if word)
