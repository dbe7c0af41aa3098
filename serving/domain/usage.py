"""What a request used, in the units we bill, and how it ended."""

from dataclasses import dataclass
from enum import StrEnum


class Outcome(StrEnum):
    """How a request ended. Low cardinality: a label of metrics and a column of records."""

    OPEN = "open"
    OK = "ok"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    REJECTED = "rejected"
    """Refused before any work."""
    FAILED = "failed"
    """A fault of ours: never charged."""
    RECOVERED = "recovered"
    """The frontend died; settled at its last checkpoint when the next one started."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens one request consumed, as counted by the engine that ran it.

    `cached_tokens` is a subset of `prompt_tokens` and `reasoning_tokens` one of
    `completion_tokens`, so that totals never count a token twice.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0

    def __post_init__(self) -> None:
        assert 0 <= self.cached_tokens <= self.prompt_tokens
        assert 0 <= self.reasoning_tokens <= self.completion_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """Nano-currency per million tokens. Integers, because money does not round-trip floats."""

    currency: str = "USD"
    version: str
    prompt_nano_per_mtok: int
    cached_nano_per_mtok: int
    completion_nano_per_mtok: int

    def charge_nano(self, usage: Usage) -> int:
        """Price `usage`, rounding the sum up to a whole nano once.

            ceil((fresh * prompt + cached * cached_price + completion * completion_price) / 10**6)

        90 fresh, 10 cached and 20 completion tokens at 1, 0.1 and 2 USD per million:
        (90 * 10**9 + 10 * 10**8 + 20 * 2 * 10**9) / 10**6 = 131 000 nano-USD.
        """
        fresh_tokens = usage.prompt_tokens - usage.cached_tokens
        nano_times_mtok = (
            fresh_tokens * self.prompt_nano_per_mtok
            + usage.cached_tokens * self.cached_nano_per_mtok
            + usage.completion_tokens * self.completion_nano_per_mtok
        )
        return -(-nano_times_mtok // 1_000_000)
