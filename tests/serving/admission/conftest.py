"""A house with an account store behind it, on SQLite or on PostgreSQL."""

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from headrace.serving.admission.account_store import AccountStore
from headrace.serving.admission.account_view import AccountView
from headrace.serving.admission.authenticate import Authenticator
from headrace.serving.admission.database import Database, SqliteDatabase
from headrace.serving.admission.database_postgres import PostgresDatabase
from headrace.serving.admission.key_store import Peppers
from headrace.serving.domain.record import Caller
from headrace.serving.errors import Unauthenticated
from headrace.serving.testing.clock import ManualClock
from headrace.serving.testing.postgres import PostgresServer

STALE_S = 60


class Door:
    """One frontend's authenticator, whose thread turns round when the test says so."""

    def __init__(self, store: AccountStore, clock: ManualClock) -> None:
        self.view = AccountView(store, clock=clock, stale_s=STALE_S)
        self.authenticator = Authenticator(self.view, clock=clock)

    def polls(self) -> "Door":
        self.view.refresh()
        return self

    def authenticate(self, key: str) -> Caller:
        return self.authenticator.authenticate(key)

    def lets_in(self, key: str) -> Caller | None:
        try:
            return self.authenticate(key)
        except Unauthenticated:
            return None


class House:
    """A store as the command line sees it, and doors as frontends have them."""

    def __init__(self, folder: Path, database: Callable[[], Database]) -> None:
        self.folder = folder
        self.clock = ManualClock()
        self.database = database()
        self._databases = [self.database]
        self.open_database = database
        self.store = self.opened()
        self.door = self.another_door()

    def opened(self) -> AccountStore:
        """The store as another process opens it."""
        self._databases.append(self.open_database())
        peppers = Peppers(self.folder / "pepper")
        return AccountStore(self._databases[-1], peppers, clock=self.clock, actor="local:ada")

    def another_door(self) -> Door:
        return Door(self.opened(), self.clock)

    def has(self, tenant_id: str, *projects: str) -> None:
        self.store.create_organisation(tenant_id=tenant_id)
        for project_id in projects:
            self.store.create_project(tenant_id=tenant_id, project_id=project_id)

    def close(self) -> None:
        for database in self._databases:
            database.close()


def fresh_database(server: PostgresServer) -> str:
    """The connection string of an empty database of its own."""
    name = f"t{uuid.uuid4().hex}"
    with psycopg.connect(server.dsn, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return f"{server.dsn} dbname={name}"


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    with PostgresServer() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgres"])
def open_database(request, tmp_path) -> Callable[[], Database]:
    """Opens one database, the same at every call: the conformance suite runs over both kinds."""
    if request.param == "sqlite":
        return lambda: SqliteDatabase(tmp_path / "accounts.db")
    conninfo = fresh_database(request.getfixturevalue("postgres"))
    return lambda: PostgresDatabase(conninfo)


@pytest.fixture
def house(tmp_path, open_database) -> Iterator[House]:
    """On each kind of database."""
    house = House(tmp_path, open_database)
    yield house
    house.close()


@pytest.fixture
def small_house(tmp_path) -> House:
    """On SQLite, where the database makes no difference."""
    return House(tmp_path, lambda: SqliteDatabase(tmp_path / "accounts.db"))


@pytest.fixture
def postgres_house(tmp_path, postgres) -> Iterator[House]:
    """Where the story is PostgreSQL's own."""
    conninfo = fresh_database(postgres)
    house = House(tmp_path, lambda: PostgresDatabase(conninfo))
    yield house
    house.close()
