"""`headrace models push|fetch`: artifacts to and from a store that several homes share."""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING

from headrace.compile.progress import Progressing, Silent, bars
from headrace.compile.store import Store
from headrace.deploy.commands.models_shared import (
    add_shared,
    home_of,
    model_and_version,
    wants_json,
)
from headrace.serving.errors import RemoteStoreFault

if TYPE_CHECKING:
    from headrace.compile.remote.patience import Remote


def add_verbs(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    push = verbs.add_parser(
        "push",
        help="send an artifact to a store",
        description="Parts that are there already are not sent again, so that a push that was cut "
        "off goes on when it is run again.",
    )
    fetch = verbs.add_parser(
        "fetch",
        help="bring an artifact from a store, and make it current",
        description="The newest version there, unless one is named. Who built it and who pushed "
        "it must be trusted here: `headrace models trust add`. A fetch that was cut off goes on "
        "when it is run again.",
    )
    for parser, run in ((push, run_push), (fetch, run_fetch)):
        parser.add_argument("model", metavar="MODEL[@VERSION]")
        parser.add_argument("url", metavar="URL", help="s3://bucket/prefix or file:///folder")
        parser.add_argument("--variant", help="which of its variants, as rtx/bf16/tp2")
        add_endpoint(parser)
        add_shared(parser)
        parser.set_defaults(run=run)


def add_endpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--endpoint-url",
        metavar="URL",
        help="of an S3-compatible store that is not Amazon's; credentials come from the usual "
        "AWS variables and files",
    )


def run_push(args: argparse.Namespace) -> int:
    store, (model, number) = Store(home_of(args)), model_and_version(args.model)
    remote = remote_of(args.url, args.endpoint_url)
    from headrace.compile.remote.push import push

    variant = args.variant or (None if number else store.variant_of(model))
    folder = store.resolve(model, variant=variant, version=number)
    with _progress(args) as progress:
        pushed = push(store, folder, remote, model=model, progress=progress)
    if wants_json(args):
        print(json.dumps({"model": model, "url": args.url, **asdict(pushed)}))
        return 0
    print(
        f"{model} is version {pushed.version} at {args.url}"
        + (": " if pushed.is_new else " already: ")
        + f"{pushed.sent_bytes / 1e6:,.0f} MB sent, {pushed.kept_bytes / 1e6:,.0f} MB were there."
    )
    return 0


def run_fetch(args: argparse.Namespace) -> int:
    store = Store(home_of(args, prepared=True))
    model, number = model_and_version(args.model)
    remote = remote_of(args.url, args.endpoint_url)
    from headrace.compile.remote.fetch import fetch

    with _progress(args) as progress:
        fetched = fetch(
            store, remote, model=model, number=number, variant=args.variant, progress=progress
        )
    if wants_json(args):
        print(json.dumps({"model": model, **asdict(fetched), "folder": str(fetched.folder)}))
    elif fetched.is_new:
        print(
            f"Fetched {model}@{fetched.remote_version} from {args.url}, "
            f"{fetched.received_bytes / 1e6:,.0f} MB: version {fetched.version} here, current."
        )
    else:
        print(f"{model}@{fetched.remote_version} is here already: version {fetched.version}.")
    return 0


def remote_of(url: str, endpoint_url: str | None) -> "Remote":
    """The store at a URL.

    Raises:
        InvalidRequest: the URL is none of ours.
        RemoteStoreFault: what talks to stores is not installed.
    """
    try:
        # Not part of every installation, and half a second of imports.
        from headrace.compile.remote.patience import open_remote
    except ImportError as error:
        raise RemoteStoreFault(
            "This installation cannot talk to stores.",
            why=f"{error}.",
            fix="Install what does: `pip install 'headrace[s3]'`.",
        ) from error
    return open_remote(url, endpoint_url=endpoint_url)


@contextmanager
def _progress(args: argparse.Namespace) -> Iterator[Progressing]:
    with nullcontext(Silent()) if wants_json(args) else bars() as progress:
        yield progress
