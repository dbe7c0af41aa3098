"""KV blocks: free, held, or shared by reference count.

A block is in one of three states. *Held*: at least one sequence uses it. *Kept*: nobody does, but
it carries the label of what it contains, so a later sequence may take it up again. *Blank*:
nobody does and its content is of no use. `take` hands out blank blocks first and then the kept
one that was let go longest ago, which loses its label.

Block 0 is never handed out: engines of fixed shape write the padding of a step there.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence

SCRATCH_BLOCK = 0


class BlockPool:
    """The blocks of one engine's KV cache. Owned by the engine's thread.

    A label is the digest of everything the model has seen up to the end of the block, so two
    blocks with one label have the same content; the pool then keeps the first.
    """

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks > 1, "one block is scratch, so one alone holds nothing"
        self._blank = list(range(num_blocks - 1, SCRATCH_BLOCK, -1))
        self._kept: OrderedDict[int, None] = OrderedDict()
        self._holders = [0] * num_blocks
        self._label_of: list[bytes | None] = [None] * num_blocks
        self._labelled: dict[bytes, int] = {}
        self.num_blocks = num_blocks - 1
        """Blocks that sequences can have: all but the scratch block."""

    @property
    def num_free(self) -> int:
        """Blocks that `take` could hand out now, kept ones included."""
        return len(self._blank) + len(self._kept)

    def take(self, num_blocks: int) -> list[int] | None:
        """Hand out blocks to one holder, or None when there are too few."""
        if num_blocks > self.num_free:
            return None
        taken: list[int] = []
        for _ in range(num_blocks):
            block = self._blank.pop() if self._blank else self._evict()
            self._holders[block] = 1
            taken.append(block)
        return taken

    def num_alone(self, blocks: Iterable[int]) -> int:
        """How many of these held blocks have no other holder: what releasing them would free."""
        return sum(self._holders[block] == 1 for block in blocks)

    def share(self, blocks: Iterable[int]) -> None:
        """Add a holder to each block; kept ones are held again."""
        for block in blocks:
            if self._holders[block] == 0:
                del self._kept[block]
            self._holders[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Take one holder from each of a sequence's blocks, given in order.

        The last blocks count as let go first: the start of a prefix is of use to more sequences
        than its end, and the end is unreachable without the start.
        """
        for block in reversed(blocks):
            assert self._holders[block] > 0, f"block {block} is released without a holder"
            self._holders[block] -= 1
            if self._holders[block] == 0:
                if self._label_of[block] is None:
                    self._blank.append(block)
                else:
                    self._kept[block] = None

    def label(self, block: int, digest: bytes) -> bool:
        """Say what a held, completely written block contains. The first block of a label stays.

        Returns whether it is that one: it can be found until it is taken again.
        """
        assert self._holders[block] > 0, f"block {block} is labelled without a holder"
        assert self._label_of[block] is None, f"block {block} is labelled twice"
        if digest not in self._labelled:
            self._labelled[digest] = block
            self._label_of[block] = digest
            return True
        return False

    def find(self, digest: bytes) -> int | None:
        """The held or kept block with this content."""
        return self._labelled.get(digest)

    def check(self, held: Iterable[Sequence[int]]) -> None:
        """Assert that nothing is lost, doubled or miscounted.

        Args:
            held: the blocks of each sequence that has any.
        """
        holders = [0] * len(self._holders)
        for blocks in held:
            assert len(set(blocks)) == len(blocks), "a sequence holds a block twice"
            for block in blocks:
                holders[block] += 1
        assert holders == self._holders, "reference counts differ from the sequences' blocks"
        assert holders[SCRATCH_BLOCK] == 0, "the scratch block was handed out"
        in_use = [block for block, count in enumerate(holders) if count]
        everything = sorted([SCRATCH_BLOCK, *in_use, *self._blank, *self._kept])
        assert everything == list(range(len(holders))), "a block is lost or in two places"
        labels = {digest: block for block, digest in enumerate(self._label_of) if digest}
        assert labels == self._labelled, "labels and blocks disagree"
        assert all(self._label_of[block] for block in self._kept), "a kept block has no label"
        assert not any(self._label_of[block] for block in self._blank), "a blank block has a label"

    def _evict(self) -> int:
        block, _ = self._kept.popitem(last=False)
        digest = self._label_of[block]
        assert digest is not None, "only labelled blocks are kept"
        del self._labelled[digest]
        self._label_of[block] = None
        return block
