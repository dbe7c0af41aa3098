"""What a model occupies on a device, before anything is built.

    weights     = sum of every tensor's values x bytes each, scales included
    KV a token  = 2 x layers x KV heads x head_dim x bytes a value
    activations = what one step of T tokens and R rows keeps at once, see `activation_bytes`
    KV tokens   = (device x 0.9 - weights - activations) / KV a token

for each rank of a replica, of the part that `sharding.py` gives it. How many bytes a value has and
what a step keeps is the engine's business: a `Footprint`, of `cpu` here and of TensorRT in
`tensorrt_memory.py`.

Worked for SmolLM2-135M (30 layers, hidden 576, 9 and 3 heads of 64, ffn 1536, vocabulary 49,152,
tied; the config in its checkpoint): 134,515,008 parameters, so fp32 weights take 538,060,160 bytes
with the 32 RoPE frequencies; a token keeps 2 x 30 x 3 x 64 = 11,520 values, in fp32 46,080 bytes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from headrace.compile.families.rope import ROPE_TENSOR
from headrace.compile.sharding import RANKS_MAX, Part, held_shapes, parts
from headrace.serving.domain.artifact import Decoder, Precision, Sharding
from headrace.serving.engine.native_weights import source_shapes, tensor_layout
from headrace.serving.errors import DoesNotFit, InvalidRequest

USABLE_SHARE = 0.9
"""The rest of the device stays free for the process itself, its allocator and the system."""

KV_TOKENS_MIN = 2_048
"""Fewer are not worth loading: one conversation of usual length would not fit."""

KV_VALUE_BYTES: Mapping[Precision, int] = {
    Precision.FP32: 4,
    Precision.INT8: 2,
    Precision.INT4: 2,
}
"""Bytes of one number in the KV cache of the `cpu` engine that serves the precision."""

_TP_OFFERED_MAX = 64
"""A refusal looks no further for a split that would do: eight machines of eight."""

_ITEM_BYTES = {"F32": 4, "F16": 2, "I8": 1, "U8": 1}

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rank:
    """One device's part of a replica."""

    weight_bytes: int
    kv_bytes_per_token: int
    activation_bytes: int
    kv_tokens_max: int
    """Tokens that fit beside the rest."""


@dataclass(frozen=True, slots=True)
class Fit:
    """What a replica occupies, device by device."""

    ranks: Sequence[Rank]
    fits: bool

    @property
    def kv_tokens(self) -> int:
        """Of the whole replica: every rank keeps each token's share, so that the least decides."""
        return min(rank.kv_tokens_max for rank in self.ranks)


class Footprint(Protocol):
    """How one kind of engine stores and computes a rank's part, in bytes."""

    @property
    def precision(self) -> Precision: ...

    @property
    def narrower(self) -> Sequence["Footprint"]:
        """The same engine in its other precisions that take less, the largest first."""
        ...

    @property
    def value_bytes(self) -> int:
        """Of one value that the precision does not change: a norm, a bias."""
        ...

    def matrix_bytes(self, shape: tuple[int, ...]) -> int:
        """Of a matrix [outputs, inputs] that the precision is for, scales included."""
        ...

    def weight_bytes(self, part: Part) -> int: ...

    def resident_bytes(self, part: Part) -> int:
        """Of the weights, what must be on the device."""
        ...

    def kv_bytes_per_token(self, part: Part) -> int: ...

    def activation_bytes(self, part: Part, sharding: Sharding) -> int: ...

    def kv_tokens_min(self, decoder: Decoder) -> int:
        """Fewer KV tokens are not worth loading."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSize:
    """How large a step the device must have room for; the engines' own defaults."""

    rows: int = 32
    tokens: int = 512
    pool_tokens: int = 32_768
    """Of the KV pool: no more context than that can be in use."""


@dataclass(frozen=True, slots=True)
class CpuFootprint:
    """The ONNX engine (fp32) and the native one (int8, int4)."""

    precision: Precision
    step: StepSize = field(default_factory=StepSize)

    @property
    def narrower(self) -> Sequence["CpuFootprint"]:
        order = (Precision.FP32, Precision.INT8, Precision.INT4)
        return [replace(self, precision=p) for p in order[order.index(self.precision) + 1 :]]

    @property
    def value_bytes(self) -> int:
        return 4

    def matrix_bytes(self, shape: tuple[int, ...]) -> int:
        return weight_bytes({"matrix": shape}, self.precision)

    def weight_bytes(self, part: Part) -> int:
        return weight_bytes(held_shapes(part), self.precision)

    def resident_bytes(self, part: Part) -> int:
        return self.weight_bytes(part)

    def kv_bytes_per_token(self, part: Part) -> int:
        values = 2 * part.decoder.layers * part.kv_heads * part.decoder.head_dim
        return values * KV_VALUE_BYTES[self.precision]

    def activation_bytes(self, part: Part, sharding: Sharding) -> int:
        """Of tensor parallel ranks; under cp and pp an upper bound."""
        return activation_bytes(part.decoder, self.precision, self.step)

    def kv_tokens_min(self, decoder: Decoder) -> int:
        return min(KV_TOKENS_MIN, decoder.context_tokens)


def weight_bytes(shapes: Shapes, precision: Precision) -> int:
    """Bytes of canonical tensors in the form that a `cpu` engine stores in `precision`."""
    if precision is Precision.FP32:
        return 4 * sum(math.prod(shape) for shape in shapes.values())
    return sum(
        math.prod(stored) * _ITEM_BYTES[kind]
        for name, shape in shapes.items()
        for kind, stored in tensor_layout(name, shape, precision).values()
    )


def parameters(decoder: Decoder) -> int:
    """Trained numbers of a model; the RoPE frequencies are computed."""
    whole = source_shapes(decoder)
    return sum(math.prod(shape) for name, shape in whole.items() if name != ROPE_TENSOR)


def activation_bytes(decoder: Decoder, precision: Precision, step: StepSize) -> int:
    """The most that lives at once inside a step, in float32.

    With T tokens, R rows, S context, P pool, D hidden, N heads, K KV heads, H head_dim, F ffn and V
    vocabulary: stream and norm 2 T D, queries, keys and values T (N + 2 K) H, gate, up and their
    product 3 T F, logits twice 2 R V. The ONNX engine also copies what it attends to, the larger of
    a chunk (scores twice and its context, 2 N T S + 4 S K H) and of single tokens side by side,
    each padded to less than twice its context (4 x 2 P K H). The native engine reads its context in
    place, block by block.

    SmolLM2 with T = 512, R = 32: 512 x (1,152 + 960 + 4,608) + 3,145,728 values, 26 MB; in ONNX
    with S = 8,192 another 75,497,472 + 6,291,456, together 354 MB. Measured: prefilling 8,192
    tokens in chunks of 512 adds 756 MB to the process, of which 377 MB are KV.
    """
    d, h, tokens = decoder.hidden, decoder.head_dim, step.tokens
    values = tokens * (2 * d + (decoder.heads + 2 * decoder.kv_heads) * h + 3 * decoder.ffn)
    values += 2 * step.rows * decoder.vocab
    if precision is Precision.FP32:
        context, kv = decoder.context_tokens, decoder.kv_heads * h
        chunk = 2 * decoder.heads * tokens * context + 4 * context * kv
        values += max(chunk, 4 * 2 * step.pool_tokens * kv)
    return 4 * values


def fit(
    decoder: Decoder,
    footprint: Footprint,
    *,
    device_bytes: int,
    sharding: Sharding | None = None,
) -> Fit:
    """Compute what each rank occupies and whether a useful KV cache is left.

    Raises:
        InvalidRequest: the model cannot be split so.
    """
    sharding = sharding or Sharding()
    # Ranks of one stage hold shares of one size.
    stages: dict[int, Rank] = {}
    ranks: list[Rank] = []
    for part in parts(decoder, sharding):
        if part.stage not in stages:
            stages[part.stage] = _rank(part, footprint, sharding, device_bytes)
        ranks.append(stages[part.stage])
    least = min(rank.kv_tokens_max for rank in ranks)
    return Fit(ranks, fits=least >= footprint.kv_tokens_min(decoder))


def _rank(part: Part, footprint: Footprint, sharding: Sharding, device_bytes: int) -> Rank:
    weights, kv = footprint.weight_bytes(part), footprint.kv_bytes_per_token(part)
    activations = footprint.activation_bytes(part, sharding)
    left = int(device_bytes * USABLE_SHARE) - footprint.resident_bytes(part) - activations
    return Rank(
        weight_bytes=weights,
        kv_bytes_per_token=kv,
        activation_bytes=activations,
        kv_tokens_max=max(0, left // kv),
    )


def require_fit(
    decoder: Decoder,
    footprint: Footprint,
    *,
    device_bytes: int,
    sharding: Sharding | None = None,
) -> Fit:
    """Compute the fit, or refuse with the numbers that would do.

    Raises:
        DoesNotFit: less than a useful KV cache is left.
        InvalidRequest: the model cannot be split so.
    """
    sharding = sharding or Sharding()
    found = fit(decoder, footprint, device_bytes=device_bytes, sharding=sharding)
    if found.fits:
        return found
    tokens = footprint.kv_tokens_min(decoder)
    rank = max(found.ranks, key=lambda each: _used(each, tokens))
    needed = math.ceil(_used(rank, tokens) / USABLE_SHARE)
    raise DoesNotFit(
        f"The model in {footprint.precision} needs {needed:,} bytes a device; "
        f"one has {device_bytes:,}.",
        why=(
            f"Weights take {rank.weight_bytes:,}, a step {rank.activation_bytes:,} and "
            f"{tokens:,} tokens of KV {tokens * rank.kv_bytes_per_token:,}; "
            f"{1 - USABLE_SHARE:.0%} stays free."
        ),
        fix=f"{_remedy(decoder, footprint, device_bytes, sharding)}a device of {needed:,} bytes.",
    )


def _used(rank: Rank, tokens: int) -> int:
    return rank.weight_bytes + rank.activation_bytes + tokens * rank.kv_bytes_per_token


def available_bytes() -> int:
    """Memory that this machine, or the container we run in, can still give.

    Raises:
        InvalidRequest: the system does not say.
    """
    machine = _field(Path("/proc/meminfo"), "MemAvailable:")
    if machine is None:
        raise InvalidRequest(
            "The available memory of this machine is not known.",
            why="/proc/meminfo has no MemAvailable.",
            fix="State it with --device-memory.",
            field="device_memory",
        )
    available = machine * 1024
    group = Path("/sys/fs/cgroup")
    limit = group / "memory.max"
    if limit.is_file() and (text := limit.read_text("ascii").strip()) != "max":
        # File pages that nobody uses count as current, and are given up when asked for.
        idle = _field(group / "memory.stat", "inactive_file") or 0
        current = int((group / "memory.current").read_text("ascii"))
        available = min(available, int(text) - current + idle)
    return available


def _field(path: Path, name: str) -> int | None:
    """The number behind `name` in a file of lines "name number"."""
    if not path.is_file():
        return None
    for line in path.read_text("ascii").splitlines():
        if line.split()[:1] == [name]:
            return int(line.split()[1])
    return None


def _remedy(decoder: Decoder, footprint: Footprint, device_bytes: int, sharding: Sharding) -> str:
    """The smallest change of the split and of precision that fits, as the start of a sentence."""
    offers: list[str] = []
    widest = min(_TP_OFFERED_MAX, RANKS_MAX // (sharding.pp * sharding.cp))
    for tp in range(sharding.tp + 1, widest + 1):
        wider = replace(sharding, tp=tp)
        try:
            if fit(decoder, footprint, device_bytes=device_bytes, sharding=wider).fits:
                offers.append(f"--tp {tp}")
                break
        except InvalidRequest:
            continue
    for narrower in footprint.narrower:
        if fit(decoder, narrower, device_bytes=device_bytes, sharding=sharding).fits:
            offers.append(f"--precision {narrower.precision}")
            break
    return f"Use {', or '.join(offers)}, or " if offers else "Use "
