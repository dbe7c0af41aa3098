"""How a manifest states the content of a file.

A short file has the SHA-256 of its content, in hex. SHA-256 is one stream and so one core's work,
1.45 GB/s measured: 11 s for a plan of 16 GB. A file longer than one part therefore has a tree of
two levels: every part of 64 MiB is hashed by itself, and the digest is the SHA-256 over the parts'
digests in their order. It says `tree:` in front, so that neither form passes for the other.
"""

from collections.abc import Iterable
from hashlib import sha256

PART_BYTES = 64 * 2**20
"""Also what a remote store keeps as one object."""
TREE = "tree:"


def is_tree(stated: str) -> bool:
    return stated.startswith(TREE)


def tree_digest(parts: Iterable[bytes]) -> str:
    """The digest of a file whose parts have these SHA-256s, of 32 bytes each."""
    return TREE + sha256(b"".join(parts)).hexdigest()


def fits(content: bytes, stated: str) -> bool:
    """Whether a file of this content is what was stated."""
    if not is_tree(stated):
        return sha256(content).hexdigest() == stated
    cuts = range(0, len(content), PART_BYTES)
    return tree_digest(sha256(content[at : at + PART_BYTES]).digest() for at in cuts) == stated
