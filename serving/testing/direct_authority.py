"""A quota authority on the event loop itself: no thread, so that virtual time holds."""

from collections.abc import Sequence
from pathlib import Path

from headrace.serving.admission.lease import Ask, Grant
from headrace.serving.admission.quota_authority import QuotaAuthority
from headrace.serving.admission.quota_book import QuotaBook
from headrace.serving.clock import Clock
from headrace.serving.domain.limit import Limit
from headrace.serving.errors import QuotaUnavailable


class DirectAuthority:
    """Implements Authority with a real book in `home`; away while the test says so."""

    def __init__(self, home: Path, limits: Sequence[Limit], *, clock: Clock) -> None:
        book = QuotaBook(home / "quota.db")
        # The power does not fail in a test, and a million waits for the disk are minutes.
        book.connection.execute("PRAGMA synchronous = OFF")
        self.core = QuotaAuthority(book, clock=clock, limits=limits)
        self.is_away = False
        self.num_asks = 0

    async def lease(self, ask: Ask) -> Sequence[Grant]:
        self.num_asks += 1
        if self.is_away:
            raise QuotaUnavailable("It is away.", why="The test says so.", fix="Wait.")
        return self.core.lease(ask)

    def close(self) -> None:
        self.core.close()
