"""`headrace compile`: a checkpoint to an engine artifact, or only what it would occupy."""

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

from headrace.compile.estimate import Estimate
from headrace.compile.memory import Rank
from headrace.compile.pipeline import Built, Order, compile_model, plan
from headrace.compile.progress import Silent, bars
from headrace.compile.targets import TARGETS, default_precision
from headrace.compile.tensorrt.options import PlanOptions
from headrace.deploy.amounts import parse_bytes
from headrace.serving.config import Config, cores
from headrace.serving.domain.artifact import Precision, Profile, Sharding, VerifyMethod


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "compile",
        help="build an engine from a checkpoint",
        description="Build a verified artifact. The same input is built once; a second run says "
        "so and does nothing.",
    )
    parser.add_argument(
        "source",
        metavar="NAME|PATH",
        help="a pulled model, a checkpoint folder, or a .gguf file; with --config-only a published "
        "config's name, as qwen3-32b, or a config.json",
    )
    parser.add_argument("--target", choices=TARGETS, default="cpu", help="default: cpu")
    parser.add_argument(
        "--precision",
        choices=[p.value for p in Precision],
        help="cpu: fp32, int8 (default), int4; rtx, h200, h100, b200: bf16 (default), fp8, int4",
    )
    parser.add_argument("--name", help="what the model is called (default: the source's name)")
    parser.add_argument(
        "--device-memory",
        metavar="SIZE",
        help="of one device, as 24GiB (default: the target's; cpu: available here)",
    )
    for flag, what in (
        ("--tp", "heads, ffn and vocabulary"),
        ("--pp", "layers"),
        ("--cp", "tokens"),
    ):
        parser.add_argument(
            flag, type=int, default=1, metavar="N", help=f"devices to split {what} over"
        )
    parser.add_argument(
        "--context-tokens",
        type=int,
        metavar="N",
        help="the longest sequence to serve (default: the model's)",
    )
    _add_plan_options(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="say what it would occupy; build nothing"
    )
    parser.add_argument(
        "--config-only", action="store_true", help="plan from the config, without weights"
    )
    parser.add_argument("--home", type=Path, help="state folder (default: HEADRACE_HOME)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def _add_plan_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("TensorRT targets")
    default = PlanOptions()
    group.add_argument(
        "--rows-max",
        type=int,
        metavar="N",
        default=default.rows_max,
        help=f"rows of the largest decode step (default: {default.rows_max})",
    )
    group.add_argument(
        "--chunk",
        type=int,
        metavar="N",
        default=default.chunk,
        help=f"prompt tokens of one step (default: {default.chunk})",
    )
    group.add_argument(
        "--weight-streaming",
        action="store_true",
        help="allow weights to stay in the machine's memory",
    )
    group.add_argument(
        "--refit", action="store_true", help="allow weights to be replaced without a build"
    )
    group.add_argument(
        "--activations",
        action="store_true",
        help="in fp8: quantise what meets the matrices too, calibrated",
    )
    group.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help='lines of {"text": …} to calibrate with (default: the recorded set)',
    )


def _plan_options(args: argparse.Namespace) -> PlanOptions:
    return PlanOptions(
        rows_max=args.rows_max,
        chunk=args.chunk,
        weight_streaming=args.weight_streaming,
        refit=args.refit,
        activations=args.activations,
        calibration=args.calibration,
    )


def run(args: argparse.Namespace) -> int:
    config = Config.load(args.home)
    order = Order(
        source=args.source,
        precision=Precision(args.precision or default_precision(args.target)),
        target=args.target,
        name=args.name,
        device_bytes=None if args.device_memory is None else parse_bytes(args.device_memory),
        sharding=Sharding(tp=args.tp, pp=args.pp, cp=args.cp),
        context_tokens=args.context_tokens,
        plans=_plan_options(args),
        is_config_only=args.config_only,
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
        print(json.dumps(_estimate_as_json(found)))
    else:
        _show_estimate(found)
    return 0 if found.fits else 3


def _estimate_as_json(found: Estimate) -> dict[str, object]:
    stated = asdict(found)
    return {**stated.pop("fit"), **stated}


def _show_estimate(found: Estimate) -> None:
    split = found.sharding
    print(
        f"{found.precision} for {found.target}: {split.ranks} rank{'s' * (split.ranks > 1)} "
        f"(tp {split.tp}, pp {split.pp}, cp {split.cp}) of {found.device_bytes:,} bytes"
    )
    if found.compute_capabilities:
        print(f"compute capability {', '.join(found.compute_capabilities)}")
    for part in found.components:
        print(f"{part.name:<13}{part.parameters:>18,} values {part.weight_bytes:>18,} bytes")
    for numbers, rank in _distinct(found.fit.ranks):
        print(f"\n{numbers}")
        print(f"weights      {rank.weight_bytes:>18,} bytes")
        print(f"activations  {rank.activation_bytes:>18,} bytes")
        if rank.kv_bytes_per_token:
            print(f"KV cache     {rank.kv_bytes_per_token:>18,} bytes a token")
            print(f"room for     {rank.kv_tokens_max:>18,} tokens")
    if found.profiles:
        print()
        for profile in found.profiles:
            print(f"{profile.name:<13}{_range(profile)}")
        print(f"plan files   {sum(found.plan_bytes):>18,} bytes together")
    if found.cache_tokens:
        rows = found.fit.kv_tokens // found.cache_tokens
        print(f"KV tokens    {found.fit.kv_tokens:>18,}: {rows:,} rows of {found.cache_tokens:,}")
    for note in found.notes:
        print(note)
    print("It fits." if found.fits else "It does not fit.")


def _distinct(ranks: Sequence[Rank]) -> Iterator[tuple[str, Rank]]:
    """Ranks that occupy the same, together: their numbers as "ranks 0-3", and one of them."""
    for _, group in groupby(enumerate(ranks), key=lambda entry: entry[1]):
        members = list(group)
        first, last = members[0][0], members[-1][0]
        yield (f"rank {first}" if first == last else f"ranks {first}-{last}"), members[0][1]


def _range(profile: Profile) -> str:
    """For example "rows 2 to 8, tokens 1"."""
    sizes = {"rows": profile.rows, "tokens": profile.tokens}
    return ", ".join(
        f"{name} {least}" if least == most else f"{name} {least} to {most}"
        for name, (least, _, most) in sizes.items()
    )


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
    if checked.method is VerifyMethod.NETWORK:
        print(
            "Only its network was computed, on the CPU: no GPU has run the plan. Run `headrace "
            "models verify` where one is; until then serving wants --allow-unverified."
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
