"""An idempotency key's life: claimed by one attempt at a time, until one of them is whole.

    (absent) ── claim ──▶ RUNNING ── finish ──▶ ANSWERED ── 24 h ──▶ (absent)
                          │    ▲
          end, or a crash ▼    │ claim, as the next attempt
                          ENDED

An attempt that ended without a whole answer may have been charged for what it delivered. It is
remembered as a debt, and given back once a later attempt of the key is whole, so that one result
is never charged twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from headrace.serving.domain.usage import Usage
from headrace.serving.errors import IdempotencyUnavailable

ATTEMPTS_MAX = 32
"""Of one key: each may leave a debt, and a caller that fails this often should look at why."""
SWEEP_ROWS = 1_000
"""Rows that one transaction of a sweep touches: about 20 ms."""
RETRY_AFTER_MS = 1_000


class KeyState(StrEnum):
    RUNNING = "running"
    ENDED = "ended"
    """Without a whole answer: the key may be claimed again."""
    ANSWERED = "answered"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What a call says about its key. Nothing here tells the key or the request."""

    digest: bytes
    """HMAC over tenant and key: the row's name."""
    tenant_id: str
    fingerprint: bytes
    """HMAC over the request, its request_id left out."""
    request_id: str
    """Of the first attempt."""
    retry_id: str
    """Of any later one: a request_id is run once."""
    now_unix_ms: int
    expires_unix_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """The right to run the request. Ends with `finish`, `end` or `release`."""

    digest: bytes
    attempt: int
    request_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a whole attempt answered."""

    request_id: str
    usage: Usage
    sealed: bytes | None = field(default=None, repr=False)
    """The answer, encrypted; None when it is not kept."""


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """Another live frontend runs it."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Conflicting:
    """The key came with another request."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Exhausted:
    """ATTEMPTS_MAX attempts ended without a whole answer."""


Verdict = Claim | Answer | Elsewhere | Conflicting | Exhausted


@dataclass(frozen=True, slots=True, kw_only=True)
class Debt:
    """Attempts of our log whose charges are to be given back: a later one was whole."""

    digest: bytes
    tenant_id: str
    request_ids: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """How much is stored."""

    rows: int
    answer_bytes: int


class ClaimStore(Protocol):
    """The keys of all frontends that share it. One object for each frontend process.

    Every method raises IdempotencyUnavailable when the store does not answer; then nothing is
    known of what became of the call, and repeating it is harmless. What returned is durable.
    A call that was begun is carried out even if its caller is cancelled.
    """

    async def claim(self, ask: Ask) -> Verdict:
        """Take the key, or say who has it or what it answered. Of many at once, one gets it.

        A claim of our own that is still running counts as ended: the caller knows that nothing
        of this process runs it.
        """
        ...

    async def finish(self, claim: Claim, answer: Answer, *, expires_unix_ms: int) -> bool:
        """The attempt is whole. False: another frontend took the key over meanwhile."""
        ...

    async def end(self, claim: Claim, *, owes: bool) -> None:
        """The attempt ended without a whole answer; `owes` if it may have been charged."""
        ...

    async def release(self, claim: Claim) -> None:
        """The attempt never began: as if it had not been claimed."""
        ...

    async def end_ours(self, digest: bytes) -> None:
        """Whatever this frontend claimed under the key has ended, and may have been charged.

        For a call of which it is not known what became of it: until it is noted, another frontend
        would take it for running.
        """
        ...

    async def debts(self) -> Sequence[Debt]:
        """At most SWEEP_ROWS keys that were answered and owe for attempts in our meter log.

        Only who has the log knows whether an attempt has a record, and so only it pays.
        """
        ...

    async def settled(self, debt: Debt) -> None:
        """These attempts have been given back."""
        ...

    async def sweep(self, *, now_unix_ms: int, answer_bytes_max: int) -> int:
        """Forget expired keys, and the oldest answers beyond the bound; answers how many.

        At most SWEEP_ROWS of each. A key whose answer goes is still known to have been answered.
        """
        ...

    async def extent(self) -> Extent: ...

    async def renew(self) -> None:
        """Say that this frontend is alive, where the store cannot see it by itself."""
        ...

    def close(self) -> None:
        """Finish what was begun. Blocks; idempotent."""
        ...


def unavailable(why: str) -> IdempotencyUnavailable:
    return IdempotencyUnavailable(
        f"The idempotency key cannot be looked up: {why}.",
        why="Running the request without knowing might run and charge it twice.",
        fix="Retry with jitter, under the same key; calls without a key are served.",
        retry_after_ms=RETRY_AFTER_MS,
    )
