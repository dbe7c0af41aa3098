"""A ledger in one SQLite file: the embedded default, beside the log it is made of.

Nothing is fsynced on its own account: the log is the truth, and what a power cut takes from this
file is projected again.
"""

import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from headrace.serving.errors import ConfigRefused, LedgerUnavailable
from headrace.serving.metering.ledger.database import Dialect, Execute, Row, Value

BUSY_MS = 5000
"""How long a write waits for another process's transaction; ours take tens of milliseconds."""
SQLITE_MIN = (3, 38, 0)
"""STRICT tables, RETURNING, UPDATE … FROM, and `->>` on JSON."""
FETCH_ROWS = 1000
"""Rows of a stream in memory at once."""

SQLITE = Dialect(
    integer="INTEGER",
    strict="STRICT",
    integer_of="{}",
    elements="json_each(?) AS each",
    has_table="SELECT 1 FROM sqlite_schema WHERE type = 'table' AND name = ?",
    lock="SELECT 1",  # A transaction that writes is the only one.
)


class Connection(Protocol):
    """What is used of `sqlite3.Connection`; tests put one that fails on purpose in its place."""

    @property
    def in_transaction(self) -> bool: ...
    def execute(self, statement: str, values: Sequence[Value] = ..., /) -> sqlite3.Cursor: ...
    def close(self) -> None: ...


Connect = Callable[[Path], Connection]


def connect(path: Path) -> Connection:
    """A connection that may write, made with the file if there is none; autocommit."""
    if sqlite3.sqlite_version_info < SQLITE_MIN:
        raise ConfigRefused(
            f"This Python has SQLite {sqlite3.sqlite_version}.",
            why=f"The ledger needs {'.'.join(map(str, SQLITE_MIN))} for strict tables.",
            fix="Use a Python built with a newer SQLite, such as Debian 12's.",
        )
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    connection = sqlite3.connect(
        path, timeout=BUSY_MS / 1000, isolation_level=None, check_same_thread=False
    )
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
    except BaseException:
        connection.close()
        raise
    return connection


class SqliteDatabase:
    """Implements `Database`. Its connection may move between threads, never be shared by two."""

    dialect = SQLITE

    def __init__(self, path: Path, *, connect: Connect = connect) -> None:
        self._path = path
        self._connect = connect
        self._connection: Connection | None = None

    @property
    def name(self) -> str:
        return str(self._path)

    @contextmanager
    def transaction(self) -> Iterator[Execute]:
        with self._refusing():
            connection = self._connected()
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield lambda statement, values: connection.execute(statement, values).fetchall()
                connection.execute("COMMIT")
            except BaseException:
                # SQLite has ended the transaction itself after some errors, such as a full disk.
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    def rows(self, statement: str, values: Sequence[Value] = ()) -> list[Row]:
        with self._refusing():
            return self._connected().execute(statement, values).fetchall()

    def stream(self, statement: str, values: Sequence[Value] = ()) -> Iterator[Row]:
        with self._refusing():
            cursor = self._connected().execute(statement, values)
        while True:
            with self._refusing():
                some = cursor.fetchmany(FETCH_ROWS)
            if not some:
                return
            yield from some

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _connected(self) -> Connection:
        if self._connection is None:
            self._connection = self._connect(self._path)
        return self._connection

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.IntegrityError, sqlite3.ProgrammingError):
            raise  # A defect of ours: trying again would only repeat it.
        except (sqlite3.Error, OSError) as error:
            self.close()
            raise LedgerUnavailable(
                f"The ledger {self._path} cannot be used: {error}.",
                why="The file is damaged, of another format, or on a disk that does not answer.",
                fix="Check it with `headrace doctor`; `headrace meterlog replay` makes it again.",
                retry_after_ms=1000,
            ) from error
