"""The hash chain over full blocks: equal prefixes of one tenant meet, everything else does not."""

from headrace.serving.engine.block_pool import BlockPool
from headrace.serving.engine.prefix_cache import PrefixChain, resident


def digests(tokens: list[int], salt: bytes = b"tenant", block_tokens: int = 2) -> list[bytes]:
    chain = PrefixChain(salt, block_tokens)
    return [chain.digest(index, tokens) for index in range(len(tokens) // block_tokens)]


def test_equal_prefixes_have_equal_digests() -> None:
    assert digests([1, 2, 3, 4, 5, 6])[:2] == digests([1, 2, 3, 4, 9, 9])[:2]
    assert digests([1, 2, 3, 4, 5, 6])[2] != digests([1, 2, 3, 4, 9, 9])[2]


def test_a_block_counts_only_behind_the_same_blocks() -> None:
    """The KV of [3, 4] after [1, 2] is not the KV of [3, 4] after [7, 8]."""
    assert digests([1, 2, 3, 4])[1] != digests([7, 8, 3, 4])[1]
    assert digests([1, 2, 1, 2])[0] != digests([1, 2, 1, 2])[1]


def test_tenants_never_share() -> None:
    assert digests([1, 2], salt=b"tenant-a") != digests([1, 2], salt=b"tenant-b")


def test_tokens_are_hashed_as_numbers_of_fixed_width() -> None:
    """[1, 23] and [12, 3] read the same when written one after the other."""
    assert digests([1, 23]) != digests([12, 3])
    assert digests([1, 2, 3, 4], block_tokens=2)[:1] != digests([1, 2, 3, 4], block_tokens=4)


def test_a_chain_grows_with_its_sequence() -> None:
    tokens = [1, 2]
    chain = PrefixChain(b"tenant", 2)
    chain.digest(0, tokens)
    tokens += [3, 4]

    assert chain.digest(1, tokens) == digests([1, 2, 3, 4])[1]


def test_the_resident_prefix_ends_at_the_first_gap() -> None:
    """Block 2 without block 1 is of no use."""
    pool = BlockPool(4)
    tokens = [1, 2, 3, 4, 5, 6]
    blocks = pool.take(3)
    assert blocks is not None
    names = digests(tokens)
    pool.label(blocks[0], names[0])
    pool.label(blocks[2], names[2])

    chain = PrefixChain(b"tenant", 2)

    assert resident(pool, chain, tokens, most=3) == blocks[:1]
    assert resident(pool, chain, tokens, most=0) == []
