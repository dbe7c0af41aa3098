"""Ledgers in both databases; the PostgreSQL server is the tests' own."""

import itertools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from headrace.serving.metering.ledger.database import Database
from headrace.serving.metering.ledger.ledger import Ledger
from headrace.serving.metering.ledger.postgres_database import PostgresDatabase
from headrace.serving.metering.ledger.reader import LedgerReader
from headrace.serving.metering.ledger.sqlite_database import SqliteDatabase
from headrace.serving.testing.memory_log import MemoryLog

INSTALLED = Path("/usr/lib/postgresql")


class Server:
    """A PostgreSQL server on a socket in a folder of its own; nothing listens on the network."""

    def __init__(self, binaries: Path) -> None:
        self._binaries = binaries
        self._names = itertools.count()
        # Not pytest's folder: that is root's own, and a socket's path has 107 characters at most.
        self.folder = Path(tempfile.mkdtemp(prefix="headrace-pg-"))
        if os.geteuid() == 0:
            shutil.chown(self.folder, "postgres", "postgres")
        self._run("initdb", "--auth=trust", "--no-sync", "--username=postgres")
        # A test's data is worth no disk flush.
        with (self.folder / "data" / "postgresql.conf").open("a") as file:
            file.write(f"listen_addresses = ''\nunix_socket_directories = '{self.folder}'\n")
            file.write("fsync = off\nmax_connections = 50\nshared_buffers = 16MB\n")
        self.starts()

    def starts(self) -> None:
        self._run("pg_ctl", "start", "--wait", "--silent", "--log", str(self.folder / "log"))

    def stops(self) -> None:
        self._run("pg_ctl", "stop", "--wait", "--silent", "--mode=immediate")

    def new_database(self) -> str:
        """The DSN of an empty database."""
        name = f"ledger_{next(self._names)}"
        with psycopg.connect(self.dsn("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return self.dsn(name)

    def dsn(self, name: str) -> str:
        return f"host={self.folder} user=postgres dbname={name}"

    def ends(self) -> None:
        self.stops()
        shutil.rmtree(self.folder)

    def _run(self, program: str, *words: str) -> None:
        command = [str(self._binaries / program), "--pgdata", str(self.folder / "data"), *words]
        if os.geteuid() == 0:  # The server refuses to run as root.
            command = [
                "setpriv",
                "--reuid=postgres",
                "--regid=postgres",
                "--clear-groups",
                *command,
            ]
        with tempfile.TemporaryFile() as output:  # A pipe would stay open in the server.
            ran = subprocess.run(
                command, stdout=output, stderr=output, cwd="/", check=False, timeout=60
            )
            output.seek(0)
            assert ran.returncode == 0, output.read().decode()


@pytest.fixture(scope="session")
def postgres() -> Iterator[Server]:
    found = sorted(INSTALLED.glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if not found:
        pytest.skip(f"PostgreSQL is not installed under {INSTALLED}: apt-get install postgresql")
    server = Server(found[-1].parent)
    yield server
    server.ends()


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
