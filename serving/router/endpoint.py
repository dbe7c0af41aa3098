"""What a frontend knows of a replica, and how old that is."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from headrace.serving.domain.tier import Tier

PREFIX_BLOCK_TOKENS = 16
"""Granularity of the estimate of what a replica's prefix cache holds."""

PREFIX_BLOCKS_MAX = 4096
"""Blocks remembered for each replica: 64 Ki tokens, twice the default KV pool. About 0.5 MB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaFacts:
    """What a replica says of itself once."""

    replica_id: str
    address: str
    model: str
    version: str
    ready: bool
    context_tokens: int
    precision: str = ""
    family: str = ""
    artifact_path: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TierLoad:
    """What waits for admission in one tier, and how fast that goes."""

    waiting: int = 0
    pending_tokens: int = 0
    """Of all that wait."""
    ahead_tokens: int = 0
    """Of those that a newcomer waits for."""
    tokens_per_s: float = 0.0
    """Prompt tokens admitted lately while something of the tier waited."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaLoad:
    """What a replica says of itself with each step."""

    running: int = 0
    waiting: int = 0
    pending_tokens: int = 0
    """Prompt tokens not yet computed, of running and waiting sequences."""
    rows_max: int = 1
    draining: bool = False
    prompt_tokens_per_s: float = 0.0
    """Prompt tokens that can be computed beside what runs; 0: not said."""
    tiers: Mapping[Tier, TierLoad] = field(default_factory=dict[Tier, TierLoad])
    """Tiers in which something waits."""


class PrefixMemory:
    """An estimate of which prompt prefixes a replica has resident; least recently used goes first.

    It is a guess on purpose: the replica's own cache decides, and what it really reused comes back
    as cached tokens. A wrong guess costs a computation, never a wrong answer.
    """

    def __init__(self, *, blocks_max: int = PREFIX_BLOCKS_MAX) -> None:
        self._blocks_max = blocks_max
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def matched_tokens(self, chain: Sequence[int]) -> int:
        """Tokens of the longest remembered prefix; `chain` comes from `prefix_chain`."""
        matched = 0
        for block in chain:
            if block not in self._blocks:
                break
            matched += 1
        return matched * PREFIX_BLOCK_TOKENS

    def remember(self, chain: Sequence[int]) -> None:
        # Last block first, so that the beginning of a prefix outlives its end.
        for block in reversed(chain):
            self._blocks[block] = None
            self._blocks.move_to_end(block)
        while len(self._blocks) > self._blocks_max:
            self._blocks.popitem(last=False)

    def __len__(self) -> int:
        return len(self._blocks)


def prefix_chain(prompt_ids: Sequence[int], salt: bytes) -> Sequence[int]:
    """One hash for each full block, each covering everything before it.

    The last token is left out: a replica must compute at least one to have logits.
    """
    chain: list[int] = []
    link = hash(salt)
    for end in range(PREFIX_BLOCK_TOKENS, len(prompt_ids), PREFIX_BLOCK_TOKENS):
        link = hash((link, *prompt_ids[end - PREFIX_BLOCK_TOKENS : end]))
        chain.append(link)
    return chain


@dataclass(slots=True, eq=False)
class Endpoint:
    """One replica as its frontend sees it. Owned by the frontend's event loop."""

    facts: ReplicaFacts
    is_connected: bool = False
    load: ReplicaLoad = field(default_factory=ReplicaLoad)
    heard_ms: float = float("-inf")
    """When `load` arrived, on the monotonic clock."""
    sent_sequences: int = 0
    """Submitted since `load` arrived, so not part of it yet."""
    sent_tokens: int = 0
    prefixes: PrefixMemory = field(default_factory=PrefixMemory)

    def heard(self, load: ReplicaLoad, *, now_ms: float) -> None:
        self.load = load
        self.heard_ms = now_ms
        self.sent_sequences = 0
        self.sent_tokens = 0

    def sent(self, chain: Sequence[int], *, sequences: int, prompt_tokens: int) -> None:
        """Note work that the next load report will include."""
        self.sent_sequences += sequences
        self.sent_tokens += prompt_tokens
        self.prefixes.remember(chain)
