"""A decoder of whole numbers: what it answers depends on every key and value it reads.

It has the inputs and outputs of a plan (`serving/engine/plan_io.py`) and the algebra of nothing: a
hidden state is hashed into keys and values, and what attention reads of the caches is summed with
weights that depend on the place, so that a key at the wrong place, of another row, of padding or
never written changes the logits. Whole numbers make that exact: rows are the same alone or in a
batch, and a prompt in one piece or many.

Shapes as in `plan_io.py`. All arithmetic is modulo 2^14, so that no value is a bf16 NaN.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

States = npt.NDArray[np.uint16]
Longs = npt.NDArray[np.int64]

MODULUS = 1 << 14

_NAN_BITS = 0x7F80
"""A bf16 whose exponent is all ones is infinite or NaN."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeDecoder:
    """The facts of one; a rank computes the layers of its stage."""

    vocab: int
    hidden: int
    kv_heads: int
    head_dim: int

    def embed(self, ids: Longs) -> States:
        """(B, T) to (B, T, D)."""
        return _mixed(ids[..., None] * 7919 + np.arange(self.hidden) * 104_729 + 13)

    def layer(
        self,
        index: int,
        states: States,
        starts: Longs,
        lengths: Longs,
        caches: Mapping[str, States],
    ) -> States:
        """Write the rows' keys and values from `starts` on, attend, and return the next states.

        `caches` has "k" and "v", (B, K, S, H), which are written in place.
        """
        rows, tokens, _ = states.shape
        positions = starts[:, None] + np.arange(tokens)
        read = np.zeros((rows, tokens, self.head_dim), np.int64)
        for salt, kind in enumerate("kv"):
            cache = caches[kind]
            fresh = self._projected(states, salt + 2 * index)
            for row in range(rows):
                cache[row, :, positions[row]] = fresh[row]
            assert not ((cache & _NAN_BITS) == _NAN_BITS).any(), "a masked NaN poisons its row"
            places = np.arange(cache.shape[2])
            seen = (places <= positions[..., None]) & (places < lengths[:, None, None])
            weights = seen * (places * 2 + 3 + salt)
            read += np.einsum("bts,bksh->bth", weights, cache.astype(np.int64))
        spread = np.resize(np.arange(self.head_dim), self.hidden)
        return _mixed(states.astype(np.int64) * 31 + read[..., spread] * 17 + index)

    def logits(self, states: States) -> npt.NDArray[np.float32]:
        """(B, D) to (B, V)."""
        summed = (states.astype(np.int64) * (np.arange(self.hidden) * 2 + 1)).sum(axis=-1)
        return _mixed(summed[:, None] * 40_503 + np.arange(self.vocab) * 9973).astype(np.float32)

    def reference(self, token_ids: list[int], *, layers: int) -> npt.NDArray[np.float32]:
        """Logits (T, V) of every position of one sequence, in one piece, with caches of its own."""
        ids = np.array([token_ids], np.int64)
        tokens = ids.shape[1]
        starts, lengths = np.zeros(1, np.int64), np.array([tokens])
        states = self.embed(ids)
        for index in range(layers):
            shape = (1, self.kv_heads, tokens, self.head_dim)
            caches = {kind: np.zeros(shape, np.uint16) for kind in "kv"}
            states = self.layer(index, states, starts, lengths, caches)
        return self.logits(states[0])

    def _projected(self, states: States, salt: int) -> States:
        """(B, T, D) to (B, T, K, H)."""
        summed = (states.astype(np.int64) * (np.arange(self.hidden) + 1)).sum(axis=-1)
        heads = np.arange(self.kv_heads)[:, None] * 577 + np.arange(self.head_dim) * 331
        return _mixed(summed[..., None, None] * 613 + heads + salt * 5009)


def _mixed(values: Longs) -> States:
    """Scatter whole numbers over [0, 2^14)."""
    wide = (values.astype(np.uint64) * np.uint64(0x9E37_79B9_7F4A_7C15)) >> np.uint64(40)
    return (wide % np.uint64(MODULUS)).astype(np.uint16)
