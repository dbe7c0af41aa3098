"""A text generation request, checked and tokenised: what the pipeline runs."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from headrace.serving.domain.record import Caller
from headrace.serving.domain.request import Delta, Sampling
from headrace.serving.domain.tier import PLAIN, Receipt, Terms
from headrace.serving.domain.usage import Price, Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class Generate:
    """One request. Every default is resolved and every field is in range."""

    caller: Caller
    request_id: str
    model: str
    version: str
    """The artifact whose tokenizer made `prompt_ids`. A replica of another version is used only
    when none of this one is left: a rolling upgrade must not strand a request."""
    prompt_ids: Sequence[int] = field(repr=False)
    sampling: Sampling = field(repr=False)
    n: int = 1
    """Independent answers; answer i samples with seed + i."""
    price: Price
    """Frozen when the request was accepted."""
    terms: Terms = PLAIN
    """What its tier promises."""
    cache_salt: bytes = field(default=b"", repr=False)
    """Prefixes are shared between requests of one salt only."""
    reasoning_token_ids: tuple[int, int] | None = None
    """Ids that open and close a thinking section, where the model has them."""
    accepted_unix_ms: int
    accepted_ms: float
    """The same instant on the frontend's monotonic clock."""
    deadline_ms: float | None = None
    """On the frontend's monotonic clock; None is no deadline."""

    @property
    def hold_femto(self) -> int:
        """The most that it can cost: all of its prompt, and every answer at its longest."""
        prompt_femto, answer_femto = self.price.dearest_femto()
        answers = self.n * self.sampling.max_tokens
        return len(self.prompt_ids) * prompt_femto + answers * answer_femto

    idempotency_digest: bytes = field(default=b"", repr=False)
    """Of the tenant's idempotency key; empty without one."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of one answer, and the usage of the whole request once the caller has it."""

    index: int
    delta: Delta
    usage: Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """The end of a request that ran to its end: the record is durable."""

    usage: Usage
    charge_nano: int
    price: Price
    version: str
    """Content hash of the artifact that delivered the last token."""
    replicas_tried: int
    receipt: Receipt | None = None
