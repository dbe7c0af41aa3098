"""What has arrived for a request and was not taken yet.

Between the reader of a step channel, which must never wait, and the task that writes to a client,
which may be slow. Bounded by construction: one delta for each answer, and a second one that comes
before the first is taken is merged into it, so a request never holds more than its own answers.
One wake-up for each step, however many tokens it brought.
"""

import asyncio
from dataclasses import replace

from headrace.serving.domain.request import Delta


class Inbox:
    """Owned by one event loop; one task takes."""

    __slots__ = ("_held", "_waiter", "has_expired", "lost")

    def __init__(self) -> None:
        self._held: dict[int, Delta] = {}
        self._waiter: asyncio.Future[None] | None = None
        self.lost: str | None = None
        """Why the replica that ran the answers is gone; the taker resets it."""
        self.has_expired = False
        """The request's deadline passed."""

    def put(self, index: int, delta: Delta) -> None:
        """Add what a step produced for answer `index`."""
        held = self._held.get(index)
        self._held[index] = delta if held is None else merged(held, delta)
        self._wake()

    def lose(self, why: str) -> None:
        """Say that no further delta comes: the replica was lost."""
        self.lost = why
        self._wake()

    def expire(self) -> None:
        self.has_expired = True
        self._wake()

    async def take(self) -> dict[int, Delta]:
        """Wait until something happened, and take all deltas that are here, by answer.

        Empty only when the replica was lost or the deadline passed: what arrived before is always
        taken first.
        """
        if not (self._held or self.lost or self.has_expired):
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        held, self._held = self._held, {}
        return held

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)


def merged(first: Delta, second: Delta) -> Delta:
    """The delta that says what both say, in order."""
    return replace(
        second,
        token_ids=first.token_ids + second.token_ids,
        text=first.text + second.text,
        logprobs=(*first.logprobs, *second.logprobs),
        cached_tokens=first.cached_tokens or second.cached_tokens,
        cache_write_tokens=first.cache_write_tokens or second.cache_write_tokens,
    )
