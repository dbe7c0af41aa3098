"""How many answers are open on this frontend, and whether another may begin."""

import asyncio

from headrace.serving.errors import Draining, Overloaded

RETRY_AFTER_MS = 1_000


class Gate:
    """How many answers are open, and whether another may begin. Owned by the event loop."""

    def __init__(self, streams_max: int) -> None:
        self._streams_max = streams_max
        self.is_draining = False
        self.num_open = 0
        self._is_empty = asyncio.Event()
        self._is_empty.set()

    def enter(self) -> None:
        """Take a place.

        Raises:
            Draining: this frontend is shutting down.
            Overloaded: all places are taken.
        """
        if self.is_draining:
            raise Draining(
                "This frontend is shutting down.",
                why="It finishes the answers it has and takes no new ones.",
                fix="Connect again: another frontend, or its successor, takes the request.",
                retry_after_ms=RETRY_AFTER_MS,
            )
        if self.num_open >= self._streams_max:
            raise Overloaded(
                f"{self.num_open} answers are open on this frontend.",
                why="That is its bound.",
                fix="Retry after the time given, with jitter.",
                retry_after_ms=RETRY_AFTER_MS,
            )
        self.num_open += 1
        self._is_empty.clear()

    def leave(self) -> None:
        self.num_open -= 1
        if not self.num_open:
            self._is_empty.set()

    async def wait_empty(self) -> None:
        await self._is_empty.wait()
