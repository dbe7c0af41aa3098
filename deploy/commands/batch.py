"""`headrace batch`: many requests at half price, on capacity that nobody else wants."""

import argparse
import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from headrace.deploy.batch_client import BatchClient, opened
from headrace.deploy.connection import add_connection, address_and_key, certificates
from headrace.deploy.tables import money, show_table
from headrace.serving.errors import InvalidRequest
from headrace.v1 import batch_pb2 as pb

LOOK_S = 1.0
"""How often `--wait` asks how far the batch is."""
LIST_MAX = 1_000

_FINAL = frozenset(
    {
        pb.BATCH_STATE_CANCELLED,
        pb.BATCH_STATE_COMPLETED,
        pb.BATCH_STATE_EXPIRED,
        pb.BATCH_STATE_FAILED,
    }
)


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "batch",
        help="run a file of requests at half price",
        description="Run a file of requests, one JSON object a line, within 24 hours.",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    submit = actions.add_parser("submit", help="upload a file and run it")
    submit.add_argument("file", help="JSON lines; batch.proto says what a line holds")
    submit.add_argument("--model", default="", help="for lines that name none")
    submit.add_argument("--wait", action="store_true", help="stay until it has ended")
    submit.set_defaults(run=_submit)
    listing = actions.add_parser("list", help="show the newest batches")
    listing.add_argument("--limit", type=int, default=20, help="most batches shown (default: 20)")
    listing.set_defaults(run=_list)
    get = actions.add_parser("get", help="show how far a batch is")
    get.set_defaults(run=_get)
    cancel = actions.add_parser("cancel", help="stop a batch; what is done is kept")
    cancel.set_defaults(run=_cancel)
    results = actions.add_parser("results", help="print or save the results so far")
    results.add_argument("--out", type=Path, help="file to write (default: standard output)")
    results.set_defaults(run=_results)
    delete = actions.add_parser("delete", help="remove requests and results of an ended batch")
    delete.set_defaults(run=_delete)
    for action in (get, cancel, results, delete):
        action.add_argument("batch_id")
    for action in (submit, listing, get, cancel, results, delete):
        add_connection(action)
    for action in (submit, listing, get, cancel):
        action.add_argument("--json", action="store_true", help="print JSON")


def _submit(args: argparse.Namespace) -> int:
    with opened(args.file) as file, _client(args) as client:
        batch = client.submit(file, model=args.model)
        if args.wait:
            batch = _waited(client, batch)
        _show(batch, args)
    return 0 if batch.state != pb.BATCH_STATE_FAILED else 1


def _list(args: argparse.Namespace) -> int:
    if not 0 < args.limit <= LIST_MAX:
        raise InvalidRequest(
            f"--limit is {args.limit}.",
            why=f"It lies between 1 and {LIST_MAX:,}.",
            fix="Correct it.",
            field="limit",
        )
    with _client(args) as client:
        batches = client.list(limit=args.limit)
    if args.json:
        print(json.dumps([as_json(batch) for batch in batches]))
    elif not batches:
        print("No batches yet. Try `headrace batch submit FILE`.")
    else:
        columns = ["batch", "state", "lines", "done", "failed", "charge", "made (UTC)"]
        rows = [
            [
                batch.batch_id,
                _state(batch),
                f"{batch.counts.lines:,}",
                f"{_done(batch):,}",
                f"{batch.counts.failed:,}",
                money(batch.charge.nano, batch.charge.currency),
                _moment(batch.created_unix_ms),
            ]
            for batch in batches
        ]
        show_table(columns, rows, numbers=("lines", "done", "failed", "charge"))
    return 0


def _get(args: argparse.Namespace) -> int:
    with _client(args) as client:
        _show(client.get(args.batch_id), args)
    return 0


def _cancel(args: argparse.Namespace) -> int:
    with _client(args) as client:
        _show(client.cancel(args.batch_id), args)
    return 0


def _results(args: argparse.Namespace) -> int:
    with _client(args) as client:
        parts = client.results(args.batch_id)
        if args.out is None:
            for part in parts:
                sys.stdout.buffer.write(part)
            sys.stdout.buffer.flush()
            return 0
        try:
            with open(args.out, "wb") as file:
                size = sum(file.write(part) for part in parts)
        except OSError as error:
            raise InvalidRequest(
                f"{args.out} cannot be written: {error.strerror}.",
                why="--out names the file that the results go to.",
                fix="Check the path and the free space.",
                field="out",
            ) from error
    print(f"{size:,} bytes are in {args.out}.", file=sys.stderr)
    return 0


def _delete(args: argparse.Namespace) -> int:
    with _client(args) as client:
        client.delete(args.batch_id)
    print(f"Batch {args.batch_id} is deleted; what it cost stays on record.", file=sys.stderr)
    return 0


def as_json(batch: pb.BatchInfo) -> dict[str, object]:
    """What scripts rely on: names stay, more may be added."""
    counts, usage = batch.counts, batch.usage
    return {
        "batch_id": batch.batch_id,
        "state": _state(batch),
        "lines": counts.lines,
        "succeeded": counts.succeeded,
        "failed": counts.failed,
        "cancelled": counts.cancelled,
        "expired": counts.expired,
        "prompt_tokens": usage.prompt_tokens,
        "cached_tokens": usage.cached_tokens,
        "completion_tokens": usage.completion_tokens,
        "charge_nano": batch.charge.nano,
        "currency": batch.charge.currency,
        "created_unix_ms": batch.created_unix_ms,
        "started_unix_ms": batch.started_unix_ms or None,
        "finished_unix_ms": batch.finished_unix_ms or None,
        "expires_unix_ms": batch.expires_unix_ms,
        "eta_unix_ms": batch.eta_unix_ms or None,
        "results_bytes": batch.results_bytes,
        "why": batch.why or None,
    }


def _waited(client: BatchClient, batch: pb.BatchInfo) -> pb.BatchInfo:
    """Follow the batch to its end, with a bar on standard error. Ctrl-C leaves it running."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task(batch.batch_id, total=batch.counts.lines)
        while batch.state not in _FINAL:
            time.sleep(LOOK_S)
            batch = client.get(batch.batch_id)
            progress.update(bar, completed=_done(batch))
    return batch


def _show(batch: pb.BatchInfo, args: argparse.Namespace) -> None:
    if args.json:
        print(json.dumps(as_json(batch)))
        return
    counts = batch.counts
    ended = {"failed": counts.failed, "cancelled": counts.cancelled, "expired": counts.expired}
    others = "".join(f", {count:,} {name}" for name, count in ended.items() if count)
    print(f"{batch.batch_id}  {_state(batch)}")
    print(f"  {counts.succeeded:,} of {counts.lines:,} lines succeeded{others}")
    if batch.eta_unix_ms:
        print(f"  done about {_moment(batch.eta_unix_ms)} UTC, at the rate so far")
    if batch.why:
        print(f"  {batch.why}")
    print(f"  {money(batch.charge.nano, batch.charge.currency)} charged")
    if batch.state not in _FINAL:
        print(f"  headrace batch get {batch.batch_id}", file=sys.stderr)
    elif batch.results_bytes:
        print(f"  headrace batch results {batch.batch_id} --out FILE", file=sys.stderr)


def _client(args: argparse.Namespace) -> BatchClient:
    return BatchClient(*address_and_key(args), root_certificates=certificates(args))


def _state(batch: pb.BatchInfo) -> str:
    return pb.BatchState.Name(batch.state).removeprefix("BATCH_STATE_").lower()


def _done(batch: pb.BatchInfo) -> int:
    counts = batch.counts
    return counts.succeeded + counts.failed + counts.cancelled + counts.expired


def _moment(unix_ms: int) -> str:
    return datetime.fromtimestamp(unix_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")
