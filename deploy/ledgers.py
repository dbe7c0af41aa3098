"""A home's ledgers as commands open them: brought up to the meter log before they are read.

Two ledgers may be there: the local one, `ledger.db`, of the requests that this home's frontends
answered; and one in PostgreSQL that all frontends share. What is invoiced is the shared one where
there is one.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from headrace.serving.clock import SystemClock
from headrace.serving.config import Config, read_secret
from headrace.serving.metering.ledger.ledger import Ledger
from headrace.serving.metering.ledger.projector import Follower
from headrace.serving.metering.ledger.replay import open_postgres
from headrace.serving.metering.ledger.source import Source
from headrace.serving.metering.ledger.sqlite_database import SqliteDatabase
from headrace.serving.metering.meterlog.reader import LogReader

LOG_ID_FILE = "log_id"
"""What a folder has that holds a log."""


def sources(config: Config, folders: Sequence[Path] = ()) -> list[Source]:
    """The logs in the home, or in the folders given; each folder is one log, or has some."""
    found = [
        log
        for folder in folders or (config.meterlog_dir,)
        for log in (folder, *sorted(each for each in folder.glob("*") if each.is_dir()))
        if (log / LOG_ID_FILE).exists()
    ]
    return [LogReader(folder) for folder in found]


@contextmanager
def local(config: Config) -> Iterator[Ledger]:
    """The home's own ledger, caught up.

    Raises:
        LedgerUnavailable, MeterUnavailable: it cannot be read or written.
        MeterLogDamaged: the log has a fault.
    """
    config.prepare_home()
    ledger = Ledger(SqliteDatabase(config.ledger_path))
    try:
        catch_up(sources(config), ledger)
        yield ledger
    finally:
        ledger.close()


@contextmanager
def invoiced(config: Config, folders: Sequence[Path] = ()) -> Iterator[Ledger]:
    """The ledger that is invoiced: the shared one if there is one; caught up with the logs here.

    Raises:
        ConfigRefused: the file with PostgreSQL's connection string cannot be read.
        LedgerUnavailable, MeterUnavailable, MeterLogDamaged: as `local`.
    """
    dsn_file = config.ledger.postgres_dsn_file
    if dsn_file is None:
        with local(config) as ledger:
            catch_up(sources(config, folders), ledger)
            yield ledger
        return
    ledger = Ledger(open_postgres(read_secret(dsn_file, key="ledger.postgres_dsn_file")))
    try:
        catch_up(sources(config, folders), ledger)
        yield ledger
    finally:
        ledger.close()


def catch_up(logs: Sequence[Source], ledger: Ledger) -> None:
    for log in logs:
        Follower(log, ledger, clock=SystemClock()).catch_up()
