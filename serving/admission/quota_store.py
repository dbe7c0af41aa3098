"""Limits that operators set while frontends run, in one SQLite file; and what is in force with it.

A limit in the file stands in place of the configuration's for the same subject, model and metric:
what was said last, by hand, holds.
"""

import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from headrace.serving.clock import Clock
from headrace.serving.domain.limit import Limit, Metric, check_limit
from headrace.serving.errors import AccountNotFound, ConfigRefused, InvalidRequest

LIMITS_MAX = 10_000
"""In force at once: a look-up table of 5 MB. More subjects than that share a limit each."""
BUSY_S = 5.0
SCHEMA_VERSION = 1
_SCHEMA = f"""
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS quota_limit (
    subject TEXT NOT NULL,
    model TEXT NOT NULL,
    metric TEXT NOT NULL,
    currency TEXT NOT NULL,
    amount INTEGER NOT NULL CHECK (amount > 0),
    burst INTEGER,
    hard INTEGER NOT NULL,
    set_unix_ms INTEGER NOT NULL,
    PRIMARY KEY (subject, model, metric, currency)
) STRICT;
PRAGMA user_version = {SCHEMA_VERSION};
COMMIT;
"""

FileStamp = tuple[int, int, int] | None


class LimitStore:
    """The file. Opened for each question, so it holds nothing between them; any process may."""

    def __init__(self, path: Path, *, clock: Clock) -> None:
        self.path = path
        self._clock = clock

    def set(self, limit: Limit) -> None:
        """Put `limit` in force, in place of the one of its name.

        Raises:
            InvalidRequest: it means nothing, or there are too many.
            ConfigRefused: the file cannot be used.
        """
        check_limit(limit)
        row = (limit.limit, limit.burst, limit.hard, self._clock.unix_ms())
        with self._open(makes=True) as connection:
            connection.execute(
                "INSERT INTO quota_limit VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET "
                "amount = excluded.amount, burst = excluded.burst, hard = excluded.hard, "
                "set_unix_ms = excluded.set_unix_ms",
                (*_key(limit), *row),
            )
            ((number,),) = connection.execute("SELECT count(*) FROM quota_limit").fetchall()
            if number > LIMITS_MAX:
                raise InvalidRequest(
                    f"There would be {number:,} limits.",
                    why=f"At most {LIMITS_MAX:,} are in force at once.",
                    fix="Remove some with `headrace limits remove`, or limit organisations "
                    "instead of keys.",
                )

    def remove(self, limit: Limit) -> None:
        """Take the limit of this name out of force; its number does not matter.

        Raises:
            AccountNotFound: no such limit was set.
            ConfigRefused: the file cannot be used.
        """
        with self._open(makes=True) as connection:
            removed = connection.execute(
                "DELETE FROM quota_limit WHERE subject = ? AND model = ? AND metric = ? "
                "AND currency = ?",
                _key(limit),
            ).rowcount
        if not removed:
            raise AccountNotFound(
                f"No {limit.metric} of {limit.subject} was set.",
                why="Only limits that `headrace limits set` made can be removed; those of "
                "config.yaml are removed there.",
                fix="See `headrace limits list`.",
            )

    def read(self) -> list[Limit]:
        """All of them; none when there is no file.

        Raises:
            ConfigRefused: the file cannot be read.
        """
        if not self.path.exists():
            return []
        with self._open(makes=False) as connection:
            rows = connection.execute(
                "SELECT subject, model, metric, currency, amount, burst, hard FROM quota_limit "
                "ORDER BY subject, metric, model"
            ).fetchall()
        return [
            Limit(
                subject=subject,
                model=model or None,
                metric=Metric(metric),
                currency=currency or "USD",
                limit=amount,
                burst=burst,
                hard=bool(hard),
            )
            for subject, model, metric, currency, amount, burst, hard in rows
        ]

    @contextmanager
    def _open(self, *, makes: bool) -> Iterator[sqlite3.Connection]:
        """One transaction. A rollback journal, so that the file's own time stamp tells a change."""
        try:
            if makes:
                os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
            connection = sqlite3.connect(self.path, timeout=BUSY_S, isolation_level=None)
            try:
                if makes:
                    connection.executescript(_SCHEMA)
                connection.execute("BEGIN IMMEDIATE" if makes else "BEGIN")
                yield connection
                connection.execute("COMMIT")
            finally:
                connection.close()
        except (sqlite3.Error, OSError, ValueError) as error:
            raise ConfigRefused(
                f"The limits in {self.path} cannot be used: {error}.",
                why="Limits that operators set are kept there.",
                fix="Check the file's owner and the disk; move it away to begin without them.",
            ) from error


class LimitsSource:
    """Which limits are in force, from configuration and store; looks again when a file changed."""

    def __init__(
        self,
        store: LimitStore,
        *,
        config_path: Path,
        configured: Callable[[], Sequence[Limit]],
        initial: Sequence[Limit],
    ) -> None:
        """`configured` reads the configuration again; `initial` is what it said at the start."""
        self._store = store
        self._config_path = config_path
        self._configured = configured
        self._from_config = initial
        self._config_stamp = _stamp(config_path)
        self._store_stamp: FileStamp = None

    def read(self) -> list[Limit]:
        """What is in force now.

        Raises:
            ConfigRefused: the store cannot be read.
        """
        self._store_stamp = _stamp(self._store.path)
        return in_force(self._from_config, self._store.read())

    def changes(self) -> list[Limit] | None:
        """What is in force since a file changed; None when none did. A few microseconds, then.

        Raises:
            ServingError: a file is not usable; what was in force stays, until it changes again.
        """
        config_stamp, store_stamp = _stamp(self._config_path), _stamp(self._store.path)
        if (config_stamp, store_stamp) == (self._config_stamp, self._store_stamp):
            return None
        if config_stamp != self._config_stamp:
            self._config_stamp = config_stamp
            self._from_config = self._configured()
        return self.read()


def in_force(configured: Sequence[Limit], stored: Sequence[Limit]) -> list[Limit]:
    """The configuration's limits, but where an operator said otherwise."""
    return list(({each.name: each for each in configured} | {e.name: e for e in stored}).values())


def _key(limit: Limit) -> tuple[str, str, str, str]:
    currency = limit.currency if limit.metric.is_budget else ""
    return limit.subject, limit.model or "", limit.metric.value, currency


def _stamp(path: Path) -> FileStamp:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size
