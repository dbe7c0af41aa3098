"""`headrace compile`: a checkpoint to an engine artifact, or only what it would occupy."""

import argparse
import json
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

from headrace.compile.memory import Fit
from headrace.compile.pipeline import Built, Order, compile_model, plan
from headrace.compile.progress import Silent, bars
from headrace.deploy.amounts import parse_bytes
from headrace.serving.config import Config, cores
from headrace.serving.domain.artifact import Precision

TARGETS = ("cpu", "rtx", "h200")


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "compile",
        help="build an engine from a checkpoint",
        description="Build a verified artifact. The same input is built once; a second run says "
        "so and does nothing.",
    )
    parser.add_argument(
        "source", metavar="NAME|PATH", help="a pulled model, a checkpoint folder, or a .gguf file"
    )
    parser.add_argument("--target", choices=TARGETS, default="cpu", help="default: cpu")
    parser.add_argument(
        "--precision", choices=[p.value for p in Precision], default="int8", help="default: int8"
    )
    parser.add_argument("--name", help="what the model is called (default: the source's name)")
    parser.add_argument(
        "--device-memory", metavar="SIZE", help="of one device, as 24GiB (default: available here)"
    )
    parser.add_argument("--shards", type=int, default=1, help="devices to split over (default: 1)")
    parser.add_argument(
        "--dry-run", action="store_true", help="say what it would occupy; build nothing"
    )
    parser.add_argument("--home", type=Path, help="state folder (default: HEADRACE_HOME)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    config = Config.load(args.home)
    order = Order(
        source=args.source,
        precision=Precision(args.precision),
        target=args.target,
        name=args.name,
        device_bytes=None if args.device_memory is None else parse_bytes(args.device_memory),
        shards=args.shards,
        threads=cores(),
    )
    if args.dry_run:
        return _dry_run(order, config.home, as_json=args.json)
    config.prepare_home()
    with nullcontext(Silent()) if args.json else bars() as progress:
        built = compile_model(order, home=config.home, progress=progress)
    if args.json:
        print(json.dumps(_as_json(built)))
    else:
        _show(built)
    return 0


def _dry_run(order: Order, home: Path, *, as_json: bool) -> int:
    found = plan(order, home=home)
    if as_json:
        print(json.dumps({"ranks": [asdict(rank) for rank in found.ranks], "fits": found.fits}))
        return 0 if found.fits else 3
    _show_fit(found)
    return 0 if found.fits else 3


def _show_fit(found: Fit) -> None:
    rank = found.ranks[0]
    print(f"ranks        {len(found.ranks):>16,}")
    print(f"weights      {rank.weight_bytes:>16,} bytes a rank")
    print(f"activations  {rank.activation_bytes:>16,} bytes")
    print(f"KV cache     {rank.kv_bytes_per_token:>16,} bytes a token")
    print(f"room for     {rank.kv_tokens_max:>16,} tokens")
    print("It fits." if found.fits else "It does not fit.")


def _show(built: Built) -> None:
    manifest, checked = built.manifest, built.manifest.verification
    if not built.is_new:
        print(
            f"{built.model} in {manifest.precision} was built before from the same input: "
            f"{manifest.artifact_id[:12]}, version {built.version}. Nothing was done."
        )
        return
    print(
        f"Built {built.model} in {manifest.precision}, {manifest.weight_bytes / 1e6:,.0f} MB of "
        f"weights, in {built.seconds:.0f} s: {manifest.artifact_id[:12]}, version {built.version}"
    )
    print(
        f"Against {checked.reference}, {checked.tokens} positions: top-1 "
        f"{checked.top1_agreement:.1%}, perplexity {checked.perplexity:.2f} "
        f"({checked.perplexity_delta:+.2%}), largest logit error {checked.max_abs_error:.2g}"
    )


def _as_json(built: Built) -> dict[str, object]:
    manifest = built.manifest
    return {
        "artifact_id": manifest.artifact_id,
        "model": built.model,
        "version": built.version,
        "variant": manifest.variant,
        "precision": manifest.precision.value,
        "target": manifest.target,
        "folder": str(built.folder),
        "weight_bytes": manifest.weight_bytes,
        "is_new": built.is_new,
        "seconds": round(built.seconds, 3),
        "verification": {
            **asdict(manifest.verification),
            "perplexity_delta": manifest.verification.perplexity_delta,
        },
    }
