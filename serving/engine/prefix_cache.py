"""Which prefixes are resident: a hash chain over full blocks.

The digest of a block covers its own tokens and, through its predecessor's digest, everything
before it:

    digest[i] = BLAKE2b-256(digest[i - 1] + tokens[i * B : (i + 1) * B] as int32)
    digest[-1] = BLAKE2b-256(salt)

so one comparison per block finds the longest resident prefix. The chain starts at the tenant's
salt: no tenant can reach, or time, what another's prompt left behind. The digest is
cryptographic because a chosen collision would read another prompt's cache.
"""

from array import array
from collections.abc import Sequence
from hashlib import blake2b

from headrace.serving.engine.block_pool import BlockPool

DIGEST_BYTES = 32


class PrefixChain:
    """The digests of one sequence's full blocks, extended as the sequence grows."""

    __slots__ = ("_block_tokens", "_digests", "_root")

    def __init__(self, salt: bytes, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._root = blake2b(salt, digest_size=DIGEST_BYTES, person=b"headrace-kv").digest()
        self._digests: list[bytes] = []

    def digest(self, index: int, token_ids: Sequence[int]) -> bytes:
        """The digest of block `index`, whose tokens and all before them are in `token_ids`."""
        digests = self._digests
        size = self._block_tokens
        while len(digests) <= index:
            first = len(digests) * size
            tokens = array("i", token_ids[first : first + size])
            assert len(tokens) == size, "only full blocks have a digest"
            before = digests[-1] if digests else self._root
            digests.append(blake2b(before + tokens.tobytes(), digest_size=DIGEST_BYTES).digest())
        return digests[index]


def resident(
    pool: BlockPool, chain: PrefixChain, token_ids: Sequence[int], *, most: int
) -> list[int]:
    """The blocks of the longest resident prefix, at most `most`; nobody holds them yet by this."""
    blocks: list[int] = []
    for index in range(most):
        block = pool.find(chain.digest(index, token_ids))
        if block is None:
            break
        blocks.append(block)
    return blocks
