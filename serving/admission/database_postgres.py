"""Accounts in PostgreSQL, for many frontends: `pip install 'headrace[postgres]'`."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import LiteralString, cast

import psycopg
from psycopg.conninfo import conninfo_to_dict

from headrace.serving.admission.database import MARK_TABLE, Execute, Row, Value, unavailable
from headrace.serving.errors import AccountsUnavailable, ConfigRefused

SCHEMA = "headrace_accounts"
"""Ours in a database that may hold other things."""
IDLE_MAX = 2
"""Connections kept between transactions: one for the poll, one for whoever administers."""
_LOCK = 7_245_113_901
"""Any number that nobody else locks: held by every change, so that there is one at a time."""
_OPTIONS = {
    # A server that does not answer must not hold a frontend's poll, whose keys would grow stale.
    "connect_timeout": "3",
    "tcp_user_timeout": "3000",
    "application_name": "headrace-accounts",
}
_SESSION = (
    f"SET search_path = {SCHEMA}",
    "SET synchronous_commit = on",
    "SET statement_timeout = '5s'",
)
_BEGIN_CHANGE = "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE"
_BEGIN_READ = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"

_NO_ANSWER = (psycopg.OperationalError, psycopg.InterfaceError, psycopg.InternalError)
"""The server, not the statement, is to blame; the last is a standby that takes no changes."""


class PostgresDatabase:
    """See `Database`. At most `IDLE_MAX` connections stay open; each transaction has its own."""

    integer = "BIGINT"
    text = 'TEXT COLLATE "C"'
    strict = ""
    find_mark = (
        f"SELECT 1 FROM pg_tables WHERE schemaname = '{SCHEMA}' AND tablename = '{MARK_TABLE}'"  # noqa: S608 - fixed
    )
    first_statements: Sequence[str] = (f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}",)
    last_statements: Sequence[str] = (
        "CREATE FUNCTION audit_only_grows() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE EXCEPTION 'the audit log only grows'; END $$",
        "CREATE TRIGGER audit_keeps BEFORE UPDATE OR DELETE OR TRUNCATE ON audit "
        "EXECUTE FUNCTION audit_only_grows()",
    )

    def __init__(self, conninfo: str) -> None:
        """Connects when it is first asked.

        Raises:
            ConfigRefused: `conninfo` is not one of PostgreSQL's.
        """
        try:
            parts = conninfo_to_dict(conninfo)
        except psycopg.ProgrammingError as error:
            raise ConfigRefused(
                "accounts.postgres is not a connection string.",
                why="It is PostgreSQL's: `postgresql://user@host/database` or `host=… dbname=…`.",
                fix="Write it so; give the password in a file, with `passfile=`.",
                field="accounts.postgres",
            ) from error
        self._options = _OPTIONS | {name: str(value) for name, value in parts.items()}
        # Never the whole string: it may hold a password.
        self._where = f"PostgreSQL at {parts.get('host', 'the default host')}"
        self._idle: list[psycopg.Connection] = []
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return self._where

    def changing(self) -> AbstractContextManager[Execute]:
        return self._transaction(_BEGIN_CHANGE, lock=_LOCK)

    def reading(self) -> AbstractContextManager[Execute]:
        return self._transaction(_BEGIN_READ)

    def close(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    @contextmanager
    def _transaction(self, begin: str, lock: int | None = None) -> Iterator[Execute]:
        connection: psycopg.Connection | None = None
        try:
            connection = self._begun(begin)

            def execute(statement: str, values: Sequence[Value] = (), /) -> Sequence[Row]:
                assert connection is not None
                text = cast("LiteralString", statement.replace("?", "%s"))
                done = connection.execute(text, values or None)
                return done.fetchall() if done.description else ()

            if lock is not None:
                execute("SELECT pg_advisory_xact_lock(?)", (lock,))
            yield execute
            execute("COMMIT")
            self._give_back(connection)
            connection = None
        except _NO_ANSWER as error:
            raise self._refusal(error) from error
        finally:
            if connection is not None:
                connection.close()  # The server undoes what was not committed.

    def _begun(self, begin: str) -> psycopg.Connection:
        """A connection in a transaction. One that was idle may have died; then a fresh one."""
        with self._lock:
            connection = self._idle.pop() if self._idle else None
        if connection is not None:
            try:
                connection.execute(cast("LiteralString", begin))
                return connection
            except _NO_ANSWER:
                connection.close()
                self.close()  # What lost one has most likely lost the others.
        connection = psycopg.connect(autocommit=True, **self._options)  # pyright: ignore[reportArgumentType]
        for statement in (*_SESSION, begin):
            connection.execute(cast("LiteralString", statement))
        return connection

    def _give_back(self, connection: psycopg.Connection) -> None:
        with self._lock:
            if len(self._idle) < IDLE_MAX:
                self._idle.append(connection)
                return
        connection.close()

    def _refusal(self, error: psycopg.Error) -> AccountsUnavailable:
        return unavailable(self._where, str(error).splitlines()[0] if str(error) else "no answer")
