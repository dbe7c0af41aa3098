"""A sequence between its arrival and its last token, as the scheduler sees it."""

from collections.abc import Hashable

from headrace.serving.domain.tier import NOTHING_PROMISED, Promise
from headrace.serving.engine.prefix_cache import PrefixChain


class Job:
    """What is known, what is computed, and what was promised. Owned by the engine's thread."""

    __slots__ = (
        "arrival",
        "block_ids",
        "chain",
        "computed_once",
        "has_begun",
        "is_relegatable",
        "key",
        "num_computed",
        "num_resident",
        "num_written",
        "preemptions",
        "promise",
        "queued_ms",
        "rank",
        "token_ids",
        "tokens_held",
    )

    def __init__(
        self,
        key: Hashable,
        token_ids: list[int],
        chain: PrefixChain,
        *,
        computed_once: int = 0,
        promise: Promise = NOTHING_PROMISED,
        tokens_held: int = 0,
    ) -> None:
        """Describe a sequence.

        Args:
            key: the caller's name for it.
            token_ids: the tokens known so far; the job owns the list and appends to it.
            chain: the digests of its blocks.
            computed_once: leading tokens that a lost replica has already computed.
            promise: its tier, tenant and what is due when.
            tokens_held: tokens whose blocks are held from admission on, so that it never lacks
                one; 0 holds those of the tokens that are known.
        """
        self.key = key
        self.token_ids = token_ids
        self.chain = chain
        self.num_computed = 0
        """Tokens whose KV is in the cache. A step moves this towards len(token_ids)."""
        self.computed_once = computed_once
        """Leading tokens that were computed before, so that doing it again is recomputation."""
        self.block_ids: list[int] = []
        self.num_resident: int | None = None
        """Tokens found in the cache at the first admission; None before it."""
        self.num_written = 0
        """Tokens that it computed, once each, and whose blocks can be found afterwards."""
        self.arrival = 0
        self.queued_ms = 0.0
        """When it was added to the scheduler."""
        self.promise = promise
        self.tokens_held = tokens_held
        self.rank = promise.tier.rank
        """Its place among the tiers; a relegated job that has given way often enough moves up."""
        self.is_relegatable = promise.tier.may_be_relegated
        self.has_begun = computed_once > 0
        """Part of the answer is out: what is due next is a token, not the first one."""
        self.preemptions = 0

    @property
    def num_pending(self) -> int:
        return len(self.token_ids) - self.num_computed


def service_order(job: Job) -> tuple[int, int]:
    """Jobs that run, from the one that loses its blocks last to the one that does first."""
    return job.rank, job.arrival
