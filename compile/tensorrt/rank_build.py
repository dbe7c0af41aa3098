"""One rank's network to a plan, in the process that calls it.

Used by `build_worker.py`: TensorRT holds several times the weights while it builds and may be
killed for memory, or crash, and neither may take the caller along.
"""

import json
import re
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from headrace.compile.tensorrt.decoder_network import Plan, write_decoder
from headrace.compile.tensorrt.inspection import digest, inspect
from headrace.compile.tensorrt.linear_forms import Held
from headrace.compile.tensorrt.network import DYNAMIC, Network
from headrace.serving.domain.artifact import Profile
from headrace.serving.engine import plan_io
from headrace.serving.errors import DoesNotFit, ServingError, UnsupportedModel

FLAGS: Mapping[str, Sequence[str]] = {
    "weight_streaming": ("WEIGHT_STREAMING",),
    # REFIT of all weights at once needs a driver in TensorRT-RTX; named weights do not.
    "refit": ("REFIT_INDIVIDUAL",),
}
"""What a manifest's flag is to the builder."""

_ERRORS_KEPT = 20
_ACTIVATIONS = re.compile(r"Total Activation Memory: (\d+) bytes")
_NOT_FUSED = "not supported by a dedicated kernel"
_NO_MEMORY = "bad_alloc"


@dataclass(frozen=True, slots=True, kw_only=True)
class RankOrder:
    """What is to be built."""

    plan: Plan
    profiles: Sequence[Profile]
    compute_capabilities: Sequence[str]
    """As "8.9"; empty takes the library's own choice."""
    flags: Sequence[str]
    timing_cache: Path | None
    """Read before and written after, where the library keeps one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankBuilt:
    """What came of it, beside the plan's file."""

    plan_bytes: int
    weight_bytes: int
    activation_bytes: int
    """Of the profile that takes most, as the library's log says; 0 where it does not."""
    seconds: float
    peak_rss_bytes: int


def log_file(rank: int) -> str:
    return f"rank-{rank}.build.log"


def build_rank(
    trt: Any,
    order: RankOrder,
    held: Held,
    *,
    folder: Path,
    log: TextIO,
    advance: Callable[[str, int, int], None],
) -> RankBuilt:
    """Write `rank-N.plan` and `rank-N.network.json` into `folder`.

    Args:
        trt: the library's module.
        order: what to build.
        held: the whole model's tensors, and how its products are written.
        folder: exists.
        log: gets every line of TensorRT's.
        advance: told of the builder's phases: name, step, steps.

    Raises:
        UnsupportedModel: TensorRT does not build this network; its own words say why.
        DoesNotFit: TensorRT ran out of this machine's memory.
    """
    started, rank = time.perf_counter(), order.plan.part.rank
    logger = _logger(trt, log)
    builder = trt.Builder(logger)
    strongly_typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    net = Network(trt, builder.create_network(strongly_typed))
    write_decoder(net, order.plan, held.tensors, held.products)
    if "refit" in order.flags:
        net.mark_refittable()
    found = inspect(net)
    config = _configured(trt, builder, order, advance)
    for profile in order.profiles:
        # Refused, it is left out and the build goes on: a plan that no engine could be made of.
        if config.add_optimization_profile(_profile(builder, net, profile)) < 0:
            raise UnsupportedModel(
                f"TensorRT does not take the profile {profile.name!r} of rank {rank}.",
                why=f"It is for rows {profile.rows} and tokens {profile.tokens}.",
                fix="Choose another --rows-max or --chunk; the build log says more.",
            )
    plan = builder.build_serialized_network(net.definition, config)
    if plan is None:
        raise _refused(order, logger.errors)
    with (folder / plan_io.plan_file(rank)).open("wb") as file:
        file.write(plan)
    _keep_timings(config, order.timing_cache)
    built = RankBuilt(
        plan_bytes=plan.nbytes,
        weight_bytes=found["summary"]["constant_bytes"],
        activation_bytes=logger.activation_bytes,
        seconds=time.perf_counter() - started,
        peak_rss_bytes=_peak_rss_bytes(),
    )
    text = json.dumps({"digest": digest(found), **found}, separators=(",", ":"))
    (folder / plan_io.inspection_file(rank)).write_text(text + "\n", "utf-8")
    return built


def _peak_rss_bytes() -> int:
    """The most memory this process has had. `ru_maxrss` would begin with its parent's."""
    for line in Path("/proc/self/status").read_text("ascii", errors="replace").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def _configured(
    trt: Any, builder: Any, order: RankOrder, advance: Callable[[str, int, int], None]
) -> Any:
    config = builder.create_builder_config()
    for flag in order.flags:
        for name in FLAGS[flag]:
            config.set_flag(getattr(trt.BuilderFlag, name))
    # TensorRT builds for the device it runs on; TensorRT-RTX for those that it is told.
    if order.compute_capabilities and hasattr(config, "set_compute_capability"):
        config.num_compute_capabilities = len(order.compute_capabilities)
        for index, capability in enumerate(order.compute_capabilities):
            kind = getattr(trt.ComputeCapability, "SM" + capability.replace(".", ""))
            config.set_compute_capability(kind, index)
    config.progress_monitor = _monitor(trt, advance)
    cache = order.timing_cache
    if cache is not None:
        stored = cache.read_bytes() if cache.is_file() else b""
        config.set_timing_cache(config.create_timing_cache(stored), ignore_mismatch=False)
    return config


def _profile(builder: Any, net: Network, profile: Profile) -> Any:
    """The sizes of every input: axis 0 is rows, any other open axis is tokens."""
    made = builder.create_optimization_profile()
    for index in range(net.definition.num_inputs):
        tensor = net.definition.get_input(index)
        sizes = [
            tuple(
                size if size != DYNAMIC else (rows if axis == 0 else tokens)
                for axis, size in enumerate(tensor.shape)
            )
            for rows, tokens in zip(profile.rows, profile.tokens, strict=True)
        ]
        made.set_shape(tensor.name, *sizes)
    return made


def _keep_timings(config: Any, cache: Path | None) -> None:
    if cache is None:
        return
    beside = cache.with_suffix(".new")
    beside.write_bytes(config.get_timing_cache().serialize())
    beside.replace(cache)


def _refused(order: RankOrder, errors: Sequence[str]) -> ServingError:
    facts, part = order.plan.part.decoder, order.plan.part
    said = errors[-1] if errors else "It gave no reason; the build log may."
    if any(_NOT_FUSED in each for each in errors):
        return UnsupportedModel(
            f"TensorRT has no fused attention for rank {part.rank}: {facts.heads} heads and "
            f"{facts.kv_heads} KV heads of {facts.head_dim}, {order.plan.cache_tokens:,} places.",
            why=f"It would have to compute it piece by piece, which is never done. It said: {said}",
            # TensorRT-RTX 1.7.1, decoding: 24,448 places of 128 build and 24,512 do not, whatever
            # the heads; fewer than four heads do not build at all.
            fix="Choose a smaller --context-tokens, or a smaller --tp: four heads a rank or "
            "more are known to be served.",
        )
    if any(_NO_MEMORY in each for each in errors):
        return DoesNotFit(
            f"The memory ran out while rank {part.rank} was built.",
            why=f"TensorRT said: {said}",
            fix="Free memory, build on a larger machine, or split further with --tp or --pp.",
        )
    return UnsupportedModel(
        f"TensorRT did not build rank {part.rank}.",
        why=f"It said: {said}",
        fix="Read the build log; choose another precision, target or split.",
    )


def _logger(trt: Any, log: TextIO) -> Any:
    """An ILogger that writes every line and keeps the last errors."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: deque[str] = deque(maxlen=_ERRORS_KEPT)
            self.activation_bytes = 0

        def log(self, severity: Any, message: str) -> None:
            if severity == trt.ILogger.VERBOSE:
                return
            log.write(f"{severity.name} {message}\n")
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)
            if found := _ACTIVATIONS.match(message):
                self.activation_bytes = max(self.activation_bytes, int(found[1]))

    return Logger()


def _monitor(trt: Any, advance: Callable[[str, int, int], None]) -> Any:
    """An IProgressMonitor that passes on the outermost phase."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            if parent is None:
                self._steps[phase] = steps
                advance(phase, 0, steps)

        def phase_finish(self, phase: str) -> None:
            self._steps.pop(phase, None)

        def step_complete(self, phase: str, step: int) -> bool:
            if phase in self._steps:
                advance(phase, step, self._steps[phase])
            return True

    return Monitor()
