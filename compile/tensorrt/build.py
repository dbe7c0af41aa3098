"""Building all ranks of a plan: one process each, resumable, with nothing half-done left behind.

A build lives in `<home>/builds/<artifact id>/` until every rank is whole. A rank is done when
`rank-N.done.json` is there: it is written last and holds its files' hashes, so that a build that
was interrupted, by whatever, goes on with the rank it had reached.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from headrace.compile.memory import available_bytes
from headrace.compile.progress import Progressing
from headrace.compile.sharding import parts
from headrace.compile.storage import write_atomically
from headrace.compile.tensorrt.rank_build import RankBuilt, log_file
from headrace.compile.tensors import sha256_of
from headrace.serving import errors
from headrace.serving.domain.artifact import Decoder, Precision, Profile, RankPlan, Sharding
from headrace.serving.engine import plan_io
from headrace.serving.errors import DoesNotFit, ServingError, UnsupportedModel

HOST_BYTES_PER_WEIGHT_BYTE = 4
"""Of this machine's memory, while TensorRT builds. Measured with TensorRT-RTX 1.7.1: 3.75 times for
the shape of Qwen3-0.6B, 5.2 for SmolLM2-135M with 0.4 GB that do not depend on the model."""
HOST_BYTES_FIXED = 400 * 10**6

_LINE_BYTES_MAX = 1 << 20
_TAIL_LINES = 5
_WORKER = "headrace.compile.tensorrt.build_worker"
_DONE = "rank-{}.done.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOrder:
    """What is to be built, all ranks together."""

    checkpoint: Path
    decoder: Decoder
    sharding: Sharding
    precision: Precision
    library: str
    compute_capabilities: Sequence[str]
    profiles: Sequence[Profile]
    cache_tokens: int
    flags: Sequence[str] = ()
    is_calibrated: bool = False
    """Whether the build's folder has what calibration found."""
    activations: bool = False
    """Whether FP8 matrices meet FP8 inputs."""
    timing_cache: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltPlans:
    """The files are in the folder: plan, network and log of each rank."""

    ranks: Sequence[RankPlan]
    files: Sequence[str]
    seconds: float
    peak_rss_bytes: int
    """The largest of the building processes."""


def build_plans(
    order: BuildOrder, folder: Path, *, weight_bytes: Sequence[int], progress: Progressing
) -> BuiltPlans:
    """Build every rank that is not in `folder` yet.

    Args:
        order: what to build.
        folder: of this build alone; the caller holds its lock. Created.
        weight_bytes: what each rank's network will hold, for the refusal before anything starts.
        progress: told of every rank.

    Raises:
        DoesNotFit: this machine's memory is too small to build it, by our estimate or in fact.
        UnsupportedModel: TensorRT does not build the network.
        CheckpointUnreadable, StorageFull: as they say.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _require_memory(max(weight_bytes))
    built: list[tuple[RankPlan, RankBuilt]] = []
    for part in parts(order.decoder, order.sharding):
        progress.stage(f"build rank {part.rank + 1} of {order.sharding.ranks}")
        found = _done(folder, part.rank)
        if found is None:
            found = _run_worker(order, part.rank, folder, progress)
            _finish(folder, part.rank, found)
        plan = RankPlan(
            rank=part.rank,
            file=plan_io.plan_file(part.rank),
            plan_bytes=found.plan_bytes,
            weight_bytes=found.weight_bytes,
            activation_bytes=found.activation_bytes,
            layers=(part.first_layer, part.last_layer),
        )
        built.append((plan, found))
    ranks = [plan for plan, _ in built]
    return BuiltPlans(
        ranks=ranks,
        files=[name for plan in ranks for name in _files(plan.rank)],
        seconds=sum(each.seconds for _, each in built),
        peak_rss_bytes=max(each.peak_rss_bytes for _, each in built),
    )


def _require_memory(weight_bytes: int) -> None:
    needed = HOST_BYTES_PER_WEIGHT_BYTE * weight_bytes + HOST_BYTES_FIXED
    available = available_bytes()
    if needed > available:
        raise DoesNotFit(
            f"Building a rank of {weight_bytes:,} bytes of weights needs about {needed:,} bytes "
            f"of this machine's memory; {available:,} are available.",
            why=f"TensorRT holds its weights about {HOST_BYTES_PER_WEIGHT_BYTE} times while it "
            "builds.",
            fix="Free memory, build on a larger machine, or split further with --tp or --pp.",
        )


def _run_worker(order: BuildOrder, rank: int, folder: Path, progress: Progressing) -> RankBuilt:
    """Build one rank in a process of its own and answer what it reported."""
    message = asdict(order) | {
        "rank": rank,
        "folder": str(folder),
        "checkpoint": str(order.checkpoint),
        "timing_cache": None if order.timing_cache is None else str(order.timing_cache),
    }
    del message["decoder"]
    command = [sys.executable, "-m", _WORKER]
    with (
        (folder / log_file(rank)).open("w", encoding="utf-8") as log,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        ) as process,
    ):
        try:
            last = _follow(process, message, progress)
        except BaseException:
            process.kill()
            raise
    return _answer(last, process.returncode, rank, folder)


def _follow(
    process: "subprocess.Popen[str]", message: Mapping[str, Any], progress: Progressing
) -> Mapping[str, Any]:
    """Hand the worker its order and answer the last thing it said."""
    assert process.stdin is not None
    assert process.stdout is not None
    with process.stdin:
        json.dump(message, process.stdin)
    last: dict[str, Any] = {}
    while line := process.stdout.readline(_LINE_BYTES_MAX):
        last = json.loads(line)
        if last["event"] == "phase":
            progress.advance(done=last["step"], total=max(1, last["steps"]))
    return last


def _answer(last: Mapping[str, Any], exit_code: int, rank: int, folder: Path) -> RankBuilt:
    if exit_code == 0:
        return RankBuilt(**{key: value for key, value in last.items() if key != "event"})
    if last.get("event") == "refused":
        kind = getattr(errors, str(last["kind"]), UnsupportedModel)
        assert issubclass(kind, ServingError)
        raise kind(last["what"], why=last["why"], fix=last["fix"])
    if exit_code == -signal.SIGKILL:
        raise DoesNotFit(
            f"The build of rank {rank} was killed.",
            why="The system ends a process so when the machine's memory is used up.",
            fix="Free memory, build on a larger machine, or split further with --tp or --pp.",
        )
    said = (folder / log_file(rank)).read_text("utf-8", errors="replace").splitlines()
    tail = " ".join(said[-_TAIL_LINES:]) or "It said nothing."
    raise UnsupportedModel(
        f"The build of rank {rank} ended with {_how(exit_code)}.",
        why=tail,
        fix=f"Read {folder / log_file(rank)}; ranks that were finished are kept.",
    )


def _how(exit_code: int) -> str:
    return f"signal {-exit_code}" if exit_code < 0 else f"exit code {exit_code}"


def _done(folder: Path, rank: int) -> RankBuilt | None:
    """What an earlier run built of this rank, if it is whole."""
    note = folder / _DONE.format(rank)
    if not note.is_file():
        return None
    try:
        told = json.loads(note.read_text("utf-8"))
        whole = all(sha256_of(folder / name) == told["sha256"][name] for name in _files(rank))
    except (OSError, ValueError):
        return None  # Lost with the power, or damaged: this rank is built again.
    return RankBuilt(**told["built"]) if whole else None


def _files(rank: int) -> Sequence[str]:
    return [name(rank) for name in (plan_io.plan_file, plan_io.inspection_file, log_file)]


def _finish(folder: Path, rank: int, built: RankBuilt) -> None:
    told = {
        "sha256": {name: sha256_of(folder / name) for name in _files(rank)},
        "built": asdict(built),
    }
    write_atomically(folder / _DONE.format(rank), json.dumps(told) + "\n")
