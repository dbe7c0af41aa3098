"""An event loop whose clock jumps to the next timer instead of waiting for it.

Code that sleeps, times out or beats runs in its own order and in no time. Only for coroutines that
wait for each other and for timers: a wait for a socket or a thread would be overtaken.
"""

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class VirtualClock:
    """A Clock that follows the running loop, so that deadlines and timers agree."""

    def __init__(self, start_unix_ms: int = 1_700_000_000_000) -> None:
        self._start_unix_ms = start_unix_ms

    def monotonic_ms(self) -> float:
        return asyncio.get_running_loop().time() * 1000

    def unix_ms(self) -> int:
        return self._start_unix_ms + int(self.monotonic_ms())


class _JumpingSelector(selectors.DefaultSelector):
    """Never waits: where a loop would sleep, its clock is moved on."""

    slept_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        events = super().select(0)
        if not events:
            assert timeout is not None, "every task waits and no timer is set: a deadlock"
            self.slept_s += max(timeout, 0)
        return events


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.slept_s


def run_virtually(story: Coroutine[Any, Any, T]) -> T:
    """Run `story` to its end in virtual time, from 0 s."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(story)
