"""What a TensorRT plan costs to build: seconds and memory, and how near its plan was.

Nobody else is measured: no other server builds TensorRT engines without a GPU. SmolLM2-135M is the
real checkpoint, Qwen3-0.6B its shape with random weights, which cost the same to build.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from headrace.compile.checkpoint import open_checkpoint
from headrace.compile.families.registry import describe, describe_config
from headrace.compile.pipeline import locate
from headrace.compile.progress import Silent
from headrace.compile.published import open_config
from headrace.compile.pull import pull
from headrace.compile.sharding import parts
from headrace.compile.tensorrt.build import BuildOrder, BuiltPlans, build_plans
from headrace.compile.tensorrt.profiles import default_profiles
from headrace.compile.tensorrt.targets import find_target
from headrace.compile.tensorrt_memory import TensorRtFootprint
from headrace.deploy.bench import machine
from headrace.deploy.bench.report import OURS, Report, Row
from headrace.serving.domain.artifact import Precision, Sharding

Tell = Callable[[str], None]

TARGET = find_target("rtx")
REAL = "smollm2-135m"
SHAPE = "qwen3-0.6b"
SHAPE_THETA = 1e6
"""Of Qwen3's RoPE."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    rounds: int = 3
    precisions: tuple[Precision, ...] = (Precision.BF16, Precision.FP8)
    """Those that need no calibration."""
    context_tokens: int = 4_096


def bench_plans(options: Options, home: Path, tell: Tell) -> Report:
    """Build both models on this machine; the checkpoints lie under `home`."""
    tell("looking at the machine")
    report = Report(kind="plans", machine=machine.measure(), roofline={})
    if not report.machine.quiet:
        tell(f"warning: other processes use {report.machine.others_cores:.2f} cores")
    pull(REAL, home=home)
    with TemporaryDirectory(dir=home, prefix="bench-plans-") as folder:
        # torch fills the random weights, and is wanted for nothing else.
        from headrace.deploy.bench.random_checkpoint import write_random

        shape = describe_config(open_config(SHAPE)).decoder
        checkpoints = {
            REAL: locate(REAL, home=home),
            SHAPE: write_random(Path(folder) / SHAPE, shape, rope_theta=SHAPE_THETA),
        }
        for name, checkpoint in checkpoints.items():
            for precision in options.precisions:
                tell(f"{name} in {precision}")
                work = Path(folder) / f"{name}-{precision}"
                report.rows += _rows(name, precision, checkpoint, work, options)
    report.notes = [
        f"Target {TARGET.name}, {len(default_profiles())} profiles, a cache of "
        f"{options.context_tokens + TensorRtFootprint(Precision.BF16).chunk:,} places; medians of "
        f"{options.rounds} builds, each in a process of its own.",
        "plan ratio: the file over what --dry-run says it will be.",
    ]
    return report


def _rows(
    name: str, precision: Precision, checkpoint: Path, work: Path, options: Options
) -> Iterator[Row]:
    decoder = describe(open_checkpoint(checkpoint)).decoder
    decoder = replace(decoder, context_tokens=options.context_tokens)
    footprint = TensorRtFootprint(precision)
    (part,) = parts(decoder, Sharding())
    order = BuildOrder(
        checkpoint=checkpoint,
        decoder=decoder,
        sharding=Sharding(),
        precision=precision,
        library=TARGET.library,
        compute_capabilities=TARGET.capabilities(precision),
        profiles=default_profiles(),
        cache_tokens=footprint.cache_tokens(decoder),
    )
    builds: list[BuiltPlans] = []
    for number in range(options.rounds):
        with TemporaryDirectory(dir=work.parent, prefix=f"{work.name}-{number}-") as folder:
            builds.append(
                build_plans(
                    order,
                    Path(folder),
                    weight_bytes=[footprint.weight_bytes(part)],
                    progress=Silent(),
                )
            )
    plan_bytes = builds[0].ranks[0].plan_bytes
    figures = {
        ("build_s", "s"): median(each.seconds for each in builds),
        ("peak_rss_mb", "MB"): max(each.peak_rss_bytes for each in builds) / 1e6,
        ("plan_mb", "MB"): plan_bytes / 1e6,
        ("weights_mb", "MB"): builds[0].ranks[0].weight_bytes / 1e6,
        ("plan_ratio", "x"): plan_bytes / footprint.plan_bytes(part, Sharding()),
    }
    for (metric, unit), value in figures.items():
        yield Row(
            name=f"plans/{precision}/{name}", peer=OURS, metric=metric, value=value, unit=unit
        )
