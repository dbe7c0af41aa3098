"""One request, as every layer behind the frontend sees it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from headrace.serving.domain.tier import NOTHING_PROMISED, Promise


class FinishReason(StrEnum):
    """How a sequence ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    BUDGET = "budget"
    """A hard budget of the caller's was spent. Given by the frontend, never by an engine."""
    ERROR = "error"


class GrammarKind(StrEnum):
    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    CHOICE = "choice"


@dataclass(frozen=True, slots=True)
class Grammar:
    """What the answer must match. `text` is a JSON schema, a regex, or a JSON array of strings."""

    kind: GrammarKind
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are chosen and when a sequence ends. Every default is resolved."""

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 is off."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict[int, float])
    seed: int = 0
    """Chosen by the server when the caller gave none; 64 bits, unsigned."""
    logprobs: int | None = None
    """How many likeliest tokens to report beside the chosen one; None reports nothing."""
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    grammar: Grammar | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceSpec:
    """One sequence for an engine loop: a choice of a request, maybe resumed on this replica."""

    prompt_ids: Sequence[int]
    sampling: Sampling
    resume_ids: Sequence[int] = ()
    """Tokens that were delivered before a replica was lost: computed again, not delivered again.
    They count towards max_tokens, penalties, stop strings and the grammar."""
    cache_salt: bytes = b""
    deadline_ms: float | None = None
    """On the loop's monotonic clock; past it the work is worthless."""
    promise: Promise = NOTHING_PROMISED
    """Its tier and tenant, and what is due when on the loop's clock."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural log-probabilities under the model's own distribution, before any sampling rule."""

    token_id: int
    logprob: float
    top: Sequence[tuple[int, float]] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What one engine step added to one sequence."""

    token_ids: tuple[int, ...] = ()
    text: str = ""
    """What the tokens so far complete; characters and possible stop strings that are still
    partial are held back. Concatenated over a sequence it is the whole answer."""
    logprobs: Sequence[TokenLogprob] = ()
    cached_tokens: int = 0
    """On the first delta: prompt tokens whose KV was already resident."""
    cache_write_tokens: int = 0
    """On the first delta: prompt tokens computed for it whose KV stays resident."""
    finish: FinishReason | None = None
    error: Exception | None = None
    """With FinishReason.ERROR: the ServingError to report."""
