"""Makes a ledger again from its logs; invoices, which are in no log, come from the one before."""

from collections.abc import Sequence
from pathlib import Path

from headrace.serving.clock import SystemClock
from headrace.serving.errors import ConfigRefused, InvalidRequest
from headrace.serving.metering.ledger.database import Database
from headrace.serving.metering.ledger.invoice import copy_invoices
from headrace.serving.metering.ledger.ledger import Ledger
from headrace.serving.metering.ledger.projector import Follower
from headrace.serving.metering.ledger.source import Source
from headrace.serving.metering.ledger.sqlite_database import SqliteDatabase

POSTGRES_SCHEMES = ("postgres://", "postgresql://")


def open_database(target: str) -> Database:
    """A file's path, or a PostgreSQL URI.

    Raises:
        ConfigRefused: PostgreSQL is asked for and its driver is not installed, or a bad URI.
    """
    if target.startswith(POSTGRES_SCHEMES):
        return open_postgres(target)
    return SqliteDatabase(Path(target))


def open_postgres(dsn: str) -> Database:
    """See `PostgresDatabase`; its driver is imported only here."""
    try:
        from headrace.serving.metering.ledger.postgres_database import PostgresDatabase
    except ImportError as error:
        raise ConfigRefused(
            "PostgreSQL's driver is not installed.",
            why="An embedded installation does not need it.",
            fix="Run `pip install 'headrace[postgres]'`.",
        ) from error
    return PostgresDatabase(dsn)


def replay(sources: Sequence[Source], target: Ledger, *, before: Ledger) -> int:
    """Fill a ledger from the first record of every log; answers how many records.

    May be stopped and begun again: it goes on where it was.

    Args:
        sources: every log there is.
        target: empty, or filled in part by an earlier replay.
        before: the ledger that has the invoices.

    Raises:
        InvalidRequest: target and before are one ledger.
        MeterLogDamaged, AmountOutOfRange: what precedes the record is applied.
        LedgerUnavailable, MeterUnavailable: begin again.
    """
    if target.name == before.name:
        raise InvalidRequest(
            f"{target.name} is the ledger in use.",
            why="A ledger is made again beside the one that is read meanwhile.",
            fix="Name another file or database with --into.",
            field="into",
        )
    clock, applied = SystemClock(), 0
    for source in sources:
        begun = target.high_water(source.log_id)
        applied += Follower(source, target, clock=clock).catch_up() - begun
    copy_invoices(before, target)
    return applied
