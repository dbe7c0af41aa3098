"""The measurement itself, on an engine whose every logit is known."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import numpy as np
import pytest

from headrace.compile.host import fingerprint
from headrace.compile.tensors import Array
from headrace.compile.verify import verify
from headrace.serving.domain.artifact import Precision, Verification, VerifyMethod
from headrace.serving.engine.base import Limits, Logits, Row
from headrace.serving.errors import OutsideTolerance

VOCAB = 8
PROMPTS = [[1, 2, 3, 4, 5, 6], [3, 1, 4, 1]]


def expected(prompt: Sequence[int], *, sureness: float) -> Array:
    """A model that expects the token after this one, and nothing else."""
    logits = np.zeros((len(prompt), VOCAB), np.float32)
    logits[np.arange(len(prompt)), (np.asarray(prompt) + 1) % VOCAB] = sureness
    return logits


@dataclass
class CountingEngine:
    """Computes that model, with an error of its own on one token."""

    sureness: float
    wrong_after: int | None = None
    rows_max: int = 8

    @property
    def limits(self) -> Limits:
        return Limits(
            rows_max=self.rows_max,
            batch_tokens_max=96,
            sequence_tokens_max=96,
            kv_blocks=48,
            kv_block_tokens=16,
            vocab=VOCAB,
        )

    def step(self, rows: Sequence[Row]) -> Logits:
        blocks_max = self.rows_max * 96 // 16
        assert len(rows) <= self.rows_max
        assert all(1 <= block <= blocks_max for row in rows for block in row.block_ids)
        found = [
            expected(row.token_ids[-1:], sureness=self.sureness)[0] for row in rows if row.samples
        ]
        for row, logits in zip((row for row in rows if row.samples), found, strict=True):
            if row.token_ids[-1] == self.wrong_after:
                logits[0] = self.sureness + 1
        return np.asarray(found, np.float32).reshape(len(found), VOCAB)

    def close(self) -> None: ...


def measured(engine: CountingEngine, *, reference_sureness: float = 6.0) -> Verification:
    references = [expected(prompt, sureness=reference_sureness) for prompt in PROMPTS]
    return verify(
        engine, PROMPTS, references, precision=Precision.FP32, reference="a counting model"
    )


def test_an_exact_engine_has_no_error() -> None:
    found = measured(CountingEngine(sureness=6.0))

    assert found.tokens == 10
    assert found.max_abs_error == 0
    assert found.top1_agreement == 1.0
    assert found.perplexity == found.perplexity_reference


def test_texts_take_turns_where_an_engine_takes_one() -> None:
    """A device may have memory for one of the longest sequences, and no more."""
    assert measured(CountingEngine(sureness=6.0, rows_max=1)).tokens == 10


def test_it_is_said_what_was_run_and_by_whom_and_when() -> None:
    found = measured(CountingEngine(sureness=6.0))

    assert found.method is VerifyMethod.ENGINE
    assert found.host == f"{fingerprint()} cpu"
    assert datetime.fromisoformat(found.verified_at).utcoffset() == timedelta(0)


def test_perplexity_is_that_of_the_next_token() -> None:
    """Five of eight predictions are right: 1 -> 2 ... 5 -> 6; 3 -> 1, 1 -> 4 and 4 -> 1 are not.

    With one logit of 6 and seven of 0, a hit costs ln(e^6 + 7) - 6, a miss ln(e^6 + 7).
    """
    found = measured(CountingEngine(sureness=6.0))

    normaliser = math.log(math.exp(6) + 7)
    assert found.perplexity == pytest.approx(math.exp(normaliser - 6 * 5 / 8))


def test_one_wrong_token_is_seen() -> None:
    """Token 4 stands at 2 of 10 positions, so that agreement is 80 %."""
    with pytest.raises(OutsideTolerance, match=r"top-1 80\.0%"):
        measured(CountingEngine(sureness=6.0, wrong_after=4))


def test_a_model_that_is_merely_less_sure_is_refused() -> None:
    """Every likeliest token is right and the perplexity is not."""
    with pytest.raises(OutsideTolerance, match=r"top-1 100\.0%"):
        measured(CountingEngine(sureness=5.0))


def test_numbers_that_are_not_finite_are_refused() -> None:
    with pytest.raises(OutsideTolerance):
        measured(CountingEngine(sureness=math.nan))
