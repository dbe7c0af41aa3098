"""The TensorRT half of an artifact: its plans, its facts, and what can be verified here.

Where a device answers, the engine is verified as serving runs it. Where none does, its networks
are: computed on the CPU, layer by layer, sharded builds over processes. The manifest says which.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from headrace.compile.families.base import Model, Weights
from headrace.compile.families.registry import describe
from headrace.compile.memory import Fit
from headrace.compile.progress import Progressing
from headrace.compile.sharding import parts
from headrace.compile.tensorrt.build import BuildOrder, BuiltPlans, build_plans
from headrace.compile.tensorrt.decoder_network import Plan, write_decoder
from headrace.compile.tensorrt.library import TENSORRT, library_version, open_library
from headrace.compile.tensorrt.linear_forms import linear_for
from headrace.compile.tensorrt.network import Network
from headrace.compile.tensorrt.profiles import default_profiles
from headrace.compile.tensorrt.targets import find_target
from headrace.compile.tensors import Array, Checkpoint
from headrace.serving.domain.artifact import (
    Precision,
    Profile,
    Sharding,
    TensorRt,
    Verification,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOrder:
    """What decides a TensorRT build beside the checkpoint."""

    target: str
    precision: Precision
    sharding: Sharding
    context_tokens: int
    """The longest sequence to serve; a cache has one chunk more."""
    rows_max: int
    chunk: int
    flags: Sequence[str] = ()
    activation_scales: Mapping[str, float] | None = None

    @property
    def cache_tokens(self) -> int:
        return self.context_tokens + self.chunk

    @property
    def profiles(self) -> Sequence[Profile]:
        return default_profiles(self.rows_max, self.chunk, cp=self.sharding.cp)


def make_plans(
    order: PlanOrder,
    checkpoint: Checkpoint,
    model: Model,
    *,
    builds: Path,
    timings: Path,
    fit: Fit,
    progress: Progressing,
) -> BuiltPlans:
    """Build every rank's plan into `builds`, which is this build's own and survives interruption.

    Args:
        order: what to build.
        checkpoint: its weights.
        model: what they are.
        builds: the build's folder; the caller holds its lock.
        timings: folder of the libraries' timing caches.
        fit: what each rank holds.
        progress: told of every rank.

    Raises:
        UnsupportedModel: the library is missing, or does not build this network.
        DoesNotFit: this machine's memory is too small to build it.
        StorageFull: the disk is.
    """
    target = find_target(order.target)
    version = library_version(target.library)
    timing_cache = None
    if target.library == TENSORRT:
        # TensorRT-RTX compiles kernels when it loads a plan, and has no timings to keep.
        timings.mkdir(parents=True, exist_ok=True)
        timing_cache = timings / f"{target.name}-{version}.cache"
    return build_plans(
        BuildOrder(
            checkpoint=checkpoint.path,
            decoder=model.decoder,
            sharding=order.sharding,
            precision=order.precision,
            library=target.library,
            compute_capabilities=target.capabilities(order.precision),
            profiles=order.profiles,
            cache_tokens=order.cache_tokens,
            flags=order.flags,
            activation_scales=order.activation_scales,
            timing_cache=timing_cache,
        ),
        builds,
        weight_bytes=[rank.weight_bytes for rank in fit.ranks],
        progress=progress,
    )


def facts(order: PlanOrder, built: BuiltPlans) -> TensorRt:
    """What the manifest says of the plans."""
    target = find_target(order.target)
    return TensorRt(
        library=target.library,
        version=library_version(target.library),
        compute_capabilities=tuple(target.capabilities(order.precision)),
        cache_tokens=order.cache_tokens,
        profiles=tuple(order.profiles),
        sharding=order.sharding,
        ranks=tuple(built.ranks),
        flags=tuple(order.flags),
    )


def link_files(built: BuiltPlans, builds: Path, folder: Path) -> None:
    """Let the artifact's folder have the build's files too; both are on one file system.

    The build's folder stays whole until the artifact is, so that a failing verification costs no
    build.
    """
    for name in built.files:
        os.link(builds / name, folder / name)


def verify_networks(
    order: PlanOrder,
    checkpoint: Checkpoint,
    model: Model,
    prompts: Sequence[Sequence[int]],
    references: Iterable[Array],
    *,
    reference: str,
) -> Verification:
    """Compute the networks on the CPU and compare them with the reference.

    Raises:
        OutsideTolerance: they differ more than the precision may.
        EngineFault: a rank's process ended.
    """
    from headrace.compile.tensorrt.network_check import verify_network

    return verify_network(
        partial(_make_network, order, checkpoint.path),
        prompts,
        references,
        decoder=model.decoder,
        sharding=order.sharding,
        precision=order.precision,
        reference=reference,
    )


def _make_network(order: PlanOrder, path: Path, rank: int) -> tuple[Any, Any]:
    """The network of a rank, as its build made it, and its constants; in any process."""
    from headrace.compile.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(path)
    model = describe(checkpoint)
    net = open_network(find_target(order.target).library)
    write_decoder(
        net,
        Plan(
            part=parts(model.decoder, order.sharding)[rank],
            sharding=order.sharding,
            cache_tokens=order.cache_tokens,
        ),
        Weights(checkpoint, model),
        linear_for(order.precision, order.activation_scales),
    )
    return net.definition, net.constants


def open_network(library: str) -> Network:
    """An empty network of the library.

    Raises:
        UnsupportedModel: the library is missing.
    """
    trt = open_library(library)
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    strongly_typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    return Network(trt, builder.create_network(strongly_typed))
