"""A ledger in PostgreSQL: the logs of many frontends, joined in one place.

Nothing waits for it: every frontend has its own log and its own local ledger, and this one catches
up when it is back. Calls block for at most the bounds below; they belong on a thread.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, LiteralString, cast

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from headrace.serving.errors import ConfigRefused, LedgerUnavailable
from headrace.serving.metering.ledger.database import Dialect, Execute, Row, Value

CONNECT_S = 5
"""How long a server may take to accept; one on the same site takes milliseconds."""
STATEMENT_MS = 60_000
"""Longest statement: a batch takes tens of milliseconds, a year's totals some seconds."""
SILENCE_MS = 15_000
"""How long sent data may stay unconfirmed before the connection counts as lost."""
FETCH_ROWS = 1000
"""Rows of a stream in memory at once."""

_LOCK_ID = 0x68656164
"""The advisory lock of `Dialect.lock`: "head"."""

_LINK = {
    "connect_timeout": CONNECT_S,
    "keepalives_idle": 5,
    "keepalives_interval": 5,
    "keepalives_count": 2,
    "tcp_user_timeout": SILENCE_MS,
    "options": f"-c statement_timeout={STATEMENT_MS}",
    "application_name": "headrace",
}
"""Where the DSN does not say otherwise."""

POSTGRES = Dialect(
    integer="BIGINT",
    strict="",
    integer_of="({})::bigint",
    elements="jsonb_array_elements(?::jsonb) AS each(value)",
    has_table="SELECT 1 FROM pg_class WHERE oid = to_regclass(?)",
    lock=f"SELECT pg_advisory_xact_lock({_LOCK_ID})",
)


class PostgresDatabase:
    """Implements `Database`. For one thread at a time."""

    dialect = POSTGRES

    def __init__(self, dsn: str) -> None:
        """Connects later; `dsn` is a URI or `key=value` words, and is a secret.

        Raises:
            ConfigRefused: it is neither.
        """
        try:
            given = conninfo_to_dict(dsn)
        except psycopg.Error as error:
            raise ConfigRefused(
                "The PostgreSQL connection string cannot be read.",
                why="It is a URI, postgresql://user@host/database, or `key=value` words.",
                fix="Correct the file that ledger.postgres_dsn_file names.",
                field="ledger.postgres_dsn_file",
            ) from error
        self._conninfo = make_conninfo(**cast("dict[str, Any]", _LINK | given))
        where = (str(given[key]) for key in ("host", "port", "dbname") if given.get(key))
        self.name = f"postgresql {' '.join(where)}".rstrip()
        self._connection: psycopg.Connection[Row] | None = None

    def __repr__(self) -> str:
        return f"PostgresDatabase({self.name!r})"

    @contextmanager
    def transaction(self) -> Iterator[Execute]:
        with self._refusing():
            connection = self._connected()
            with connection.transaction():
                yield lambda statement, values: _run(connection, statement, values)

    def rows(self, statement: str, values: Sequence[Value] = ()) -> list[Row]:
        with self._refusing():
            return _run(self._connected(), statement, values)

    def stream(self, statement: str, values: Sequence[Value] = ()) -> Iterator[Row]:
        with self._refusing():
            connection = self._connected()
            with connection.transaction(), connection.cursor(name="stream") as cursor:
                cursor.itersize = FETCH_ROWS
                cursor.execute(_spelt(statement), values)
                yield from cursor

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _connected(self) -> "psycopg.Connection[Row]":
        if self._connection is None:
            self._connection = psycopg.connect(self._conninfo, autocommit=True)
        return self._connection

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """A server that is gone, out of room or deadlocked is tried again.

        Anything else that it says is a defect of ours.
        """
        try:
            yield
        except (psycopg.OperationalError, psycopg.InterfaceError) as error:
            self.close()
            raise LedgerUnavailable(
                f"The ledger in {self.name} does not answer: {' '.join(str(error).split())}.",
                why="The server is down, unreachable, or refuses this user.",
                fix="Bring it back; what it missed is in the meter logs and follows by itself.",
                retry_after_ms=1000,
            ) from error


def _run(
    connection: "psycopg.Connection[Row]", statement: str, values: Sequence[Value]
) -> list[Row]:
    cursor = connection.execute(_spelt(statement), values)
    return cursor.fetchall() if cursor.description else []


def _spelt(statement: str) -> LiteralString:
    """Our statements as psycopg reads them. They are fixed texts without a `?` of their own."""
    return cast("LiteralString", statement.replace("%", "%%").replace("?", "%s"))
