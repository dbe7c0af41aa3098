"""Work that goes on in the background, a turn at a time, and backs off while it cannot.

The core is a plain function that answers how long to wait before it is called again; the thread is
a shell around it. Tests call the function and never wait.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass

from headrace.serving import log


@dataclass(slots=True)
class Backoff:
    """How long to wait after each failure in a row: twice as long each time, up to a bound."""

    first_s: float
    longest_s: float
    failures: int = 0

    def failed(self) -> float:
        """One more; the pause before the next try."""
        self.failures += 1
        # Bounded by itself as well: a year of failures is no number worth raising 2 to.
        return min(self.longest_s, self.first_s * 2 ** min(self.failures - 1, 32))

    def succeeded(self) -> None:
        self.failures = 0


class BackgroundTurns:
    """A thread that takes turns until it is stopped. Start and stop it from one thread."""

    def __init__(self, turn: Callable[[], float | None], *, name: str) -> None:
        """Calls nothing yet.

        Args:
            turn: does a bounded piece of work; answers the seconds to wait before the next one,
                or None when there is none: it has given up and said so.
            name: of the thread, and in the log.
        """
        self._turn = turn
        self._name = name
        self._wake = threading.Event()
        self._stops = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """There is something to do. Any thread may call; it costs a microsecond."""
        self._wake.set()

    def stop(self) -> None:
        """End after the turn that runs. Idempotent; waits for it."""
        self._stops = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        try:
            while not self._stops:
                pause_s = self._turn()
                if pause_s is None:
                    return
                self._wake.wait(pause_s)
                self._wake.clear()
        except BaseException as error:
            log.crashed(during=self._name, error=error)
