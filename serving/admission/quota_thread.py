"""The quota authority in a thread of its own: it waits for the disk, the event loop does not."""

import asyncio
import fcntl
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from headrace.serving.admission.lease import Ask, Grant, OpenLease
from headrace.serving.admission.quota_authority import QuotaAuthority, Standing
from headrace.serving.admission.quota_book import QuotaBook
from headrace.serving.clock import Clock
from headrace.serving.domain.limit import Limit
from headrace.serving.errors import ConfigRefused

T = TypeVar("T")

LOCK_TRIES = 50
LOCK_PAUSE_S = 0.1
"""Five seconds: what a frontend that is replaced takes to close its book."""


class AuthorityThread:
    """Implements `Authority`. Its methods belong to one event loop; they queue for the thread."""

    def __init__(self, path: Path, *, clock: Clock) -> None:
        """Nothing is opened before `open`."""
        self._path = path
        self._clock = clock
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="quota-authority")
        self._opened: QuotaAuthority | None = None
        self._lock: int | None = None

    async def open(self, limits: Sequence[Limit]) -> None:
        """Open the book; waits a moment for a predecessor to let go of it.

        Raises:
            ConfigRefused, QuotaUnavailable: it cannot be used, or another process keeps it.
        """

        def opened() -> QuotaAuthority:
            return QuotaAuthority(QuotaBook(self._path), clock=self._clock, limits=limits)

        try:
            self._lock = await self._run(lambda: _locked(self._path))
            self._opened = await self._run(opened)
        except BaseException:
            self._release()
            raise

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

    async def open_leases(self, holder: str, *, epoch: str) -> Sequence[OpenLease]:
        leases = await self._run(lambda: self._authority.open_leases(holder, epoch=epoch))
        return [
            OpenLease(
                lease_id=lease.lease_id,
                limit_name=lease.limit_name,
                period=lease.period,
                epoch=lease.epoch,
                granted=lease.granted,
                spent=lease.spent,
            )
            for lease in leases
        ]

    async def close(self) -> None:
        """Idempotent, and harmless before `open`."""
        opened, self._opened = self._opened, None
        if opened is not None:
            await self._run(opened.close)
        self._release()
        self._thread.shutdown()

    def _release(self) -> None:
        lock, self._lock = self._lock, None
        if lock is not None:
            os.close(lock)

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


def _locked(path: Path) -> int:
    """A descriptor that keeps every other authority from this book. Blocks for a moment.

    The system lets go of it with the process, however that ends.
    """
    lock = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT, 0o600)
    for _ in range(LOCK_TRIES):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(LOCK_PAUSE_S)
        else:
            return lock
    os.close(lock)
    raise ConfigRefused(
        f"Another process keeps the quota book {path}.",
        why="Two authorities would each grant all that is left.",
        fix="Stop it, or set `quota.authority` here to its directory's address.",
        field="quota.authority",
    )
