"""A frontend as its meter log sees it, on a disk that can be told to fail."""

import asyncio
import random
from collections.abc import Coroutine
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from headrace.serving.config_metering import MeterConfig
from headrace.serving.domain.record import Opening, Refused, Settlement
from headrace.serving.domain.usage import Outcome, Price, Usage
from headrace.serving.metering.meterlog.meter_log import MeterLog
from headrace.serving.metering.meterlog.reader import LogReader
from headrace.serving.metering.meterlog.verify import verify
from headrace.serving.metering.meterlog.writer import Writer
from headrace.serving.testing.clock import ManualClock
from headrace.serving.testing.sim_disk import SimDisk

FOLDER = Path("/log")
PRICE = Price.text(
    version="book-7",
    prompt_nano_per_mtok=1_000_000_000,
    cached_nano_per_mtok=100_000_000,
    completion_nano_per_mtok=2_000_000_000,
)
"""1, 0.1 and 2 dollars for a million tokens: 1000, 100 and 2000 nano for each."""
BOUNDS = MeterConfig(segment_bytes=64 << 10, checkpoint_s=3600.0, checkpoint_tokens=1 << 20)


def usage(tokens: int) -> Usage:
    """6 fresh and 4 cached prompt tokens: 6,400 nano, and 2,000 for each token."""
    return Usage(prompt_tokens=10, cached_tokens=4, completion_tokens=tokens)


class Frontend:
    """One life of one frontend. Its writer takes a turn when it is told to, so nothing races."""

    def __init__(self, disk: SimDisk, epoch: str = "life", **options: Any) -> None:
        self.disk = disk
        self.clock = options.pop("clock", None) or ManualClock()
        self.failures: list[str] = []
        self.writer: Writer
        self._runs = True
        names = {each.name for each in fields(MeterConfig)} & options.keys()
        config = replace(BOUNDS, **{name: options.pop(name) for name in names})
        given: dict[str, Any] = {"was_used": lambda *_: False, "probe_s": 0.0} | options
        self.log = MeterLog(
            FOLDER,
            clock=self.clock,
            epoch=epoch,
            files=disk,
            config=config,
            start=self._adopt,
            on_failed=self.failures.append,
            **given,
        )

    def _adopt(self, writer: Writer):
        self.writer = writer

        def ends() -> None:
            while self.turn():
                pass

        return ends

    def turn(self) -> bool:
        """Let the writer take what waits."""
        self._runs = self._runs and self.writer.turn(0)
        return self._runs

    async def until_done(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Turns of the writer, until the work is answered."""
        task = asyncio.ensure_future(work)
        while not task.done():
            await asyncio.sleep(0)
            self.turn()
            await asyncio.sleep(0)
        return await task

    def opening(self, request_id: str, tenant_id: str = "acme", **fields: Any) -> Opening:
        values: dict[str, Any] = {
            "tenant_id": tenant_id,
            "request_id": request_id,
            "key_id": "k1",
            "model": "m",
            "version": "v1",
            "price": PRICE,
            "accepted_unix_ms": self.clock.unix_ms(),
            "hold_femto": 10**12,
        }
        return Opening(**(values | fields))

    def ending(self, request_id: str, tokens: int, **fields: Any) -> Settlement:
        used = usage(tokens) if tokens else Usage()
        values: dict[str, Any] = {
            "tenant_id": "acme",
            "request_id": request_id,
            "usage": used,
            "outcome": Outcome.OK,
            "charge_femto": PRICE.charge_femto(used),
            "version": "v2",
            "first_token_unix_ms": self.clock.unix_ms() if tokens else None,
            "settled_unix_ms": self.clock.unix_ms(),
        }
        return Settlement(**(values | fields))

    async def accepts(self, request_id: str, tenant_id: str = "acme", **fields: Any) -> None:
        await self.until_done(self.log.open(self.opening(request_id, tenant_id, **fields)))

    def delivers(self, request_id: str, tokens: int) -> None:
        self.log.checkpoint(tenant_id="acme", request_id=request_id, usage=usage(tokens))

    async def flushes(self) -> None:
        await self.until_done(self.log.flush())

    async def ends(self, request_id: str, tokens: int = 5, **fields: Any) -> None:
        await self.until_done(self.log.settle(self.ending(request_id, tokens, **fields)))

    async def refuses(self, request_id: str) -> None:
        refused = Refused(
            tenant_id="acme",
            request_id=request_id,
            key_id="k1",
            model="m",
            price=PRICE,
            outcome=Outcome.REJECTED,
            refused_unix_ms=self.clock.unix_ms(),
        )
        await self.until_done(self.log.refuse(refused))


def records(disk: SimDisk):
    """Every record of the log."""
    return LogReader(FOLDER, files=disk).after(0, limit=1 << 20)


def story(disk: SimDisk) -> dict[str, list[tuple[str, int, int]]]:
    """What the log says of each request: kinds, completion tokens and charges in nano."""
    verify(FOLDER, files=disk)
    found: dict[str, list[tuple[str, int, int]]] = {}
    names: dict[int, str] = {}
    for record in records(disk):
        kind = record.event.WhichOneof("kind")
        message = getattr(record.event, kind)
        if kind == "reserve":
            names[record.seq] = message.request_id
        if kind == "checkpoint":
            entry = (kind, message.usage.completion_tokens, 0)
        elif kind == "settle":
            nano = message.charge_femto // 10**6
            entry = (message.outcome, message.usage.completion_tokens, nano)
        else:
            entry = (kind, 0, 0)
        if kind in ("checkpoint", "settle", "void", "expire"):
            found.setdefault(names[message.reserve], []).append(entry)
        elif kind in ("reserve", "refuse"):
            found.setdefault(message.request_id, []).append(entry)
    return found


@pytest.fixture
def disk() -> SimDisk:
    return SimDisk()


@pytest.fixture
def start(disk: SimDisk):
    """Starts a frontend on the disk."""

    def begin(at: SimDisk | None = None, **options: Any) -> Frontend:
        return Frontend(at or disk, **options)

    return begin


@pytest.fixture
def run():
    return asyncio.run


@pytest.fixture
def told():
    return story


@pytest.fixture
def read():
    return records


@pytest.fixture
def rng() -> random.Random:
    return random.Random(1)
