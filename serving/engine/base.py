"""What an engine is to the loop that steps it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the engine was loaded for."""

    rows_max: int
    """Sequences one step may advance."""
    batch_tokens_max: int
    """Tokens one step may take, over all rows."""
    sequence_tokens_max: int
    """The longest sequence, prompt and answer together."""
    kv_blocks: int
    """Blocks in the KV pool, over all sequences."""
    kv_block_tokens: int
    vocab: int


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence's share of a step."""

    token_ids: Sequence[int]
    """Tokens to feed now: a chunk of the prompt, or the one token sampled last."""
    position: int
    """Index of `token_ids[0]` in the sequence; earlier positions are in the KV cache."""
    block_ids: Sequence[int]
    """The sequence's KV blocks in order; they cover position + len(token_ids) tokens. Leading
    blocks may be shared with other rows: a step writes only from `position` on."""
    samples: bool
    """True: the logits of the row's last token are wanted."""


class Engine(Protocol):
    """One compiled model, advanced a step at a time.

    One thread owns an engine and calls never overlap, so implementations need no locks. The KV
    cache is a pool of `kv_blocks` blocks that the caller hands out; a block keeps its content
    until it is written again.
    """

    @property
    def limits(self) -> Limits: ...

    def step(self, rows: Sequence[Row]) -> Logits:
        """Run one forward pass.

        Args:
            rows: at most `limits.rows_max`, whose tokens sum to at most
                `limits.batch_tokens_max`.

        Returns:
            (rows that sample, vocab) float32, in the order of `rows`; C-contiguous, valid until
            the next call.

        Raises:
            EngineFault: the device failed. The engine is not usable afterwards and the replica
                must exit; no row has been advanced.
        """
        ...

    def close(self) -> None:
        """Free the device. Idempotent."""
        ...
