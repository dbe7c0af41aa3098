"""Where accounts are kept: what the store asks of a database, and its home in one SQLite file."""

import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

from headrace.serving.errors import AccountsUnavailable

BUSY_S = 5.0
"""How long a change waits for another process's; ours take a few milliseconds."""
MARK_TABLE = "account_mark"
"""The table that is there once the others are."""

Value = str | int | None
Row = Sequence[Any]


class Execute(Protocol):
    """One statement with `?` for each value, and the rows that it answers."""

    def __call__(self, statement: str, values: Sequence[Value] = (), /) -> Sequence[Row]: ...


class Database(Protocol):
    """Transactions. Any thread may call; a transaction belongs to the thread that began it.

    What the database cannot do is an AccountsUnavailable; a block that raises changes nothing.
    """

    integer: str
    """The type of a 64-bit integer here,"""
    text: str
    """of a text that is ordered by its bytes,"""
    strict: str
    """and what follows a table that takes no other types."""
    find_mark: str
    """Answers a row when the tables are there."""
    first_statements: Sequence[str]
    """What comes before the tables are made."""
    last_statements: Sequence[str]
    """What makes `audit` refuse changes and removals, our own included."""

    def changing(self) -> AbstractContextManager[Execute]:
        """A transaction with no other beside it, on disk once the block has ended."""
        ...

    def reading(self) -> AbstractContextManager[Execute]:
        """A transaction that sees one state."""
        ...

    def close(self) -> None: ...


class SqliteDatabase:
    """One file, opened for each transaction: a file that was replaced is seen at once.

    That costs 0.2 ms a transaction. Every process of the machine may do so at once; not over a
    network file system, whose locks are not to be relied on.
    """

    integer = "INTEGER"
    text = "TEXT"
    strict = "STRICT"
    find_mark = f"SELECT 1 FROM sqlite_master WHERE name = '{MARK_TABLE}'"  # noqa: S608 - fixed
    first_statements: Sequence[str] = ()
    last_statements: Sequence[str] = (
        "CREATE TRIGGER audit_keeps BEFORE UPDATE ON audit "
        "BEGIN SELECT RAISE(ABORT, 'the audit log only grows'); END",
        "CREATE TRIGGER audit_stays BEFORE DELETE ON audit "
        "BEGIN SELECT RAISE(ABORT, 'the audit log only grows'); END",
    )

    def __init__(self, path: Path) -> None:
        """Makes an empty file, mode 0600, where there is none.

        Raises:
            AccountsUnavailable: the file can be neither found nor made.
        """
        self._path = path
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        except OSError as error:
            raise self._refusal(error) from error

    def __repr__(self) -> str:
        return str(self._path)

    def changing(self) -> AbstractContextManager[Execute]:
        return self._transaction("BEGIN IMMEDIATE")

    def reading(self) -> AbstractContextManager[Execute]:
        return self._transaction("BEGIN")

    def close(self) -> None:
        """Nothing is held between transactions."""

    @contextmanager
    def _transaction(self, begin: str) -> Iterator[Execute]:
        try:
            connection = self._connect()
        except sqlite3.Error as error:
            raise self._refusal(error) from error

        def execute(statement: str, values: Sequence[Value] = (), /) -> Sequence[Row]:
            return connection.execute(statement, values).fetchall()

        try:
            connection.execute(begin)
            yield execute
            connection.execute("COMMIT")
        except (sqlite3.IntegrityError, sqlite3.ProgrammingError):
            raise  # A defect of ours, not of the file.
        except sqlite3.Error as error:
            raise self._refusal(error) from error
        finally:
            connection.close()  # Undoes what was not committed.

    def _connect(self) -> sqlite3.Connection:
        # Not made here: a file that someone removed must not come back empty.
        connection = sqlite3.connect(
            f"{self._path.absolute().as_uri()}?mode=rw",
            uri=True,
            timeout=BUSY_S,
            isolation_level=None,
        )
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA foreign_keys = ON")
        except BaseException:
            connection.close()
            raise
        return connection

    def _refusal(self, error: Exception) -> AccountsUnavailable:
        return unavailable(str(self._path), str(error))


def unavailable(where: str, why: str) -> AccountsUnavailable:
    return AccountsUnavailable(
        f"The accounts in {where} cannot be read or changed: {' '.join(why.split())}.",
        why="Organisations, projects, keys and the audit log are kept there.",
        fix="Check that it is there, answers, and may be written by this user; then try again.",
        retry_after_ms=1_000,
    )
