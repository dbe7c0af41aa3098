"""What `--dry-run` answers: the plan of a build, from facts alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from headrace.compile.families.wan_facts import (
    Wan,
    component_shapes,
    is_kept_wide,
    is_linear,
    require_split,
)
from headrace.compile.memory import (
    USABLE_SHARE,
    CpuFootprint,
    Fit,
    Footprint,
    Rank,
    available_bytes,
    fit,
)
from headrace.compile.sharding import parts
from headrace.compile.targets import CPU
from headrace.compile.tensorrt.options import PlanOptions
from headrace.compile.tensorrt.profiles import default_profiles
from headrace.compile.tensorrt.targets import find_target
from headrace.compile.tensorrt_memory import TensorRtFootprint
from headrace.serving.domain.artifact import Decoder, Precision, Profile, Sharding

_WIDE_BYTES = 4

_NO_MIXTURE_LAYER = (
    "Experts are expressed densely, as batched products, in bf16: SM90 has no MoE layer (IMoELayer "
    "needs SM 10.x/11.x)."
)
_STREAMED = "Weights may be streamed, so they are not counted among what must fit."
_NO_CPU_MIXTURE = "The engines of cpu compute no mixture of experts: this is arithmetic only."
_NO_WAN = (
    "Video models cannot be built yet: this is arithmetic only. Activations are one denoising "
    "step's; what the VAE keeps while it decodes is not in them."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    """One network of a pipeline, as each rank holds it."""

    name: str
    parameters: int
    weight_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a build would make, and whether it would fit."""

    target: str
    precision: Precision
    sharding: Sharding
    device_bytes: int
    compute_capabilities: Sequence[str] = ()
    """Of the devices that the plans would run on; empty on `cpu`."""
    fit: Fit
    plan_bytes: Sequence[int] = ()
    """Of each rank's plan file; empty on `cpu` and for video."""
    profiles: Sequence[Profile] = ()
    cache_tokens: int = 0
    """Places of one row's cache; 0 where the cache is a pool."""
    components: Sequence[Component] = ()
    notes: Sequence[str] = ()
    """What the numbers do not say, a sentence each."""

    @property
    def fits(self) -> bool:
        return self.fit.fits


def footprint(target: str, precision: Precision) -> Footprint:
    """How the target's engine stores and computes a decoder."""
    return CpuFootprint(precision) if target == CPU else TensorRtFootprint(precision)


def device_memory(target: str) -> int:
    """Bytes of one device: this machine's free memory for `cpu`, the maker's number elsewhere.

    Raises:
        InvalidRequest: this machine does not say.
        UnsupportedModel: there is no such target.
    """
    return available_bytes() if target == CPU else find_target(target).device_bytes


def estimate_decoder(
    decoder: Decoder,
    *,
    target: str,
    precision: Precision,
    sharding: Sharding,
    device_bytes: int | None,
    options: PlanOptions,
) -> Estimate:
    """State what a language model would occupy.

    Raises:
        InvalidRequest: the model cannot be split so.
    """
    device = device_bytes or device_memory(target)
    notes = list(_notes(target, assumed=device_bytes is None))
    if target == CPU:
        found = fit(decoder, CpuFootprint(precision), device_bytes=device, sharding=sharding)
        plans, profiles, cache_tokens = [], (), 0
        notes += [_NO_CPU_MIXTURE] * bool(decoder.experts)
    else:
        engine = TensorRtFootprint(precision, options.rows_max, options.chunk, options.activations)
        found = fit(decoder, engine, device_bytes=device, sharding=sharding)
        plans = [engine.plan_bytes(part, sharding) for part in parts(decoder, sharding)]
        profiles = default_profiles(engine.rows_max, engine.chunk, cp=sharding.cp)
        cache_tokens = engine.cache_tokens(decoder)
        notes += [_NO_MIXTURE_LAYER] * bool(decoder.experts)
        notes += [_STREAMED] * options.weight_streaming
    return Estimate(
        target=target,
        precision=precision,
        sharding=sharding,
        device_bytes=device,
        compute_capabilities=_capabilities(target, precision),
        fit=found,
        plan_bytes=plans,
        profiles=profiles,
        cache_tokens=cache_tokens,
        notes=notes,
    )


def estimate_wan(
    wan: Wan,
    *,
    target: str,
    precision: Precision,
    sharding: Sharding,
    device_bytes: int | None,
) -> Estimate:
    """State what a video model would occupy with all its components on each rank.

    Matrices of the repeated blocks are in `precision`; time embedding, modulation, the norm that
    has weights and the VAE are float32; the rest is bf16, on `cpu` float32.

    Raises:
        InvalidRequest: the model cannot be split so.
    """
    require_split(wan, sharding)
    device, engine = device_bytes or device_memory(target), footprint(target, precision)
    parts = [
        Component(
            name=name,
            parameters=sum(math.prod(shape) for shape in shapes.values()),
            weight_bytes=sum(_held(engine, name, *entry) for entry in shapes.items()),
        )
        for name, shapes in component_shapes(wan, sharding.tp).items()
    ]
    rank = Rank(
        weight_bytes=sum(part.weight_bytes for part in parts),
        kv_bytes_per_token=0,
        activation_bytes=denoising_bytes(wan, sharding, value_bytes=engine.value_bytes),
        kv_tokens_max=0,
    )
    fits = rank.weight_bytes + rank.activation_bytes <= device * USABLE_SHARE
    return Estimate(
        target=target,
        precision=precision,
        sharding=sharding,
        device_bytes=device,
        compute_capabilities=_capabilities(target, precision),
        fit=Fit([rank] * sharding.ranks, fits=fits),
        components=parts,
        notes=[*_notes(target, assumed=device_bytes is None), _NO_WAN],
    )


def denoising_bytes(wan: Wan, sharding: Sharding, *, value_bytes: int) -> int:
    """The most that lives at once inside one forward of a DiT, guided and unguided taking turns.

    With M tokens of a rank (the clip's / cp), D the DiT's width, and F its ffn: the stream, its
    norm and a layer's answer 3 M D, of the rank's heads queries, keys, values and what was attended
    to 4 M D / tp, and the ffn M F / tp, each of `value_bytes`; the stream while it is modulated M D
    in float32.

    Wan 14B at 1280 x 720 x 81 in bf16: 75,600 x (2 x 49,664 + 4 x 5,120) = 9.1 GB.
    """
    dit, m = wan.experts[0], -(-wan.tokens // sharding.cp)
    values = 3 * dit.dim + (4 * dit.dim + dit.ffn) // sharding.tp
    return m * (value_bytes * values + _WIDE_BYTES * dit.dim)


def _held(engine: Footprint, component: str, name: str, shape: tuple[int, ...]) -> int:
    if is_kept_wide(component, name):
        return _WIDE_BYTES * math.prod(shape)
    if is_linear(name, shape):
        return engine.matrix_bytes(shape)
    return engine.value_bytes * math.prod(shape)


def _capabilities(target: str, precision: Precision) -> Sequence[str]:
    return () if target == CPU else find_target(target).capabilities(precision)


def _notes(target: str, *, assumed: bool) -> Sequence[str]:
    if target == CPU or not assumed or not find_target(target).is_device_assumed:
        return []
    return [f"The memory of an {target} device is assumed: state yours with --device-memory."]
