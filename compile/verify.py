"""The built engine against the reference: the same texts, every position, then the tolerance.

The engine is stepped as serving steps it: all texts side by side, one token a step, which checks
decoding and batching, and then each text again in two chunks, which checks prefill. What is
measured goes into the manifest; outside the tolerance the artifact is never written.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np

from headrace.compile.host import fingerprint
from headrace.compile.targets import CPU
from headrace.compile.tensors import Array
from headrace.serving.domain.artifact import Precision, Verification, VerifyMethod
from headrace.serving.engine.base import Engine, Row
from headrace.serving.engine.block_pool import SCRATCH_BLOCK
from headrace.serving.errors import OutsideTolerance

TEXT_TOKENS_MAX = 96
"""Of each text; eight of them make 768 positions, a second or two of stepping."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """How far a precision may stray."""

    logit_error_max: float
    """Root mean square of the logits' difference, relative to the reference's own spread (the
    standard deviation of its logits), so that it means the same for every model."""
    top1_min: float
    """Share of positions with the same likeliest token. Asked of trained models only: in random
    weights the likeliest tokens differ by less than any rounding, so `applies_top1`."""
    perplexity_delta_max: float
    """Relative, either way."""

    def __str__(self) -> str:
        return (
            f"logit error ≤ {self.logit_error_max:g} of their spread, "
            f"top-1 ≥ {self.top1_min:g} (trained models), "
            f"perplexity within {self.perplexity_delta_max:.2%}"
        )


# Measured: SmolLM2-135M has a logit error of 3e-6 in fp32, 0.10 in int8 (top-1 95 %, perplexity
# +2.4 %) and 0.07 in int4, which its Q4_1 weights fit exactly. Random Gaussian weights, the worst
# case of a block's four bits, have 0.04 to 0.09 in int8 and 0.28 to 0.56 in int4. TensorRT's
# networks of it, computed in their own types, have 0.05 in bf16 (top-1 96 %, perplexity +0.2 %;
# transformers in bf16 has 0.045), 0.18 with FP8 weights, a scale a row (91 %, +3 %), 0.29 with FP8
# inputs too (87 %, +2 %) and 0.59 in symmetric int4 with blocks of 64 and 128 (74 %, +20 %), which
# is coarse for so small a model. A computation that is wrong (another rotation, a missing bias) is
# near 1: logits that are merely unrelated have 1.41.
TOLERANCES: Mapping[Precision, Tolerance] = {
    Precision.FP32: Tolerance(logit_error_max=1e-4, top1_min=0.995, perplexity_delta_max=1e-4),
    Precision.INT8: Tolerance(logit_error_max=0.20, top1_min=0.90, perplexity_delta_max=0.05),
    Precision.INT4: Tolerance(logit_error_max=0.65, top1_min=0.80, perplexity_delta_max=0.15),
    Precision.BF16: Tolerance(logit_error_max=0.10, top1_min=0.93, perplexity_delta_max=0.02),
    Precision.FP8: Tolerance(logit_error_max=0.45, top1_min=0.80, perplexity_delta_max=0.10),
}

TENSORRT_INT4 = Tolerance(logit_error_max=0.85, top1_min=0.65, perplexity_delta_max=0.30)
"""TensorRT multiplies symmetric codes by a scale; the engines of `cpu` have a minimum as well."""


def tolerance(precision: Precision, target: str) -> Tolerance:
    """How far an engine of the target may stray."""
    if precision is Precision.INT4 and target != CPU:
        return TENSORRT_INT4
    return TOLERANCES[precision]


@dataclass(slots=True)
class _Tally:
    """Sums over positions, kept in float64."""

    positions: int = 0
    agreeing: int = 0
    largest: float = 0.0
    error_squares: float = 0.0
    spread_squares: float = 0.0
    predicted: int = 0
    surprise: float = 0.0
    surprise_reference: float = 0.0

    def add(self, ours: Array, reference: Array, prompt: Sequence[int]) -> None:
        """Take one text's logits, (tokens, vocab) both."""
        difference = ours.astype(np.float64) - reference
        self.positions += len(ours)
        self.agreeing += int((ours.argmax(axis=1) == reference.argmax(axis=1)).sum())
        self.largest = max(self.largest, float(np.abs(difference).max()))
        self.error_squares += float(np.square(difference).mean(axis=1).sum())
        self.spread_squares += float(reference.astype(np.float64).var(axis=1).sum())
        following = np.asarray(prompt[1:])
        self.predicted += len(following)
        self.surprise += _surprise(ours[:-1], following)
        self.surprise_reference += _surprise(reference[:-1], following)


def verify(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    references: Iterable[Array],
    *,
    precision: Precision,
    reference: str,
    target: str = CPU,
    device: str = "cpu",
) -> Verification:
    """Compare the engine with the reference on `prompts`.

    Args:
        engine: loaded; for as many rows as there are prompts, or they take turns.
        prompts: token ids, each of 2 to `TEXT_TOKENS_MAX`.
        references: (tokens, vocab) float32 for each prompt.
        precision: whose tolerance applies, with `target`.
        reference: what it is compared with, for the record.
        target: what it was built for.
        device: what it runs on, for the record.

    Raises:
        OutsideTolerance: the engine differs more than its precision may.
    """
    return compare(
        step_through(engine, prompts),
        prompts,
        references,
        precision=precision,
        reference=reference,
        method=VerifyMethod.ENGINE,
        target=target,
        device=device,
    )


@dataclass(frozen=True, slots=True, eq=False)
class Stepped:
    """What an engine made of the prompts."""

    decoded: Sequence[Array]
    """Of each prompt, (tokens, vocab) float32, stepped side by side, a token at a time."""
    chunked: Sequence[Array]
    """Of each prompt's last position, (vocab,), stepped in two chunks."""


def step_through(engine: Engine, prompts: Sequence[Sequence[int]]) -> Stepped:
    """Step the engine as serving would; see `verify`."""
    return Stepped(_decode(engine, prompts), _prefill(engine, prompts))


def compare(
    stepped: Stepped,
    prompts: Sequence[Sequence[int]],
    references: Iterable[Array],
    *,
    precision: Precision,
    reference: str,
    method: VerifyMethod,
    target: str,
    device: str = "cpu",
) -> Verification:
    """Judge logits that were stepped before, perhaps in another process; see `verify`.

    Raises:
        OutsideTolerance: they differ more than their precision may.
    """
    within = tolerance(precision, target)
    tally = _Tally()
    for logits, last, expected, prompt in zip(
        stepped.decoded, stepped.chunked, references, prompts, strict=True
    ):
        tally.add(logits, expected, prompt)
        tally.largest = max(tally.largest, float(np.abs(last - expected[-1]).max()))
        tally.error_squares += float(np.square(last - expected[-1]).mean())
        tally.spread_squares += float(expected[-1].var())
    found = Verification(
        reference=reference,
        tokens=tally.positions,
        max_abs_error=tally.largest,
        logit_error=math.sqrt(tally.error_squares / max(tally.spread_squares, 1e-30)),
        top1_agreement=tally.agreeing / tally.positions,
        perplexity=math.exp(tally.surprise / tally.predicted),
        perplexity_reference=math.exp(tally.surprise_reference / tally.predicted),
        tolerance=str(within),
        method=method,
        host=f"{fingerprint()} {device}",
        verified_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    _require(found, within, precision, vocab=stepped.chunked[0].shape[-1])
    return found


def applies_top1(perplexity: float, *, vocab: int) -> bool:
    """Whether a model knows enough for its likeliest token to mean something.

    Random weights have a perplexity near the vocabulary's size; trained ones are far below.
    """
    return perplexity < vocab / 4


def _require(found: Verification, within: Tolerance, precision: Precision, *, vocab: int) -> None:
    trained = applies_top1(found.perplexity_reference, vocab=vocab)
    numbers = (found.logit_error, found.perplexity, found.perplexity_reference)
    accepted = (
        all(math.isfinite(number) for number in numbers)
        and found.logit_error <= within.logit_error_max
        and abs(found.perplexity_delta) <= within.perplexity_delta_max
        and (not trained or found.top1_agreement >= within.top1_min)
    )
    if accepted:
        return
    raise OutsideTolerance(
        f"The {precision} engine differs from {found.reference}: logit error "
        f"{found.logit_error:.3g}, top-1 {found.top1_agreement:.1%}, perplexity "
        f"{found.perplexity:.4g} against {found.perplexity_reference:.4g}.",
        why=f"The tolerance is {within}; nothing was written.",
        fix="Choose a wider precision, or report the model: its family may be computed wrongly.",
    )


def _surprise(logits: Array, following: np.ndarray) -> float:
    """Sum of -ln p(token) over positions."""
    wide = logits.astype(np.float64)
    top = wide.max(axis=1, keepdims=True)
    normaliser = top[:, 0] + np.log(np.exp(wide - top).sum(axis=1))
    return float((normaliser - wide[np.arange(len(following)), following]).sum())


def _blocks(engine: Engine, index: int) -> list[int]:
    """The KV blocks of one text; texts lie one after the other, behind the scratch block."""
    each = -(-TEXT_TOKENS_MAX // engine.limits.kv_block_tokens)
    first = SCRATCH_BLOCK + 1 + index % engine.limits.rows_max * each
    return list(range(first, first + each))


def _decode(engine: Engine, prompts: Sequence[Sequence[int]]) -> list[Array]:
    """All texts side by side, as many as the engine takes: logits of every position of each."""
    rows_max = engine.limits.rows_max
    groups = (prompts[at : at + rows_max] for at in range(0, len(prompts), rows_max))
    return [logits for group in groups for logits in _decode_group(engine, group)]


def _decode_group(engine: Engine, prompts: Sequence[Sequence[int]]) -> list[Array]:
    """Token by token."""
    logits = [np.empty((len(prompt), engine.limits.vocab), np.float32) for prompt in prompts]
    for position in range(max(map(len, prompts))):
        alive = [index for index, prompt in enumerate(prompts) if position < len(prompt)]
        rows = [
            Row((prompts[index][position],), position, _blocks(engine, index), samples=True)
            for index in alive
        ]
        for index, row in zip(alive, engine.step(rows), strict=True):
            logits[index][position] = row
    return logits


def _prefill(engine: Engine, prompts: Sequence[Sequence[int]]) -> list[Array]:
    """Each text in two chunks of its own: logits of its last position."""
    last: list[Array] = []
    for index, prompt in enumerate(prompts):
        blocks, half = _blocks(engine, index), len(prompt) // 2
        engine.step([Row(prompt[:half], 0, blocks, samples=False)])
        rows = engine.step([Row(prompt[half:], half, blocks, samples=True)])
        last.append(rows[0].copy())
    return last
