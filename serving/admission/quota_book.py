"""The quota authority's memory: leases and what was spent, in one SQLite file.

Amounts are decimal text: a budget in femto-currency passes 64 bits at 9,223 units of currency.
"""

import os
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from headrace.serving.errors import ConfigRefused, QuotaUnavailable

SCHEMA_VERSION = 1
BUSY_S = 5.0
"""A view that reads holds no lock for longer."""

_SCHEMA = """
CREATE TABLE lease (
    lease_id TEXT PRIMARY KEY,
    limit_name TEXT NOT NULL,
    period TEXT NOT NULL,
    holder TEXT NOT NULL,
    epoch TEXT NOT NULL,
    seq INTEGER NOT NULL,
    granted TEXT NOT NULL,
    returned TEXT NOT NULL,
    spent TEXT NOT NULL,
    opened_unix_ms INTEGER NOT NULL,
    closed_unix_ms INTEGER
) STRICT;
CREATE TABLE past (
    limit_name TEXT NOT NULL,
    period TEXT NOT NULL,
    spent TEXT NOT NULL,
    PRIMARY KEY (limit_name, period)
) STRICT;
CREATE TABLE clock (only_row INTEGER PRIMARY KEY, unix_ms INTEGER NOT NULL) STRICT;
INSERT INTO clock VALUES (1, 0);
"""

_SAVE_LEASE = """
INSERT INTO lease VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (lease_id) DO UPDATE SET seq = excluded.seq, granted = excluded.granted,
    returned = excluded.returned, spent = excluded.spent, closed_unix_ms = excluded.closed_unix_ms
"""
_SAVE_PAST = """
INSERT INTO past VALUES (?, ?, ?)
ON CONFLICT (limit_name, period) DO UPDATE SET spent = excluded.spent
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """One account, as the authority keeps it. Totals since it was opened; see lease.py."""

    lease_id: str
    limit_name: str
    period: str
    """`2026-11`, `2026-11-27`, or empty for what has none."""
    holder: str
    epoch: str
    seq: int
    """Of the newest message that was heard of it."""
    granted: int = 0
    returned: int = 0
    spent: int = 0
    opened_unix_ms: int
    closed_unix_ms: int | None = None

    @property
    def is_open(self) -> bool:
        return self.closed_unix_ms is None

    @property
    def debit(self) -> int:
        """What of the limit is not to be had by anybody else."""
        return max(self.granted - self.returned, self.spent) if self.is_open else self.spent


class QuotaBook:
    """The file. Belongs to one thread; every change is durable when its block has ended."""

    def __init__(self, path: Path) -> None:
        """Make or open it. Blocks.

        Raises:
            ConfigRefused: another version's file.
            QuotaUnavailable: it cannot be used.
        """
        self._path = path
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            self.connection = sqlite3.connect(
                path, timeout=BUSY_S, isolation_level=None, check_same_thread=False
            )
            self.connection.execute("PRAGMA journal_mode = WAL")
            # A grant that a power cut forgets could be granted twice.
            self.connection.execute("PRAGMA synchronous = FULL")
            self._ensure_schema()
        except (sqlite3.Error, OSError) as error:
            raise unusable(path, str(error)) from error

    def leases(self) -> Iterator[Lease]:
        for row in self.connection.execute("SELECT * FROM lease ORDER BY opened_unix_ms"):
            *names, seq, granted, returned, spent, opened, closed = row
            lease_id, limit_name, period, holder, epoch = names
            yield Lease(
                lease_id=lease_id,
                limit_name=limit_name,
                period=period,
                holder=holder,
                epoch=epoch,
                seq=seq,
                granted=int(granted),
                returned=int(returned),
                spent=int(spent),
                opened_unix_ms=opened,
                closed_unix_ms=closed,
            )

    def past(self) -> dict[tuple[str, str], int]:
        """What leases that are no longer kept have spent, by limit and period."""
        rows = self.connection.execute("SELECT * FROM past")
        return {(name, period): int(spent) for name, period, spent in rows}

    def unix_ms(self) -> int:
        """The latest time that was written."""
        ((unix_ms,),) = self.connection.execute("SELECT unix_ms FROM clock").fetchall()
        return unix_ms

    @contextmanager
    def changing(self, unix_ms: int) -> Iterator["QuotaBook"]:
        """One transaction, made at `unix_ms`; durable once the block has ended.

        Raises:
            QuotaUnavailable: it was not written, wholly.
        """
        try:
            self.connection.execute("BEGIN IMMEDIATE")
            try:
                yield self
                self.connection.execute("UPDATE clock SET unix_ms = ?", (unix_ms,))
                self.connection.execute("COMMIT")
            except BaseException:
                if self.connection.in_transaction:
                    self.connection.execute("ROLLBACK")
                raise
        except (sqlite3.Error, OSError) as error:
            raise unusable(self._path, str(error)) from error

    def save(self, leases: Iterable[Lease]) -> None:
        for lease in leases:
            names = (lease.lease_id, lease.limit_name, lease.period, lease.holder, lease.epoch)
            amounts = (str(lease.granted), str(lease.returned), str(lease.spent))
            times = (lease.opened_unix_ms, lease.closed_unix_ms)
            self.connection.execute(_SAVE_LEASE, (*names, lease.seq, *amounts, *times))

    def fold(self, lease: Lease, *, past_spent: int) -> None:
        """Forget a closed lease; all of its limit and period have spent `past_spent` so far."""
        self.connection.execute(_SAVE_PAST, (lease.limit_name, lease.period, str(past_spent)))
        self.connection.execute("DELETE FROM lease WHERE lease_id = ?", (lease.lease_id,))

    def forget_past(self, *, before: str) -> None:
        """Forget totals of periods that ended before this date."""
        self.connection.execute("DELETE FROM past WHERE period <> '' AND period < ?", (before,))

    def close(self) -> None:
        self.connection.close()

    def _ensure_schema(self) -> None:
        ((version,),) = self.connection.execute("PRAGMA user_version").fetchall()
        if version == 0:
            self.connection.executescript(
                f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;"
            )
        elif version != SCHEMA_VERSION:
            raise ConfigRefused(
                f"{self._path} has the format {version}.",
                why=f"This version of Headrace reads and writes the format {SCHEMA_VERSION}.",
                fix="Run the version that wrote it, or move the file away: budgets begin anew.",
            )


def unusable(path: Path, detail: str) -> QuotaUnavailable:
    return QuotaUnavailable(
        f"The quota book {path} cannot be used: {detail}.",
        why="Money is debited there before it may be spent.",
        fix="Operator: check the owner and the free space of HEADRACE_HOME.",
        retry_after_ms=1000,
    )
