"""The authority debits before it grants, and forgets nothing that matters."""

import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from headrace.serving.admission.lease import LEASE_MS, Ask, Claim, Grant
from headrace.serving.admission.quota_authority import QuotaAuthority, Standing
from headrace.serving.admission.quota_book import QuotaBook
from headrace.serving.domain.limit import Limit, Metric
from headrace.serving.errors import (
    AccountNotFound,
    AmountOutOfRange,
    ConfigRefused,
    QuotaUnavailable,
)

FEMTO = 10**6
DAY_MS = 24 * 3_600_000
NOON = 1_790_078_400_000
"""2026-09-22 12:00 UTC."""

BUDGET = Limit(
    subject="organisation:acme", metric=Metric.BUDGET_DAY, limit=1_000, hard=True, currency="USD"
)
RATE = Limit(subject="key:k1", metric=Metric.INPUT_TOKENS, limit=60, burst=10)
PLACES = Limit(subject="key:k1", metric=Metric.CONCURRENCY, limit=8)


class SteppedClock:
    """Monotonic time and a calendar that somebody sets."""

    def __init__(self) -> None:
        self.now_ms = 0.0
        self.calendar_ms = NOON

    def monotonic_ms(self) -> float:
        return self.now_ms

    def unix_ms(self) -> int:
        return self.calendar_ms


class Desk:
    """An authority and the verbs of its stories."""

    def __init__(self, home: Path, *limits: Limit) -> None:
        self.path = home / "quota.db"
        self.clock = SteppedClock()
        self.limits = limits or (BUDGET,)
        self.seq = 0
        self.opens()

    def opens(self) -> None:
        self.book = QuotaBook(self.path)
        self.authority = QuotaAuthority(self.book, clock=self.clock, limits=self.limits)

    def crashes(self) -> None:
        self.authority.close()
        self.opens()

    def hears(self, claim: Claim, *, holder: str = "f", epoch: str = "1") -> Grant:
        self.seq += 1
        ask = Ask(holder=holder, epoch=epoch, seq=self.seq, claims=(claim,))
        (grant,) = self.authority.lease(ask)
        return grant

    def wants(self, need: int, *, holder: str = "f", epoch: str = "1", of: Limit = BUDGET) -> Grant:
        claim = Claim(limit_name=of.name, need=need, desired=need)
        return self.hears(claim, holder=holder, epoch=epoch)

    @property
    def standing(self) -> Standing:
        return self.authority.standings()[0]


def test_what_was_granted_is_debited_whatever_happens_next(tmp_path: Path):
    desk = Desk(tmp_path)
    grant = desk.wants(600 * FEMTO)

    desk.crashes()

    assert grant.granted == 600 * FEMTO
    assert (desk.standing.held, desk.standing.left) == (600 * FEMTO, 400 * FEMTO)
    assert desk.wants(401 * FEMTO, holder="g").granted == 0
    assert desk.wants(400 * FEMTO, holder="g").granted == 400 * FEMTO


def test_a_grant_that_cannot_be_written_is_not_given(tmp_path: Path):
    desk = Desk(tmp_path)
    desk.book.connection.execute("PRAGMA query_only = ON")
    with pytest.raises(QuotaUnavailable, match="cannot be used"):
        desk.wants(600 * FEMTO)

    desk.book.connection.execute("PRAGMA query_only = OFF")

    assert desk.standing.left == 1_000 * FEMTO


def test_a_repeated_message_is_granted_once(tmp_path: Path):
    desk = Desk(tmp_path)
    claim = Claim(limit_name=BUDGET.name, need=100, desired=100)
    ask = Ask(holder="f", epoch="1", seq=7, claims=(claim,))

    replies = [desk.authority.lease(ask)[0].granted for _ in range(3)]
    desk.authority.lease(replace(ask, seq=6))

    assert replies == [100, 100, 100]
    assert desk.standing.held == 100


def test_slices_shrink_as_the_end_comes_near_and_the_last_femto_is_had(tmp_path: Path):
    """Of 1,000 half is offered to a single holder, then half of the rest; needs go to the end."""
    desk = Desk(tmp_path)
    claim = Claim(limit_name=BUDGET.name, need=1, desired=10**12)
    totals = [desk.hears(claim).granted for _ in range(3)]

    assert totals == [500 * FEMTO, 750 * FEMTO, 875 * FEMTO]
    assert desk.wants(125 * FEMTO, holder="g").granted == 125 * FEMTO
    assert desk.wants(1, holder="g").granted == 125 * FEMTO


def test_money_of_the_dead_stays_spent_until_their_log_is_read(tmp_path: Path):
    desk = Desk(tmp_path)
    lost = desk.wants(600 * FEMTO)
    desk.clock.now_ms += 10 * LEASE_MS
    assert desk.wants(500 * FEMTO, epoch="2").granted == 0

    (lease,) = desk.authority.open_leases("f", epoch="2")
    desk.authority.resolve(lease.lease_id, spent=50 * FEMTO)
    desk.authority.resolve(lease.lease_id, spent=60 * FEMTO)

    assert lease.lease_id == lost.lease_id
    assert (desk.standing.spent, desk.standing.left) == (50 * FEMTO, 950 * FEMTO)
    late = Claim(limit_name=BUDGET.name, lease_id=lost.lease_id, spent=90 * FEMTO, desired=1)
    assert desk.hears(late).is_closed
    assert desk.standing.spent == 50 * FEMTO


@pytest.mark.parametrize("spent", [99, 601, -1])
def test_a_resolution_that_cannot_be_right_is_refused(tmp_path: Path, spent: int):
    desk = Desk(tmp_path)
    lease_id = desk.wants(600).lease_id
    desk.hears(Claim(limit_name=BUDGET.name, lease_id=lease_id, spent=100))

    with pytest.raises(AmountOutOfRange):
        desk.authority.resolve(lease_id, spent=spent)
    with pytest.raises(AccountNotFound):
        desk.authority.resolve("no such lease", spent=0)


def test_a_new_day_is_a_new_budget_and_the_old_lease_ends_with_the_old_day(tmp_path: Path):
    desk = Desk(tmp_path)
    desk.clock.calendar_ms = NOON + DAY_MS // 2 - 5_000
    evening = desk.wants(1_000 * FEMTO)
    desk.clock.calendar_ms += 5_000
    claim = Claim(limit_name=BUDGET.name, lease_id=evening.lease_id, need=700, desired=700)
    morning = desk.hears(claim)

    assert evening.expires_in_ms == 5_000
    assert morning.lease_id != evening.lease_id
    assert (desk.standing.period, desk.standing.held) == ("2026-09-23", 700)


def test_a_clock_that_is_set_back_opens_no_period_twice(tmp_path: Path):
    """A day back and a restart: it is still the later day, whose budget is what it was."""
    desk = Desk(tmp_path)
    desk.wants(1_000 * FEMTO)
    desk.clock.calendar_ms -= DAY_MS
    assert desk.wants(1, holder="g").granted == 0
    desk.crashes()

    assert desk.wants(1, holder="h").granted == 0
    assert desk.standing.period == "2026-09-22"


@pytest.mark.parametrize(
    ("metric", "period", "ends_in_ms"),
    [
        (Metric.BUDGET_DAY, "2026-12-31", 1),
        (Metric.BUDGET_MONTH, "2026-12", 1),
        (Metric.BUDGET_TOTAL, "", LEASE_MS),
    ],
)
def test_periods_end_with_the_year_to_the_millisecond(
    tmp_path: Path, metric: Metric, period: str, ends_in_ms: int
):
    budget = replace(BUDGET, metric=metric)
    desk = Desk(tmp_path, budget)
    desk.clock.calendar_ms = 1_798_761_599_999

    grant = desk.wants(1, of=budget)

    assert desk.standing.period == period
    assert grant.expires_in_ms == ends_in_ms


def test_a_rate_is_empty_after_a_start_and_says_how_long_to_wait(tmp_path: Path):
    """What was granted before is not known to have drained: 60 a minute, one a second."""
    desk = Desk(tmp_path, RATE)
    refused = desk.wants(3, of=RATE)
    desk.clock.now_ms += 3_000
    granted = desk.wants(3, of=RATE)

    assert (refused.granted, refused.wait_ms) == (0, 3_000)
    assert granted.granted == 3


def test_returned_tokens_of_a_rate_can_be_had_by_others(tmp_path: Path):
    desk = Desk(tmp_path, RATE)
    desk.clock.now_ms += 10_000
    mine = desk.wants(10, of=RATE)
    assert desk.wants(4, of=RATE, holder="g").granted == 0

    desk.hears(Claim(limit_name=RATE.name, lease_id=mine.lease_id, returned=4))

    assert desk.wants(4, of=RATE, holder="g").granted == 4


def test_places_of_a_silent_frontend_are_free_after_its_lease(tmp_path: Path):
    desk = Desk(tmp_path, PLACES)
    desk.wants(8, of=PLACES)
    assert desk.wants(1, of=PLACES, holder="g").granted == 0

    desk.clock.now_ms += LEASE_MS + 1

    assert desk.wants(1, of=PLACES, holder="g").granted == 1


def test_a_soft_budget_counts_what_was_spent_beyond_it(tmp_path: Path):
    soft = replace(BUDGET, hard=False)
    desk = Desk(tmp_path, soft)
    lease_id = desk.wants(100, of=soft).lease_id
    desk.hears(Claim(limit_name=soft.name, lease_id=lease_id, spent=1_500 * FEMTO))

    assert (desk.standing.spent, desk.standing.left) == (1_500 * FEMTO, -500 * FEMTO)


def test_a_raised_limit_leaves_what_was_spent(tmp_path: Path):
    desk = Desk(tmp_path)
    desk.wants(1_000 * FEMTO)
    desk.authority.use([replace(BUDGET, limit=1_500)])

    assert desk.wants(500 * FEMTO, holder="g").granted == 500 * FEMTO


def test_what_is_over_is_folded_and_its_sum_stays(tmp_path: Path):
    total = replace(BUDGET, metric=Metric.BUDGET_TOTAL)
    desk = Desk(tmp_path, total)
    for holder in ("f", "g"):
        lease_id = desk.wants(100, of=total, holder=holder).lease_id
        closing = Claim(limit_name=total.name, lease_id=lease_id, spent=30, closes=True)
        desk.hears(closing, holder=holder)
    desk.clock.now_ms += 2 * DAY_MS
    desk.clock.calendar_ms += 2 * DAY_MS
    assert desk.standing.spent == 60
    desk.crashes()

    assert list(desk.book.leases()) == []
    assert desk.standing.spent == 60


def test_a_stranger_cannot_speak_for_another_holder(tmp_path: Path):
    desk = Desk(tmp_path)
    lease_id = desk.wants(600).lease_id
    desk.hears(Claim(limit_name=BUDGET.name, lease_id=lease_id, closes=True), holder="g")

    assert desk.standing.held == 600


@pytest.mark.parametrize("wrong", [{"spent": -1}, {"returned": -1}, {"need": -1}, {"desired": -1}])
def test_a_negative_amount_is_refused(tmp_path: Path, wrong: dict):
    desk = Desk(tmp_path)

    with pytest.raises(AmountOutOfRange):
        desk.hears(Claim(limit_name=BUDGET.name, **wrong))


def test_an_unknown_limit_is_granted_nothing(tmp_path: Path):
    assert Desk(tmp_path).wants(5, of=RATE).lease_id == ""


def test_amounts_pass_64_bits(tmp_path: Path):
    """A budget of nine billion, spent by one frontend."""
    huge = replace(BUDGET, limit=9 * 10**18)
    desk = Desk(tmp_path, huge)
    lease_id = desk.wants(9 * 10**24, of=huge).lease_id
    desk.hears(Claim(limit_name=huge.name, lease_id=lease_id, spent=9 * 10**24 - 1))
    desk.crashes()

    assert (desk.standing.spent, desk.standing.left) == (9 * 10**24 - 1, 0)


def test_another_versions_book_is_left_alone(tmp_path: Path):
    with sqlite3.connect(tmp_path / "quota.db") as other:
        other.execute("PRAGMA user_version = 99")
    other.close()

    with pytest.raises(ConfigRefused, match="format 99"):
        QuotaBook(tmp_path / "quota.db")
