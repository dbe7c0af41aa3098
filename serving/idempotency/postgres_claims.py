"""`ClaimStore` in PostgreSQL, for frontends of several machines.

A frontend is alive for as long as it renews its lease, by the database's clock: theirs may differ.
One whose lease lapsed while it was running something is taken over; its answer, if it still gets
one, goes to its caller, and its charge is given back like that of any attempt that a later one
replaced.
"""

import asyncio
import queue
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, LiteralString, TypeVar, cast

import psycopg

from headrace.serving.idempotency.claim_rows import POSTGRES, ClaimRows, Cursor
from headrace.serving.idempotency.claims import (
    Answer,
    Ask,
    Claim,
    Debt,
    Extent,
    Verdict,
    unavailable,
)

LEASE_S = 20.0
"""Four renewals: a frontend that misses them all is gone, or cut off."""
CONNECTIONS = 4
"""Calls that are with the database at once. Each takes a few milliseconds."""
WAITING_MAX = 4_096
"""Calls that may wait for a connection; beyond it they would only wait."""
PATIENCE_MS = 2_000
"""A database that takes longer does not answer, as far as a caller is concerned."""

T = TypeVar("T")

_OWNERS = """
CREATE TABLE IF NOT EXISTS idempotency_owner (
    owner TEXT PRIMARY KEY, alive_until TIMESTAMPTZ NOT NULL)
"""
_RENEW = """
INSERT INTO idempotency_owner (owner, alive_until)
VALUES (?, clock_timestamp() + make_interval(secs => ?))
ON CONFLICT (owner) DO UPDATE SET alive_until = excluded.alive_until
"""
_FORGET_OWNERS = """
DELETE FROM idempotency_owner WHERE alive_until < clock_timestamp() - interval '1 day'
"""
_LEAVE = "DELETE FROM idempotency_owner WHERE owner = ?"
_ALIVE = "SELECT 1 FROM idempotency_owner WHERE owner = ? AND alive_until > clock_timestamp()"
_PATIENCE = f"SET statement_timeout = {PATIENCE_MS}; SET lock_timeout = {PATIENCE_MS}"
_SCHEMA_LOCK = "SELECT pg_advisory_xact_lock(7142857)"
"""Two frontends that start at once would both make the tables, and one of them fail."""


class PostgresClaims:
    """Implements ClaimStore. Its methods belong to one event loop."""

    def __init__(self, dsn: str, *, owner: str, log_id: str, lease_s: float = LEASE_S) -> None:
        """Nothing is connected before the first call, so that a frontend starts without it."""
        self._dsn = dsn
        self._owner = owner
        self._log_id = log_id
        self._lease_s = lease_s
        self._idle: queue.LifoQueue[psycopg.Connection[Any]] = queue.LifoQueue()
        self._threads = ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="idempotency")
        self._waiting = 0
        self._closed = False
        self._is_prepared = False

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
        await self._in_thread(lambda: self._transaction(self._say_alive))

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._threads.shutdown(wait=True)
        while not self._idle.empty():
            connection = self._idle.get_nowait()
            try:
                connection.execute(_sql(_LEAVE), (self._owner,))
            except psycopg.Error:
                pass  # The lease lapses by itself.
            finally:
                connection.close()

    async def _do(self, work: Callable[[ClaimRows], T]) -> T:
        def within(connection: "psycopg.Connection[Any]") -> T:
            def execute(statement: str, values: Sequence[object]) -> Cursor:
                return connection.execute(_sql(statement), values)

            def is_alive(owner: str) -> bool:
                return execute(_ALIVE, (owner,)).fetchone() is not None

            rows = ClaimRows(
                execute,
                owner=self._owner,
                log_id=self._log_id,
                is_alive=is_alive,
                dialect=POSTGRES,
            )
            return work(rows)

        return await self._in_thread(lambda: self._transaction(within))

    async def _in_thread(self, work: Callable[[], T]) -> T:
        if self._closed:
            raise unavailable("this frontend is stopping")
        if self._waiting >= WAITING_MAX:
            raise unavailable(f"{WAITING_MAX:,} calls are waiting for the database")
        self._waiting += 1
        running = asyncio.get_running_loop().run_in_executor(self._threads, work)
        running.add_done_callback(self._left)
        return await asyncio.shield(running)

    def _left(self, running: "asyncio.Future[Any]") -> None:
        self._waiting -= 1
        if not running.cancelled():
            running.exception()  # Seen, also when its caller was cancelled meanwhile.

    def _transaction(self, work: "Callable[[psycopg.Connection[Any]], T]") -> T:
        """Run `work` as one transaction, on a connection that is dropped if anything fails."""
        try:
            try:
                connection = self._idle.get_nowait()
            except queue.Empty:
                connection = self._connect()
            try:
                if not self._is_prepared:
                    with connection.transaction():
                        self._prepare(connection)
                    self._is_prepared = True
                with connection.transaction():
                    result = work(connection)
            except BaseException:
                connection.close()
                raise
        except psycopg.Error as error:
            # Of the text only the first line: libpq's next ones name hosts and addresses.
            why = str(error).partition("\n")[0] or type(error).__name__
            raise unavailable(why) from error
        self._idle.put_nowait(connection)
        return result

    def _connect(self) -> "psycopg.Connection[Any]":
        connection = psycopg.connect(
            self._dsn,
            autocommit=True,
            connect_timeout=max(2, PATIENCE_MS // 1000),
            keepalives_idle=5,
            tcp_user_timeout=PATIENCE_MS,
        )
        connection.execute(_sql(_PATIENCE))
        return connection

    def _prepare(self, connection: "psycopg.Connection[Any]") -> None:
        """Make the tables where there are none. Two threads may both do it; harmless."""
        for statement in (_SCHEMA_LOCK, *POSTGRES.schema(), _OWNERS):
            connection.execute(_sql(statement))
        self._say_alive(connection)

    def _say_alive(self, connection: "psycopg.Connection[Any]") -> None:
        connection.execute(_sql(_RENEW), (self._owner, self._lease_s))
        connection.execute(_sql(_FORGET_OWNERS))


def _sql(statement: str) -> LiteralString:
    """With psycopg's placeholders. No statement of ours has a question mark or per cent sign."""
    return cast("LiteralString", statement.replace("?", "%s"))
