"""`ClaimStore` in one SQLite file: the embedded default, for frontends of one machine.

One thread owns the connection. What has queued up is one transaction and one fsync, as claims are
as precious as settlements: a claim that a power cut loses could let a result be charged twice.
"""

import asyncio
import os
import queue
import sqlite3
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from headrace.serving.errors import IdempotencyUnavailable
from headrace.serving.idempotency.claim_rows import SQLITE, ClaimRows
from headrace.serving.idempotency.claims import (
    Answer,
    Ask,
    Claim,
    Debt,
    Extent,
    Verdict,
    unavailable,
)

BATCH_MAX = 256
"""Calls of one transaction: about 10 ms."""
QUEUE_MAX = 4_096
"""Calls that may wait for the disk: half a second's work."""
BUSY_MS = 2_000
"""How long a write waits for another process's transaction."""

T = TypeVar("T")
Connect = Callable[[Path], sqlite3.Connection]


@dataclass(slots=True, eq=False)
class _Job:
    work: Callable[[ClaimRows], Any]
    loop: asyncio.AbstractEventLoop
    done: "asyncio.Future[Any]"


def connect(path: Path) -> sqlite3.Connection:
    """A connection in autocommit, whose commits reach the disk; makes the file, mode 0600."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    connection = sqlite3.connect(
        path, timeout=BUSY_MS / 1000, isolation_level=None, check_same_thread=False
    )
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        for statement in SQLITE.schema():
            connection.execute(statement)
    except BaseException:
        connection.close()
        raise
    return connection


class SqliteClaims:
    """Implements ClaimStore. Its methods belong to one event loop."""

    def __init__(
        self,
        path: Path,
        *,
        owner: str,
        log_id: str,
        is_alive: Callable[[str], bool],
        connect: Connect = connect,
    ) -> None:
        """Open the file. Blocks.

        Args:
            path: made when missing; on a local disk.
            owner: names this life of this process.
            log_id: of the meter log that its attempts are recorded in.
            is_alive: whether the process of another owner lives.
            connect: how connections are made; tests pass one that fails on purpose.

        Raises:
            IdempotencyUnavailable: the file cannot be opened or written.
        """
        self._path = path
        self._connect = connect
        try:
            self._connection: sqlite3.Connection | None = connect(path)
        except (sqlite3.Error, OSError) as error:
            raise unavailable(str(error)) from error
        self._owner = owner
        self._log_id = log_id
        self._is_alive = is_alive
        self._jobs: queue.Queue[_Job | None] = queue.Queue(QUEUE_MAX)
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="idempotency", daemon=True)
        self._thread.start()

    async def claim(self, ask: Ask) -> Verdict:
        return await self._do(lambda rows: rows.claim(ask))

    async def finish(self, claim: Claim, answer: Answer, *, expires_unix_ms: int) -> bool:
        return await self._do(
            lambda rows: rows.finish(claim, answer, expires_unix_ms=expires_unix_ms)
        )

    async def end(self, claim: Claim, *, owes: bool) -> None:
        await self._do(lambda rows: rows.end(claim, owes=owes))

    async def release(self, claim: Claim) -> None:
        await self._do(lambda rows: rows.release(claim))

    async def end_ours(self, digest: bytes) -> None:
        await self._do(lambda rows: rows.end_ours(digest))

    async def debts(self) -> Sequence[Debt]:
        return await self._do(lambda rows: rows.debts())

    async def settled(self, debt: Debt) -> None:
        await self._do(lambda rows: rows.settled(debt))

    async def sweep(self, *, now_unix_ms: int, answer_bytes_max: int) -> int:
        return await self._do(
            lambda rows: rows.sweep(now_unix_ms=now_unix_ms, answer_bytes_max=answer_bytes_max)
        )

    async def extent(self) -> Extent:
        return await self._do(lambda rows: rows.extent())

    async def renew(self) -> None:
        """Nothing: whoever shares the file sees our epoch's lock."""

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._jobs.put(None)
            self._thread.join()

    async def _do(self, work: Callable[[ClaimRows], T]) -> T:
        if self._closed:
            raise unavailable("this frontend is stopping")
        loop = asyncio.get_running_loop()
        job = _Job(work, loop, loop.create_future())
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            raise unavailable(f"{QUEUE_MAX:,} calls are waiting for the disk") from None
        return await job.done

    def _run(self) -> None:
        goes_on = True
        while goes_on:
            batch: list[_Job] = []
            job = self._jobs.get()
            while job is not None:
                batch.append(job)
                if len(batch) == BATCH_MAX:
                    break
                try:
                    job = self._jobs.get_nowait()
                except queue.Empty:
                    break
            goes_on = job is not None
            if batch:
                _answer(batch, *self._together(batch))
        if self._connection is not None:
            self._connection.close()

    def _together(self, batch: Sequence[_Job]) -> tuple[Sequence[Any], Exception | None]:
        """One transaction for all; the results, or why none of it was stored."""
        try:
            connection = self._connection = self._connection or self._connect(self._path)
            rows = ClaimRows(
                connection.execute,
                owner=self._owner,
                log_id=self._log_id,
                is_alive=self._is_alive,
            )
            connection.execute("BEGIN IMMEDIATE")
            results = [job.work(rows) for job in batch]
            connection.execute("COMMIT")
        except (sqlite3.Error, OSError) as error:
            self._start_over()
            return (), unavailable(str(error))
        except Exception as defect:
            self._start_over()
            return (), defect
        return results, None

    def _start_over(self) -> None:
        """Let go of the connection, and with it of what it had not committed."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _answer(batch: Sequence[_Job], results: Sequence[Any], error: Exception | None) -> None:
    for index, job in enumerate(batch):
        result = None if error is not None else results[index]
        # One object for each: an exception that is raised collects its raiser's traceback.
        mine = unavailable(error.what) if isinstance(error, IdempotencyUnavailable) else error
        try:
            job.loop.call_soon_threadsafe(_finish, job.done, result, mine)
        except RuntimeError:
            # The loop is closed, so nobody waits any more; what is stored stays stored.
            if not job.loop.is_closed():
                raise


def _finish(done: "asyncio.Future[Any]", result: object, error: Exception | None) -> None:
    if done.done():
        return
    if error is None:
        done.set_result(result)
    else:
        done.set_exception(error)
