"""Thousands of requests over many crashes, seeded; log and ledger checked after every recovery.

HEADRACE_SOAK_SEEDS=2600 makes it a soak of a million requests; a seed that fails stands in the
test's name.
"""

import asyncio
import contextlib
import os
import random
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from headrace.serving.errors import MeterLogDamaged, MeterUnavailable
from headrace.serving.metering.ledger.ledger import Ledger
from headrace.serving.metering.ledger.reconcile import reconcile
from headrace.serving.metering.ledger.sqlite_database import SqliteDatabase
from headrace.serving.metering.meterlog.reader import Logged, LogReader
from headrace.serving.testing.clock import ManualClock
from headrace.serving.testing.sim_disk import Fault, SimDisk

FOLDER = Path("/log")
SEEDS = int(os.environ.get("HEADRACE_SOAK_SEEDS", "16"))
LIVES = 14
CHECKPOINT_TOKENS = 16
SEGMENT_BYTES = 32 << 10
FREE_BYTES = 8 << 20


class SteppedClock(ManualClock):
    """Its wall clock may be set forwards and back; its monotonic one may not."""

    step_ms = 0

    def unix_ms(self) -> int:
        return int(self.now_ms) + self.step_ms


@dataclass
class Stream:
    """An open request, as its caller knows it."""

    delivered: int = 0
    delivered_before_turn: int = 0
    """When the writer last finished a turn."""


@dataclass
class Truth:
    """What callers were told, over all lives."""

    opened: dict[str, Stream] = field(default_factory=dict)
    settled: dict[str, int] = field(default_factory=dict)
    """Tokens, of settlements that were acknowledged."""
    settling: set[str] = field(default_factory=set)
    refused: set[str] = field(default_factory=set)
    projected: list[tuple[int, bytes]] = field(default_factory=list)
    names: int = 0

    def check(self, told: dict[str, list[tuple[str, int, int]]]) -> None:
        for name, stream in self.opened.items():
            ends = [entry for entry in told[name] if entry[0] not in ("reserve", "checkpoint")]
            assert len(ends) == 1, (name, told[name])
            kind, tokens, nano = ends[0]
            assert tokens <= stream.delivered, (name, ends, stream)
            assert nano == (6_400 + 2_000 * tokens if kind in ("ok", "recovered") else 0)
            if name in self.settled:
                assert kind in ("ok", "void")
                assert tokens == self.settled[name], (name, ends, stream)
            elif name not in self.settling:
                assert kind in ("recovered", "expire"), (name, ends)
                lost = stream.delivered_before_turn - tokens
                assert lost < CHECKPOINT_TOKENS, (name, ends, stream)
        for name, entries in told.items():
            assert len([entry for entry in entries if entry[0] != "checkpoint"]) <= 2
            if name not in self.opened and name not in self.refused:
                # Nobody was told that it was opened, so nothing was delivered or is charged.
                assert all(nano == 0 for _, _, nano in entries), (name, entries)
        assert all(told[name] == [("refuse", 0, 0)] for name in self.refused)


class Life:
    """One life of a frontend: callers come, stream, hang up, and the machine dies."""

    def __init__(self, frontend, truth: Truth, rng: random.Random) -> None:
        self.frontend = frontend
        self.truth = truth
        self.rng = rng
        self.open: dict[str, Stream] = {}
        self.tasks: set[asyncio.Task[None]] = set()
        self.reader = LogReader(
            FOLDER, files=frontend.disk, durable_seq=lambda: frontend.log.durable_seq
        )

    async def runs(self) -> None:
        for _ in range(self.rng.randrange(20, 250)):
            self.rng.choices(
                [self.arrives, self.streams, self.ends, self.refuses, self.leaves, self.clocks],
                [5, 9, 4, 1, 1, 1],
            )[0]()
            await asyncio.sleep(0)
            if self.rng.random() < 0.4 and not await self.turns():
                break
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    async def turns(self) -> bool:
        runs = self.frontend.turn()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        if runs:
            for stream in self.open.values():
                stream.delivered_before_turn = stream.delivered
            if self.rng.random() < 0.3:
                self.projects()
        return runs

    def projects(self) -> None:
        projected = self.truth.projected
        new = self.reader.after(projected[-1][0] if projected else 0)
        projected += [(record.seq, record.event.SerializeToString()) for record in new]
        if projected:
            self.frontend.log.projected(projected[-1][0])

    def does(self, work) -> asyncio.Task[None]:
        async def quietly() -> None:
            with contextlib.suppress(MeterUnavailable):
                await work

        task = asyncio.ensure_future(quietly())
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    def name(self) -> str:
        self.truth.names += 1
        return f"r{self.truth.names}"

    def arrives(self) -> None:
        name = self.name()

        async def accepted() -> None:
            await self.frontend.log.open(self.frontend.opening(name))
            self.open[name] = self.truth.opened[name] = Stream()

        self.does(accepted())

    def leaves(self) -> None:
        """A caller that hangs up at once, or while it waits."""
        task = self.does(self.frontend.log.open(self.frontend.opening(self.name())))
        asyncio.get_running_loop().call_soon(task.cancel)

    def streams(self) -> None:
        if self.open:
            name = self.rng.choice(list(self.open))
            self.open[name].delivered += self.rng.randrange(1, 12)
            self.frontend.delivers(name, self.open[name].delivered)

    def ends(self) -> None:
        if not self.open:
            return
        name = self.rng.choice(list(self.open))
        stream = self.open.pop(name)
        self.truth.settling.add(name)
        ending = self.frontend.ending(name, stream.delivered)

        async def settled() -> None:
            twice = self.rng.random() < 0.1
            for _ in range(1 + twice):
                await self.frontend.log.settle(ending)
                self.truth.settled[name] = stream.delivered

        self.does(settled())

    def refuses(self) -> None:
        name = f"{self.name()}#x"

        async def refused() -> None:
            task = asyncio.ensure_future(self.frontend.refuses(name))
            await task
            self.truth.refused.add(name)

        self.does(refused())

    def clocks(self) -> None:
        clock = self.frontend.clock
        clock.advance(seconds=self.rng.choice([0.1, 1.0, 900.0]))
        clock.step_ms = self.rng.choice([0, 0, -3_600_000, 3_600_000])


def dies(disk: SimDisk, rng: random.Random) -> SimDisk:
    """A power cut, or a kill."""
    return disk.after_kill() if rng.random() < 0.3 else disk.after_power_cut(rng)


@dataclass
class Shelf:
    """The log's records as a ledger's source."""

    records: list[Logged]

    @property
    def log_id(self) -> str:
        return self.records[0].log_id

    def after(self, seq: int, limit: int) -> list[Logged]:
        return self.records[seq : seq + limit]


def delivers(shelf: Shelf, ledger: Ledger, rng: random.Random) -> None:
    """At least once: batches of any size, old ones again, later ones too early."""
    records, log_id = shelf.records, shelf.log_id
    mark = ledger.high_water(log_id)
    while mark < len(records):
        first = rng.randrange(max(0, mark - 80), mark + 1)
        batch = records[first : first + rng.randrange(1, 120)]
        for _ in range(rng.choice((1, 1, 2))):
            mark = ledger.apply(log_id, batch)
        if mark + 1 < len(records) and rng.random() < 0.2:
            with pytest.raises(MeterLogDamaged):
                ledger.apply(log_id, records[mark + 1 :])


def simulate(seed: int, start, told, read, ledger: Ledger) -> Truth:
    rng = random.Random(seed)
    truth = Truth()
    disk = SimDisk(free_bytes=FREE_BYTES)
    for life in range(LIVES):
        doom = disk.operations + rng.randrange(5, 160)
        if rng.random() < 0.5:
            disk.cut_at = doom
        elif rng.random() < 0.6:
            disk.faults = {doom: rng.choice(list(Fault))}
        if rng.random() < 0.2:
            disk.free_bytes = rng.randrange(SEGMENT_BYTES * 4)
        with contextlib.suppress(MeterUnavailable):
            frontend = start(
                disk,
                epoch=f"life-{life}",
                clock=SteppedClock(),
                segment_bytes=SEGMENT_BYTES,
                checkpoint_tokens=CHECKPOINT_TOKENS,
                checkpoint_s=1.0,
            )
            asyncio.run(Life(frontend, truth, rng).runs())
        disk = dies(disk, rng)
        disk.free_bytes = max(disk.free_bytes, FREE_BYTES)
        start(disk, epoch=f"check-{life}", segment_bytes=SEGMENT_BYTES).log.close()
        truth.check(told(disk))
        kept = [(record.seq, record.event.SerializeToString()) for record in read(disk)]
        assert kept[: len(truth.projected)] == truth.projected, "the ledger had what the log lost"
        shelf = Shelf(read(disk))
        delivers(shelf, ledger, rng)
        disk = disk.after_kill()
    found = reconcile([shelf], ledger)
    assert found.agree, found.differences
    assert found.open_requests == 0
    return truth


@pytest.mark.parametrize("seed", range(SEEDS))
def test_whatever_happens_every_request_ends_once_and_nothing_acknowledged_is_lost(
    seed, start, told, read, tmp_path
):
    ledger = Ledger(SqliteDatabase(tmp_path / "ledger.db"))
    truth = simulate(seed, start, told, read, ledger)
    ledger.close()

    assert len(truth.opened) > 50
    assert len(truth.settled) > 15
