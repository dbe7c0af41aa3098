"""Many frontends, one quota authority, and everything that can go wrong between them.

Seeded and in virtual time: messages are lost, repeated and overtaken, frontends are cut off and
die with money in their hands, the authority dies, its writes fail, its clock is set forward and
back. After every event, what was charged against a hard budget is at most the budget.
"""

import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from headrace.serving.admission.lease import Ask
from headrace.serving.admission.lease_bucket import Want
from headrace.serving.admission.lease_keeper import LeaseHolder
from headrace.serving.admission.quota_authority import QuotaAuthority
from headrace.serving.admission.quota_book import QuotaBook
from headrace.serving.admission.quota_hold import HeldMoney
from headrace.serving.domain.limit import Limit, Metric
from headrace.serving.domain.usage import FEMTO_PER_NANO
from headrace.serving.errors import QuotaUnavailable

MS = 1_000_000
HOUR_MS = 3_600_000
DAY = Limit(
    subject="organisation:acme", metric=Metric.BUDGET_DAY, limit=150, hard=True, currency="USD"
)
DAY_FEMTO = DAY.limit * FEMTO_PER_NANO


@dataclass
class SteppedClock:
    """Monotonic time and a calendar that somebody sets."""

    now_ms: float = 0
    offset_ms: int = 1_790_035_190_000
    """Ten seconds before midnight."""

    def monotonic_ms(self) -> float:
        return self.now_ms

    def unix_ms(self) -> int:
        return int(self.now_ms) + self.offset_ms


class FaultyBook(QuotaBook):
    """A disk that fails now and then."""

    fails = False

    def save(self, leases) -> None:
        super().save(leases)
        if self.fails:
            raise OSError("no space left")


@dataclass
class Request:
    money: HeldMoney
    delivered: int = 0


@dataclass
class Frontend:
    """One life of a frontend, and its meter log: what it has charged of each lease."""

    name: str
    epoch: int
    holder: LeaseHolder = field(init=False)
    running: list[Request] = field(default_factory=list)
    is_cut_off: bool = False

    def __post_init__(self) -> None:
        self.holder = LeaseHolder(holder=self.name, epoch=str(self.epoch))


class World:
    """What happens, one random event after another."""

    def __init__(self, path: Path, seed: int, *, num_frontends: int = 4) -> None:
        self.random = random.Random(seed)
        self.clock = SteppedClock()
        self.path = path
        self.log: Counter[str] = Counter()
        """Charged of each lease: what all meter logs together say."""
        self.refused = 0
        self.wire: list[tuple[float, Frontend | None, object]] = []
        self.open_authority()
        self.frontends = [Frontend(f"f{i}", 0) for i in range(num_frontends)]

    def open_authority(self) -> None:
        book = FaultyBook(self.path)
        book.connection.execute("PRAGMA synchronous = OFF")  # The power does not fail here.
        self.book = book
        self.authority = QuotaAuthority(book, clock=self.clock, limits=[DAY])

    def spent_of(self, period: str) -> int:
        return sum(spent for lease, spent in self.log.items() if _period(lease) == period)

    def in_flight(self, period: str) -> int:
        return sum(
            request.delivered
            for frontend in self.frontends
            for request in frontend.running
            if _period(request.money.parts[0][0].lease_id) == period
        )

    def check(self) -> None:
        for period in {_period(lease) for lease in self.log}:
            used = self.spent_of(period) + self.in_flight(period)
            assert used <= DAY_FEMTO, f"{period}: {used - DAY_FEMTO} femto too many"

    # What frontends do.

    def request(self, frontend: Frontend) -> None:
        """A request comes: it starts if its start is covered, else asks and comes again later."""
        start = self.random.randint(1, 20) * FEMTO_PER_NANO + self.random.randint(0, 999)
        bucket = frontend.holder.bucket(DAY, now_ns=self.now_ns)
        bucket.waiting.clear()
        if not bucket.fits(start, self.now_ns):
            bucket.waiting.append(Want(start, start + 10**7))
            frontend.holder.hurry(bucket)
            self.refused += 1
            return
        wanted = start + self.random.randint(0, 10**8)
        money = HeldMoney(bucket, wanted, self.now_ns)
        frontend.running.append(Request(money))

    def work(self, frontend: Frontend) -> None:
        """An answer grows by a chunk, if that is covered; otherwise it ends where it is."""
        if not frontend.running:
            return
        request = self.random.choice(frontend.running)
        more = self.random.randint(1, 3 * 10**6)
        missing = request.delivered + more - request.money.total
        bucket = request.money.bucket
        ends = self.random.random() < 0.1
        if missing > 0:
            if bucket.fits(missing, self.now_ns):
                request.money.add(missing)
            else:
                ends, more = True, 0
        request.delivered += more
        if ends:
            self.settle(frontend, request)

    def settle(self, frontend: Frontend, request: Request) -> None:
        frontend.running.remove(request)
        self.write_log(request)
        request.money.settle(request.delivered)

    def write_log(self, request: Request) -> None:
        left = request.delivered
        for account, held in request.money.parts:
            self.log[account.lease_id] += min(held, left)
            left -= min(held, left)

    def say(self, frontend: Frontend) -> None:
        ask = frontend.holder.ask(self.now_ns)
        if ask is not None:
            self.post(None, (frontend, ask, self.now_ns), cut=frontend.is_cut_off)

    def dies(self, frontend: Frontend) -> None:
        """Nobody says goodbye. The meter log keeps what was delivered; a successor resolves it."""
        for request in frontend.running:
            self.write_log(request)
        index = self.frontends.index(frontend)
        self.frontends[index] = Frontend(frontend.name, frontend.epoch + 1)

    def resolve(self, frontend: Frontend) -> None:
        """What a successor does once it has read its predecessor's log."""
        for lease in self.authority.open_leases(frontend.name, epoch=str(frontend.epoch)):
            self.authority.resolve(lease.lease_id, spent=self.log[lease.lease_id])

    # What the network does.

    def post(self, to: Frontend | None, what: object, *, cut: bool) -> None:
        """To the authority (None) or a frontend: maybe never, maybe twice, maybe late."""
        copies = self.random.choices([0, 1, 2, 3], [20, 65, 10, 5])[0]
        for _ in range(0 if cut else copies):
            delay_ms = self.random.choice([1, 5, 50, 500, 5_000])
            self.wire.append((self.clock.now_ms + delay_ms, to, what))

    def deliver(self) -> None:
        due = [each for each in self.wire if each[0] <= self.clock.now_ms]
        self.wire = [each for each in self.wire if each[0] > self.clock.now_ms]
        self.random.shuffle(due)
        for _, to, what in due:
            if to is None:
                frontend, ask, sent_ns = what
                self.authority_hears(frontend, ask, sent_ns)
            elif to in self.frontends:
                ask, grants, sent_ns = what
                to.holder.apply(ask, grants, sent_ns=sent_ns)

    def authority_hears(self, frontend: Frontend, ask: Ask, sent_ns: int) -> None:
        self.book.fails = self.random.random() < 0.05
        try:
            grants = self.authority.lease(ask)
        except QuotaUnavailable:
            return
        finally:
            self.book.fails = False
        self.post(frontend, (ask, grants, sent_ns), cut=frontend.is_cut_off)

    @property
    def now_ns(self) -> int:
        return int(self.clock.now_ms) * MS

    def step(self) -> None:
        self.clock.now_ms += self.random.choice([0, 1, 10, 200])
        frontend = self.random.choice(self.frontends)
        match self.random.random():
            case p if p < 0.35:
                self.request(frontend)
            case p if p < 0.75:
                self.work(frontend)
            case p if p < 0.93:
                self.say(frontend)
            case p if p < 0.95:
                frontend.is_cut_off = not frontend.is_cut_off
            case p if p < 0.96:
                self.dies(frontend)
            case p if p < 0.975:
                self.resolve(frontend)
            case p if p < 0.985:
                self.authority.close()
                self.open_authority()
            case p if p < 0.99:
                self.clock.offset_ms += self.random.choice([-HOUR_MS, HOUR_MS, 24 * HOUR_MS])
            case _:
                self.clock.now_ms += self.random.choice([1_000, 20_000, 40_000])
        self.deliver()
        self.check()

    def calm(self) -> None:
        """Everything heals; requests of the least size come until nothing is left."""
        self.wire.clear()
        for frontend in self.frontends:
            frontend.is_cut_off = False
            for request in list(frontend.running):
                self.settle(frontend, request)
            self.resolve(frontend)

    def drain(self) -> None:
        """Ask and spend, in order and without loss, until the authority has nothing more."""
        for _ in range(4000):
            self.clock.now_ms += 100
            spent = False
            for frontend in self.frontends:
                bucket = frontend.holder.bucket(DAY, now_ns=self.now_ns)
                frontend.holder.hurry(bucket)
                ask = frontend.holder.ask(self.now_ns)
                if ask is not None:
                    frontend.holder.apply(ask, self.authority.lease(ask), sent_ns=self.now_ns)
                bucket.waiting[:] = [Want(1, 1)]
                if room := bucket.room(self.now_ns):
                    request = Request(HeldMoney(bucket, room, self.now_ns), delivered=room)
                    frontend.running.append(request)
                    self.settle(frontend, request)
                    spent = True
            self.check()
            period = self.authority.standings()[0].period
            if not spent and self.spent_of(period) == DAY_FEMTO:
                return

    def book_of(self, period: str) -> int:
        """What the authority knows to be spent."""
        leases = (lease.spent for lease in self.book.leases() if lease.period == period)
        return sum(leases) + self.book.past().get((DAY.name, period), 0)


def _period(lease_id: str) -> str:
    return lease_id.rpartition("@")[2].partition("~")[0]


@pytest.mark.parametrize("seed", range(40))
def test_a_hard_budget_is_never_overspent_by_one_femto(tmp_path: Path, seed: int) -> None:
    world = World(tmp_path / "quota.db", seed)
    for _ in range(1_500):
        world.step()
    world.check()

    world.calm()
    world.drain()

    standing = world.authority.standings()[0]
    assert world.spent_of(standing.period) == DAY_FEMTO, "some of it was lost for good"
    for period in {_period(lease) for lease in world.log}:
        assert world.book_of(period) == world.spent_of(period), period
