"""KV blocks: who holds them, what is kept for later, and what is reused first."""

import pytest

from headrace.serving.engine.block_pool import BlockPool


def taken(pool: BlockPool, count: int) -> list[int]:
    blocks = pool.take(count)
    assert blocks is not None
    return blocks


def test_the_scratch_block_is_never_handed_out() -> None:
    pool = BlockPool(5)

    assert pool.num_blocks == 4
    assert sorted(taken(pool, 4)) == [1, 2, 3, 4]
    assert pool.take(1) is None


def test_too_many_blocks_are_all_refused() -> None:
    """Half of what a sequence needs would only keep others from it."""
    pool = BlockPool(5)

    assert pool.take(5) is None
    assert pool.num_free == 4


def test_a_labelled_block_is_found_again_after_its_holder_has_gone() -> None:
    pool = BlockPool(5)
    block, other = taken(pool, 2)
    pool.label(block, b"prefix")

    pool.release([block, other])

    assert pool.find(b"prefix") == block
    assert pool.num_free == 4
    pool.check([])


def test_a_shared_block_stays_until_its_last_holder_goes() -> None:
    pool = BlockPool(5)
    (block,) = taken(pool, 1)
    pool.label(block, b"prefix")
    pool.share([block])

    pool.release([block])
    pool.check([[block]])
    pool.release([block])

    pool.check([])


def test_a_kept_block_that_is_shared_again_cannot_be_taken() -> None:
    pool = BlockPool(3)
    first, second = taken(pool, 2)
    pool.label(first, b"prefix")
    pool.release([first, second])

    pool.share([first])

    assert pool.take(2) is None
    assert pool.take(1) == [second]


def test_blank_blocks_go_before_kept_ones() -> None:
    pool = BlockPool(4)
    kept, *blank = taken(pool, 3)
    pool.label(kept, b"prefix")
    pool.release([kept, *blank])

    assert sorted(taken(pool, 2)) == sorted(blank)
    assert pool.find(b"prefix") == kept


def test_of_kept_blocks_the_longest_unused_goes_first_and_ends_before_starts() -> None:
    """A sequence's last block is of use to the fewest others, so it counts as older."""
    pool = BlockPool(5)
    old, young = taken(pool, 2), taken(pool, 2)
    for name, block in zip([b"old-0", b"old-1", b"young-0", b"young-1"], old + young, strict=True):
        pool.label(block, name)
    pool.release(old)
    pool.release(young)

    order = [taken(pool, 1)[0] for _ in range(4)]

    assert order == [old[1], old[0], young[1], young[0]]
    assert pool.find(b"old-0") is None


def test_the_first_block_of_a_content_keeps_the_label() -> None:
    """Two sequences may compute one prefix side by side; one copy is enough for later."""
    pool = BlockPool(3)
    first, second = taken(pool, 2)
    pool.label(first, b"prefix")
    pool.label(second, b"prefix")

    pool.release([second])
    pool.release([first])

    assert pool.find(b"prefix") == first
    pool.check([])


def test_a_double_release_is_a_bug_that_shows_at_once() -> None:
    pool = BlockPool(3)
    (block,) = taken(pool, 1)
    pool.release([block])

    with pytest.raises(AssertionError, match="without a holder"):
        pool.release([block])


def test_the_check_notices_a_holder_it_was_not_told_of() -> None:
    pool = BlockPool(3)
    taken(pool, 1)

    with pytest.raises(AssertionError, match="reference counts"):
        pool.check([])
