"""What a model occupies on a device, before anything is built.

    weights     = sum of every tensor's values x bytes each, scales included
    KV a token  = 2 x layers x KV heads x head_dim x bytes a value
    activations = what one step of T tokens and R rows keeps at once, see `activation_bytes`
    KV tokens   = (device x 0.9 - weights - activations) / KV a token

Worked for SmolLM2-135M (30 layers, hidden 576, 9 and 3 heads of 64, ffn 1536, vocabulary 49,152,
tied; the config in its checkpoint): 134,515,008 parameters, so fp32 weights take 538,060,160 bytes
with the 32 RoPE frequencies; a token keeps 2 x 30 x 3 x 64 = 11,520 values, in fp32 46,080 bytes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from headrace.compile.quantize import file_layout, source_shapes
from headrace.serving.domain.artifact import Decoder, Precision
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
"""Bytes of one number in the KV cache of the engine that serves the precision."""

SHARDS_MAX = 64
_ITEM_BYTES = {"F32": 4, "F16": 2, "I8": 1, "U8": 1}


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


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSize:
    """How large a step the device must have room for; the engines' own defaults."""

    rows: int = 32
    tokens: int = 512
    pool_tokens: int = 32_768
    """Of the KV pool: no more context than that can be in use."""


def weight_bytes(decoder: Decoder, precision: Precision) -> int:
    """Bytes of the weights in the form that `precision` stores."""
    if precision is Precision.FP32:
        return 4 * sum(math.prod(shape) for shape in source_shapes(decoder).values())
    layout = file_layout(decoder, precision).values()
    return sum(math.prod(shape) * _ITEM_BYTES[kind] for kind, shape in layout)


def kv_bytes_per_token(decoder: Decoder, precision: Precision) -> int:
    return decoder.kv_values_per_token * KV_VALUE_BYTES[precision]


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


def shard(decoder: Decoder, shards: int) -> Decoder:
    """One rank's part under tensor parallelism: heads, ffn and vocabulary split, the rest whole.

    KV heads that are fewer than shards are held by several ranks.

    Raises:
        InvalidRequest: the heads or the ffn do not divide.
    """
    kv = decoder.kv_heads
    divides = shards > 0 and decoder.heads % shards == 0 and decoder.ffn % shards == 0
    if not divides or (kv % shards and shards % kv):
        raise InvalidRequest(
            f"The model cannot be split into {shards} shards.",
            why=f"It has {decoder.heads} heads, {kv} KV heads and an ffn of {decoder.ffn}.",
            fix="Choose a number of shards that divides all three, or that its KV heads divide.",
            field="shards",
        )
    return replace(
        decoder,
        heads=decoder.heads // shards,
        kv_heads=max(1, kv // shards),
        ffn=decoder.ffn // shards,
        vocab=-(-decoder.vocab // shards),
    )


def fit(
    decoder: Decoder,
    precision: Precision,
    *,
    device_bytes: int,
    shards: int = 1,
    step: StepSize | None = None,
) -> Fit:
    """Compute what each rank occupies and whether a useful KV cache is left.

    Raises:
        InvalidRequest: the model cannot be split so.
    """
    part = shard(decoder, shards)
    weights = weight_bytes(part, precision)
    kv = kv_bytes_per_token(part, precision)
    activations = activation_bytes(part, precision, step or StepSize())
    tokens = max(0, (int(device_bytes * USABLE_SHARE) - weights - activations) // kv)
    rank = Rank(
        weight_bytes=weights,
        kv_bytes_per_token=kv,
        activation_bytes=activations,
        kv_tokens_max=tokens,
    )
    return Fit([rank] * shards, fits=tokens >= _tokens_needed(decoder))


def require_fit(
    decoder: Decoder, precision: Precision, *, device_bytes: int, shards: int = 1
) -> Fit:
    """Compute the fit, or refuse with the numbers that would do.

    Raises:
        DoesNotFit: less than a useful KV cache is left.
        InvalidRequest: the model cannot be split so.
    """
    found = fit(decoder, precision, device_bytes=device_bytes, shards=shards)
    if found.fits:
        return found
    rank, tokens = found.ranks[0], _tokens_needed(decoder)
    used = rank.weight_bytes + rank.activation_bytes + tokens * rank.kv_bytes_per_token
    needed = math.ceil(used / USABLE_SHARE)
    raise DoesNotFit(
        f"The model in {precision} needs {needed:,} bytes a device; one has {device_bytes:,}.",
        why=(
            f"Weights take {rank.weight_bytes:,}, a step {rank.activation_bytes:,} and "
            f"{tokens:,} tokens of KV {tokens * rank.kv_bytes_per_token:,}; "
            f"{1 - USABLE_SHARE:.0%} stays free."
        ),
        fix=f"{_remedy(decoder, precision, device_bytes, shards)}a device of {needed:,} bytes.",
    )


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


def _tokens_needed(decoder: Decoder) -> int:
    return min(KV_TOKENS_MIN, decoder.context_tokens)


def _remedy(decoder: Decoder, precision: Precision, device_bytes: int, shards: int) -> str:
    """The smallest change of shards and of precision that fits, as the start of a sentence."""
    offers: list[str] = []
    for more in range(shards + 1, SHARDS_MAX + 1):
        try:
            if fit(decoder, precision, device_bytes=device_bytes, shards=more).fits:
                offers.append(f"--shards {more}")
                break
        except InvalidRequest:
            continue
    for narrower in (Precision.INT8, Precision.INT4):
        smaller = weight_bytes(decoder, narrower) < weight_bytes(decoder, precision)
        fits = fit(decoder, narrower, device_bytes=device_bytes, shards=shards).fits
        if smaller and fits:
            offers.append(f"--precision {narrower}")
            break
    return f"Use {', or '.join(offers)}, or " if offers else "Use "
