"""The quota authority in a thread of its own: it waits for the disk, the event loop does not."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from headrace.serving.admission.lease import Ask, Grant
from headrace.serving.admission.quota_authority import QuotaAuthority, Standing
from headrace.serving.admission.quota_book import Lease, QuotaBook
from headrace.serving.clock import Clock
from headrace.serving.domain.limit import Limit

T = TypeVar("T")


class AuthorityThread:
    """Implements `Authority`. Its methods belong to one event loop; they queue for the thread."""

    def __init__(self, path: Path, *, clock: Clock) -> None:
        """Nothing is opened before `open`."""
        self._path = path
        self._clock = clock
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="quota-authority")
        self._opened: QuotaAuthority | None = None

    async def open(self, limits: Sequence[Limit]) -> None:
        """Open the book.

        Raises:
            ConfigRefused, QuotaUnavailable: it cannot be used.
        """

        def opened() -> QuotaAuthority:
            return QuotaAuthority(QuotaBook(self._path), clock=self._clock, limits=limits)

        self._opened = await self._run(opened)

    @property
    def _authority(self) -> QuotaAuthority:
        assert self._opened is not None, "the authority was not opened"
        return self._opened

    async def lease(self, ask: Ask) -> Sequence[Grant]:
        return await self._run(lambda: self._authority.lease(ask))

    async def use(self, limits: Sequence[Limit]) -> None:
        await self._run(lambda: self._authority.use(limits))

    async def limits(self) -> Sequence[Limit]:
        return await self._run(lambda: self._authority.limits)

    async def standings(self) -> Sequence[Standing]:
        return await self._run(lambda: self._authority.standings())

    async def resolve(self, lease_id: str, *, spent: int) -> None:
        await self._run(lambda: self._authority.resolve(lease_id, spent=spent))

    async def open_leases(self, holder: str, *, epoch: str) -> Sequence[Lease]:
        return await self._run(lambda: self._authority.open_leases(holder, epoch=epoch))

    async def close(self) -> None:
        """Idempotent, and harmless before `open`."""
        opened, self._opened = self._opened, None
        if opened is not None:
            await self._run(opened.close)
        self._thread.shutdown()

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)
