"""Ledgers in both databases; the PostgreSQL server is the tests' own."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from headrace.serving.metering.ledger.database import Database
from headrace.serving.metering.ledger.ledger import Ledger
from headrace.serving.metering.ledger.postgres_database import PostgresDatabase
from headrace.serving.metering.ledger.reader import LedgerReader
from headrace.serving.metering.ledger.sqlite_database import SqliteDatabase
from headrace.serving.testing.memory_log import MemoryLog
from headrace.serving.testing.postgres import PostgresServer


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    with PostgresServer() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgres"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    if request.param == "sqlite":
        made: Database = SqliteDatabase(tmp_path / "ledger.db")
    else:
        made = PostgresDatabase(request.getfixturevalue("postgres").new_database())
    yield made
    made.close()


@pytest.fixture
def ledger(database: Database) -> Ledger:
    return Ledger(database)


@pytest.fixture
def reader(ledger: Ledger) -> LedgerReader:
    return LedgerReader(ledger)


@pytest.fixture
def log() -> MemoryLog:
    return MemoryLog()
