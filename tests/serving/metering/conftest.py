"""A frontend as its meter sees it: requests are accepted, delivered and ended."""

import asyncio
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from headrace.serving.domain.record import Opening, Settlement
from headrace.serving.domain.usage import Outcome, Price, Usage
from headrace.serving.metering import usage_schema
from headrace.serving.metering.usage_store import UsageStore
from headrace.serving.testing.clock import ManualClock

PRICE = Price.text(
    version="book-7",
    prompt_nano_per_mtok=1_000_000_000,
    cached_nano_per_mtok=100_000_000,
    completion_nano_per_mtok=2_000_000_000,
)
"""1, 0.1 and 2 dollars for a million tokens: 1000, 100 and 2000 nano for each."""


class Frontend:
    """One life of one frontend process, with the verbs of its pipeline."""

    def __init__(self, path: Path, epoch: str, **options) -> None:
        self.clock = ManualClock()
        options = {"checkpoint_s": 3600.0, "checkpoint_tokens": 1 << 20, "probe_s": 0.0} | options
        self.store = UsageStore(path, clock=self.clock, epoch=epoch, **options)

    async def accepts(self, request_id: str, tenant_id: str = "acme") -> None:
        opening = Opening(
            tenant_id=tenant_id,
            request_id=request_id,
            key_id="k1",
            model="m",
            version="v1",
            price=PRICE,
            accepted_unix_ms=self.clock.unix_ms(),
        )
        await self.store.open(opening)

    def delivers(self, request_id: str, tokens: int, tenant_id: str = "acme") -> None:
        usage = Usage(prompt_tokens=10, cached_tokens=4, completion_tokens=tokens)
        self.store.checkpoint(tenant_id=tenant_id, request_id=request_id, usage=usage)

    async def ends(
        self,
        request_id: str,
        tokens: int = 5,
        *,
        outcome: Outcome = Outcome.OK,
        tenant_id: str = "acme",
        charge_nano: int | None = None,
    ) -> None:
        usage = Usage(prompt_tokens=10, cached_tokens=4, completion_tokens=tokens)
        settlement = Settlement(
            tenant_id=tenant_id,
            request_id=request_id,
            usage=usage,
            outcome=outcome,
            charge_femto=(
                PRICE.charge_femto(usage) if charge_nano is None else charge_nano * 10**6
            ),
            version="v2",
            first_token_unix_ms=self.clock.unix_ms(),
            settled_unix_ms=self.clock.unix_ms(),
        )
        await self.store.settle(settlement)

    def dies(self) -> None:
        """What others see of a kill: its lock is free, and its checkpoints are lost."""
        self.store._lock.close()

    def record(self, request_id: str):
        return {each.request_id: each for each in self.store.records(limit=1000)}[request_id]

    def ledger(self) -> dict[str, tuple[str, int, int]]:
        """Outcome, completion tokens and charge of each request."""
        return {
            each.request_id: (each.outcome.value, each.usage.completion_tokens, each.charge_nano)
            for each in self.store.records(limit=1000)
        }


class TrickyConnection:
    """A real connection with a hook that runs before each statement and may raise."""

    def __init__(self, path: Path, before: Callable[[str], None]) -> None:
        self._real = usage_schema.connect(path)
        self._before = before

    def execute(self, statement: str, values=()) -> sqlite3.Cursor:
        self._before(statement)
        return self._real.execute(statement, values)

    @property
    def in_transaction(self) -> bool:
        return self._real.in_transaction

    def close(self) -> None:
        self._real.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


@pytest.fixture
def start(path: Path):
    """Starts a frontend; every one that is still running is stopped at the end."""
    running: list[Frontend] = []

    def begin(epoch: str, at: Path = path, **options) -> Frontend:
        running.append(Frontend(at, epoch, **options))
        return running[-1]

    yield begin
    for frontend in running:
        frontend.store.close()


@pytest.fixture
def tricky():
    """Makes a `connect` that runs `before` ahead of each statement."""
    return lambda before: lambda path: TrickyConnection(path, before)


@pytest.fixture
def price() -> Price:
    return PRICE


@pytest.fixture
def run():
    return asyncio.run
