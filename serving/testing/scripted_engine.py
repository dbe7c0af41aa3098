"""An engine without a model: it writes tokens into KV blocks and answers by a rule.

What it answers depends only on what it reads back from the blocks it is given, as a real engine's
answer does. So a sequence whose blocks were mixed up, freed too early, wrongly shared or not
recomputed gets a wrong answer, and every step also checks that the context it reads was written
for exactly that context.
"""

from collections.abc import Callable, Sequence

import numpy as np

from headrace.serving.engine.base import Limits, Logits, Row
from headrace.serving.errors import EngineFault

Rule = Callable[[Sequence[int]], int]
"""From a sequence so far, prompt and answer, to the likeliest next token."""

_MODULUS = (1 << 61) - 1
_NOTHING: tuple[int, int] = (-1, -1)


def tiny_limits(
    *,
    vocab: int,
    rows_max: int = 4,
    batch_tokens_max: int = 16,
    sequence_tokens_max: int = 256,
    kv_blocks: int = 129,
    kv_block_tokens: int = 4,
) -> Limits:
    """Limits small enough to meet all of them in a test."""
    return Limits(
        rows_max=rows_max,
        batch_tokens_max=batch_tokens_max,
        sequence_tokens_max=sequence_tokens_max,
        kv_blocks=kv_blocks,
        kv_block_tokens=kv_block_tokens,
        vocab=vocab,
    )


def chained(vocab: int) -> Rule:
    """Each token follows from all before it, so that one wrong token changes all that follow."""

    def rule(context: Sequence[int]) -> int:
        return _digest(context) % vocab

    return rule


def scripted(answers: dict[tuple[int, ...], Sequence[int]], *, otherwise: int = 0) -> Rule:
    """Answer given prompts with given tokens, then with `otherwise` for ever."""

    def rule(context: Sequence[int]) -> int:
        for prompt, answer in answers.items():
            done = len(context) - len(prompt)
            if done >= 0 and tuple(context[: len(prompt)]) == prompt:
                return answer[done] if done < len(answer) else otherwise
        return otherwise

    return rule


class ScriptedEngine:
    """Implements Engine. Asserts the contract of every row it is given."""

    def __init__(self, limits: Limits, rule: Rule) -> None:
        self._limits = limits
        self._rule = rule
        size = limits.kv_block_tokens
        # For each position of each block: the token, and the digest of the context it ends.
        self._blocks = [[_NOTHING] * size for _ in range(limits.kv_blocks)]
        self._logits = np.zeros((limits.rows_max, limits.vocab), np.float32)
        self.steps: list[list[Row]] = []
        """Every step's rows as they were given; blocks and tokens are copies."""
        self.fault_at_step: int | None = None
        """The step, counted from 0, that fails; a failed engine stays failed."""
        self.is_closed = False

    @property
    def limits(self) -> Limits:
        return self._limits

    def step(self, rows: Sequence[Row]) -> Logits:
        assert not self.is_closed, "the engine was closed"
        self._check_step(rows)
        number = len(self.steps)
        self.steps.append(
            [Row(tuple(r.token_ids), r.position, tuple(r.block_ids), r.samples) for r in rows]
        )
        if self.fault_at_step is not None and number >= self.fault_at_step:
            raise EngineFault(
                "The device fell off the bus.", why="The test said so.", fix="Restart the replica."
            )
        contexts = [self._run(row) for row in rows]
        sampled = [context for row, context in zip(rows, contexts, strict=True) if row.samples]
        logits = self._logits[: len(sampled)]
        logits.fill(0.0)
        for index, context in enumerate(sampled):
            logits[index, self._rule(context)] = 1.0
        return logits

    def close(self) -> None:
        self.is_closed = True

    def _check_step(self, rows: Sequence[Row]) -> None:
        limits = self._limits
        assert 0 < len(rows) <= limits.rows_max
        assert sum(len(row.token_ids) for row in rows) <= limits.batch_tokens_max
        written: set[int] = set()
        read: set[int] = set()
        for row in rows:
            end = row.position + len(row.token_ids)
            assert row.token_ids, "a row without tokens"
            assert end <= limits.sequence_tokens_max
            assert 0 not in row.block_ids, "block 0 is scratch"
            assert len(row.block_ids) * limits.kv_block_tokens >= end, "too few blocks"
            used = row.block_ids[: -(-end // limits.kv_block_tokens)]
            first = row.position // limits.kv_block_tokens
            mine = set(used[first:])
            assert not mine & written, "two rows write one block"
            written |= mine
            read |= set(used[:first])
        assert not written & read, "a row writes a block that another one reads"

    def _run(self, row: Row) -> list[int]:
        """Read the row's context back, write its tokens; the sequence so far."""
        size = self._limits.kv_block_tokens
        context: list[int] = []
        digest = 0
        for position in range(row.position):
            token, written = self._blocks[row.block_ids[position // size]][position % size]
            digest = _chain(digest, token)
            assert digest == written, f"position {position} was written for another context"
            context.append(token)
        for position, token in enumerate(row.token_ids, row.position):
            assert 0 <= token < self._limits.vocab
            digest = _chain(digest, token)
            self._blocks[row.block_ids[position // size]][position % size] = (token, digest)
            context.append(token)
        return context


def _chain(digest: int, token: int) -> int:
    return (digest * 6_364_136_223_846_793_005 + token + 1) % _MODULUS


def _digest(context: Sequence[int]) -> int:
    digest = 0
    for token in context:
        digest = _chain(digest, token)
    return digest
