"""What every store of claims promises, whatever database is behind it."""

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from headrace.serving.domain.usage import Usage
from headrace.serving.errors import IdempotencyUnavailable
from headrace.serving.idempotency import sqlite_claims
from headrace.serving.idempotency.claims import (
    ATTEMPTS_MAX,
    Answer,
    Ask,
    Claim,
    ClaimStore,
    Conflicting,
    Elsewhere,
    Exhausted,
)
from headrace.serving.idempotency.postgres_claims import PostgresClaims
from headrace.serving.idempotency.sqlite_claims import SqliteClaims
from headrace.serving.testing.postgres import PostgresServer

DAY_MS = 86_400_000
USAGE = Usage(prompt_tokens=9, cached_tokens=4, completion_tokens=2)


def asks(
    key: bytes = b"k1", *, request: bytes = b"hello", now_ms: int = 0, retry: str = "r2"
) -> Ask:
    return Ask(
        digest=key,
        tenant_id="acme",
        fingerprint=request,
        request_id="r1",
        retry_id=retry,
        now_unix_ms=now_ms,
        expires_unix_ms=now_ms + DAY_MS,
    )


def answers(request_id: str = "r1", sealed: bytes | None = b"secret") -> Answer:
    return Answer(request_id=request_id, usage=USAGE, sealed=sealed)


class Frontends:
    """Frontends that share one store; each may die."""

    def __init__(self, make: Callable[[str], ClaimStore]) -> None:
        self._make = make
        self.stores: list[ClaimStore] = []

    def starts(self, owner: str) -> ClaimStore:
        self.stores.append(self._make(owner))
        return self.stores[-1]

    async def claims(self, store: ClaimStore, **fields: object) -> Claim:
        claim = await store.claim(asks(**fields))  # pyright: ignore[reportArgumentType]
        assert isinstance(claim, Claim)
        return claim

    def kills(self, owner: str) -> None:
        raise NotImplementedError


class OnSqlite(Frontends):
    def __init__(self, path: Path) -> None:
        self._dead: set[str] = set()
        super().__init__(
            lambda owner: SqliteClaims(
                path,
                owner=owner,
                log_id=owner,
                is_alive=lambda other: other not in self._dead,
            )
        )

    def kills(self, owner: str) -> None:
        self._dead.add(owner)


class OnPostgres(Frontends):
    """A frontend that dies is one whose lease has lapsed: it had none from the beginning."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        super().__init__(lambda owner: PostgresClaims(dsn, owner=owner, log_id=owner))

    def kills(self, owner: str) -> None:
        lapsed = PostgresClaims(self._dsn, owner=owner, log_id=owner, lease_s=0.0)
        self.stores.append(lapsed)
        asyncio.get_running_loop()  # Called from a story.
        self.lapsing = lapsed.renew()


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresServer]:
    with PostgresServer() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgres"])
def frontends(
    request: pytest.FixtureRequest, tmp_path: Path, postgres: PostgresServer
) -> Iterator[Frontends]:
    if request.param == "sqlite":
        frontends: Frontends = OnSqlite(tmp_path / "idempotency.db")
    else:
        frontends = OnPostgres(_fresh_schema(postgres, f"t{abs(hash(tmp_path))}"))
    yield frontends
    for store in frontends.stores:
        store.close()


def _fresh_schema(server: PostgresServer, name: str) -> str:
    import psycopg

    with psycopg.connect(server.dsn, autocommit=True) as connection:
        connection.execute(f"CREATE SCHEMA {name}")  # pyright: ignore[reportArgumentType]
    return f"{server.dsn} options='-c search_path={name}'"


async def dies(frontends: Frontends, owner: str) -> None:
    frontends.kills(owner)
    if isinstance(frontends, OnPostgres):
        await frontends.lapsing


def play(story: Callable[[], Awaitable[None]]) -> None:
    async def run() -> None:
        async with asyncio.timeout(30):
            await story()

    asyncio.run(run())


def test_of_many_that_claim_a_key_at_once_one_gets_it(frontends: Frontends) -> None:
    async def story() -> None:
        stores = [frontends.starts("a"), frontends.starts("b")]
        await asyncio.gather(*(store.renew() for store in stores))
        verdicts = await asyncio.gather(*(stores[i % 2].claim(asks()) for i in range(2)))

        assert sorted(type(each).__name__ for each in verdicts) == ["Claim", "Elsewhere"]

    play(story)


def test_an_answer_is_found_again_by_every_frontend(frontends: Frontends) -> None:
    async def story() -> None:
        a, b = frontends.starts("a"), frontends.starts("b")
        claim = await frontends.claims(a)
        assert await a.finish(claim, answers(), expires_unix_ms=DAY_MS)

        assert await a.claim(asks()) == await b.claim(asks()) == answers()
        assert await b.claim(asks(request=b"other")) == Conflicting("r1")

    play(story)


def test_what_runs_on_a_live_frontend_is_left_to_it(frontends: Frontends) -> None:
    async def story() -> None:
        a, b = frontends.starts("a"), frontends.starts("b")
        await a.renew()
        claim = await frontends.claims(a)

        assert await b.claim(asks()) == Elsewhere("r1")
        assert await b.claim(asks(request=b"other")) == Conflicting("r1")
        await a.end(claim, owes=False)
        assert (await frontends.claims(b)).attempt == 2

    play(story)


def test_what_a_dead_frontend_ran_is_run_again_and_owed(frontends: Frontends) -> None:
    async def story() -> None:
        a, b = frontends.starts("a"), frontends.starts("b")
        await a.renew()
        await frontends.claims(a)
        await dies(frontends, "a")
        second = await frontends.claims(b)

        assert (second.attempt, second.request_id) == (2, "r2")
        again = frontends.starts("a")
        assert await again.debts() == [], "nothing is given back before there is a result"
        await b.finish(second, answers("r2"), expires_unix_ms=DAY_MS)
        assert await b.debts() == [], "only who has the log knows what was charged"
        (debt,) = await again.debts()
        assert (debt.tenant_id, debt.request_ids) == ("acme", ["r1"])
        await again.settled(debt)
        assert await again.debts() == []

    play(story)


def test_a_frontend_that_was_taken_over_cannot_answer_any_more(frontends: Frontends) -> None:
    async def story() -> None:
        a, b = frontends.starts("a"), frontends.starts("b")
        stale = await frontends.claims(a)
        await dies(frontends, "a")
        fresh = await frontends.claims(b)

        assert not await a.finish(stale, answers("r1"), expires_unix_ms=DAY_MS)
        await a.end(stale, owes=True)
        assert await b.finish(fresh, answers("r2"), expires_unix_ms=DAY_MS)
        assert [debt.request_ids for debt in await a.debts()] == [["r1"]]

    play(story)


def test_our_own_claim_that_nothing_runs_any_more_counts_as_ended(frontends: Frontends) -> None:
    """The answer could not be noted in its time: the store did not answer."""

    async def story() -> None:
        a = frontends.starts("a")
        await a.renew()
        await frontends.claims(a)

        assert (await frontends.claims(a)).attempt == 2

    play(story)


def test_what_a_frontend_is_unsure_of_it_can_end(frontends: Frontends) -> None:
    """Whatever it had claimed under the key, and nothing of anybody else's."""

    async def story() -> None:
        a, b = frontends.starts("a"), frontends.starts("b")
        await asyncio.gather(a.renew(), b.renew())
        await frontends.claims(a)
        await b.end_ours(b"k1")
        assert await b.claim(asks()) == Elsewhere("r1")
        await a.end_ours(b"k1")
        second = await frontends.claims(b)
        await b.finish(second, answers("r2"), expires_unix_ms=DAY_MS)

        assert [debt.request_ids for debt in await a.debts()] == [["r1"]]

    play(story)


def test_an_attempt_that_never_began_leaves_no_trace(frontends: Frontends) -> None:
    async def story() -> None:
        a = frontends.starts("a")
        await a.release(await frontends.claims(a))
        assert (await a.extent()).rows == 0
        await a.end(await frontends.claims(a), owes=True)
        await a.release(await frontends.claims(a))
        again = await frontends.claims(a, retry="r3")

        assert (again.attempt, again.request_id) == (2, "r3")

    play(story)


def test_attempts_are_counted_and_bounded(frontends: Frontends) -> None:
    async def story() -> None:
        a = frontends.starts("a")
        for number in range(ATTEMPTS_MAX):
            claim = await frontends.claims(a, retry=f"r{number}")
            await a.end(claim, owes=True)

        assert await a.claim(asks()) == Exhausted()

    play(story)


def test_a_key_is_forgotten_after_its_time_and_a_debt_is_not(frontends: Frontends) -> None:
    async def story() -> None:
        a = frontends.starts("a")
        await a.finish(await frontends.claims(a), answers(), expires_unix_ms=1000)
        await a.end(await frontends.claims(a, key=b"k2"), owes=True)
        owing = await frontends.claims(a, key=b"k2")
        await a.finish(owing, answers("r2"), expires_unix_ms=1000)

        assert await a.sweep(now_unix_ms=999, answer_bytes_max=1 << 20) == 0
        assert await a.sweep(now_unix_ms=1000, answer_bytes_max=1 << 20) == 1
        assert isinstance(await a.claim(asks(b"k2", now_ms=2000)), Answer)
        await a.settled((await a.debts())[0])
        assert await a.sweep(now_unix_ms=1000, answer_bytes_max=1 << 20) == 1
        assert (await a.extent()).rows == 0

    play(story)


def test_a_key_whose_time_is_over_may_be_used_for_something_else(frontends: Frontends) -> None:
    async def story() -> None:
        a = frontends.starts("a")
        await a.finish(await frontends.claims(a), answers(), expires_unix_ms=1000)
        claim = await frontends.claims(a, request=b"other", now_ms=1000)

        assert (claim.attempt, claim.request_id) == (1, "r1")

    play(story)


def test_beyond_the_bound_the_oldest_answers_go_and_the_facts_stay(frontends: Frontends) -> None:
    async def story() -> None:
        a = frontends.starts("a")
        for number in range(4):
            claim = await frontends.claims(a, key=b"k%d" % number)
            sealed = bytes([number]) * 100
            await a.finish(claim, answers(sealed=sealed), expires_unix_ms=DAY_MS + number)
        await a.sweep(now_unix_ms=0, answer_bytes_max=250)

        assert (await a.extent()).answer_bytes == 200
        kept = [await a.claim(asks(b"k%d" % number)) for number in range(4)]
        assert [bool(each.sealed) for each in kept if isinstance(each, Answer)] == [
            *(False, False),
            *(True, True),
        ]

    play(story)


def test_a_file_that_fails_refuses_and_heals(tmp_path: Path) -> None:
    is_broken = False

    class Tricky:
        def __init__(self, path: Path) -> None:
            self._real = sqlite_claims.connect(path)

        def execute(self, statement: str, values: object = ()) -> object:
            if is_broken:
                raise sqlite3.OperationalError("disk I/O error")
            return self._real.execute(statement, values)  # pyright: ignore[reportArgumentType]

        def close(self) -> None:
            self._real.close()

    async def story() -> None:
        nonlocal is_broken
        store = SqliteClaims(
            tmp_path / "i.db",
            owner="a",
            log_id="a",
            is_alive=lambda _: True,
            connect=Tricky,  # pyright: ignore[reportArgumentType]
        )
        claim = await store.claim(asks())
        assert isinstance(claim, Claim)
        is_broken = True
        with pytest.raises(IdempotencyUnavailable):
            await store.finish(claim, answers(), expires_unix_ms=DAY_MS)
        is_broken = False
        assert await store.finish(claim, answers(), expires_unix_ms=DAY_MS)
        store.close()

    play(story)


def test_a_database_that_is_gone_refuses_and_heals(postgres: PostgresServer) -> None:
    async def story() -> None:
        store = PostgresClaims(_fresh_schema(postgres, "gone"), owner="a", log_id="a")
        claim = await store.claim(asks())
        assert isinstance(claim, Claim)
        await asyncio.to_thread(postgres.stop)
        with pytest.raises(IdempotencyUnavailable):
            await store.finish(claim, answers(), expires_unix_ms=DAY_MS)
        await asyncio.to_thread(postgres.start)
        for _ in range(4):  # One failure for each connection that had been open.
            try:
                assert await store.finish(claim, answers(), expires_unix_ms=DAY_MS)
                break
            except IdempotencyUnavailable:
                continue
        assert await store.claim(asks()) == answers()
        store.close()

    play(story)
