"""The seam between the ledger's statements and the database that runs them.

SQLite and PostgreSQL take the same statements, written for SQLite's spelling of parameters (`?`).
What differs is in a `Dialect`: how a column is declared, and how one parameter becomes a table.

**A batch is one statement.** Its rows travel as one JSON text. In SQLite each step of a statement
gives the interpreter lock away and has to win it back from a busy event loop; in PostgreSQL each
statement is a round trip. JSON keeps 64-bit integers exact in both.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

Value = str | int | None
Row = tuple[Any, ...]
Execute = Callable[[str, Sequence[Value]], list[Row]]
"""Runs one statement; answers its rows, if it has any."""

TEXT, INTEGER = "text", "integer"
Columns = Mapping[str, str]
"""Column to TEXT or INTEGER, in order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """How one database spells what the others spell differently."""

    integer: str
    """A signed 64-bit column."""
    strict: str
    """What ends a CREATE TABLE, so that a column holds only its own type."""
    integer_of: str
    """`{}` is a JSON value as text or number; the expression is an integer or NULL."""
    elements: str
    """Turns one parameter, a JSON array, into a table of its elements, `each.value`."""
    has_table: str
    """A query with a row if the table that its parameter names is there."""
    lock: str
    """A statement that waits until no other transaction holds it, and holds it to the end of ours:
    for what must have one writer, a migration or a number that counts on."""

    def batch(self, columns: Columns) -> str:
        """A table named `batch` with these columns, made of one parameter: see `as_batch`."""
        chosen = (
            f"{self._field(i, kind)} AS {name}" for i, (name, kind) in enumerate(columns.items())
        )
        return f"(SELECT {', '.join(chosen)} FROM {self.elements}) AS batch"

    def _field(self, index: int, kind: str) -> str:
        field = f"each.value ->> {index}"
        return self.integer_of.format(field) if kind == INTEGER else field


class Database(Protocol):
    """One database, for one thread at a time.

    Connects when it is first needed, and again after the connection was lost. Every refusal is a
    `LedgerUnavailable`, after which it may be tried again.
    """

    @property
    def dialect(self) -> Dialect: ...

    @property
    def name(self) -> str:
        """For messages: where it is, without any secret."""
        ...

    def transaction(self) -> AbstractContextManager[Execute]:
        """A block whose statements are stored together, or not at all. One at a time writes."""
        ...

    def rows(self, statement: str, values: Sequence[Value] = ()) -> list[Row]:
        """The rows of one reading statement."""
        ...

    def stream(self, statement: str, values: Sequence[Value] = ()) -> Iterator[Row]:
        """The rows of one reading statement as of its start, a bounded number in memory."""
        ...

    def close(self) -> None:
        """Idempotent; the next use connects again."""
        ...


def as_batch(rows: Sequence[Sequence[Value]]) -> str:
    """What `Dialect.batch` reads."""
    return json.dumps(rows, separators=(",", ":"))


# A sum of 64-bit integers may pass 64 bits. Summed apart, the parts stay below it for a billion
# rows; both divide towards zero, so that negative amounts come back exactly, too.
_SPLIT = 10**9


def sum_of(column: str) -> str:
    """Two columns of a SELECT for the sum of one, for `exact`."""
    return f"sum({column} / {_SPLIT}), sum({column} % {_SPLIT})"


def exact(high: Any, low: Any) -> int:
    """The sum whose parts `sum_of` selected; 0 over no rows."""
    return int(high or 0) * _SPLIT + int(low or 0)


def columns_of(columns: Columns, *, prefix: str = "") -> str:
    return ", ".join(f"{prefix}{name}" for name in columns)
