"""
The monthly statement: attainment over all that was offered, and credits by rule, in integers.

Expected figures are worked by hand.
"""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.serving.domain.record import UsageRecord
from headrace.serving.domain.tier import Objective, Receipt, Tier, Verdict
from headrace.serving.domain.usage import Outcome, Usage
from headrace.serving.errors import ConfigRefused, InvalidRequest
from headrace.serving.metering import sla
from headrace.serving.metering.sla import CreditRule, Line, Statement, statement
from headrace.serving.metering.sla_month import Month
from headrace.serving.metering.sla_signature import StatementKey, statement_json, verify

NOVEMBER = Month.parse("2026-11")
BEGINS = NOVEMBER.begins_unix_ms
PROMISED = Objective(ttft_ms_max=1_000, itl_ms_max=50, ttft_ppm=950_000, itl_ppm=990_000)
SECRET = b"11" * 32


def request(
    number: int,
    *missed: str,
    minute: int = 0,
    verdict: Verdict | None = None,
    tier: Tier = Tier.PRIORITY,
    outcome: Outcome = Outcome.OK,
    charge_femto: int = 1_000,
    tenant: str = "acme",
    has_receipt: bool = True,
    itl_p99_us: int | None = 20_000,
) -> UsageRecord:
    receipt = Receipt(
        tier_asked=tier,
        tier_served=tier,
        itl_p99_us=itl_p99_us,
        verdict=verdict or (Verdict.MISSED if missed else Verdict.MET),
        missed=missed,
    )
    return UsageRecord(
        tenant_id=tenant,
        request_id=f"r{number}",
        key_id="k",
        model="m",
        version="v",
        usage=Usage(),
        outcome=outcome,
        charge_nano=0,
        currency="USD",
        price_version="p",
        accepted_unix_ms=BEGINS + minute * 60_000 + number,
        first_token_unix_ms=None,
        settled_unix_ms=None,
        replicas_tried=1,
        charge_femto=charge_femto,
        tier=tier,
        receipt=receipt if has_receipt else None,
    )


def stated(*records: UsageRecord, objective: Objective = PROMISED) -> Statement:
    return statement(
        records, tenant_id="acme", month=NOVEMBER, objective_of=lambda model, tier: objective
    )


def only_line(*records: UsageRecord, objective: Objective = PROMISED) -> Line:
    (line,) = stated(*records, objective=objective).lines
    return line


def attained(line: Line) -> dict[str, tuple[int, int, int]]:
    return {
        each.objective: (each.met, each.counted, each.attained_ppm) for each in line.attainments
    }


def test_a_month_that_kept_its_promises_gives_nothing_back() -> None:
    line = only_line(*(request(number, minute=number) for number in range(20)))

    assert attained(line) == {
        "ttft": (20, 20, 1_000_000),
        "itl": (20, 20, 1_000_000),
        "availability": (20, 20, 1_000_000),
    }
    assert (line.credit_ppm, line.credit_femto, line.charge_femto) == (0, 0, 20_000)


def test_a_refusal_of_ours_is_a_miss_of_the_first_token_too() -> None:
    """Otherwise refusing what would be late would improve the figure."""
    refused = request(1, "availability", outcome=Outcome.REJECTED, charge_femto=0, itl_p99_us=None)

    line = only_line(request(0), refused)

    assert attained(line)["ttft"] == (1, 2, 500_000)
    assert attained(line)["itl"] == (1, 1, 1_000_000)


def test_what_the_caller_ended_is_left_out() -> None:
    left = request(1, verdict=Verdict.EXCLUDED, outcome=Outcome.CANCELLED)

    line = only_line(request(0), left)

    assert (line.requests, line.excluded) == (2, 1)
    assert attained(line)["ttft"] == (1, 1, 1_000_000)


@pytest.mark.parametrize(
    ("failed", "down"),
    [
        pytest.param(1, 0, id="one failure in twenty is no outage"),
        pytest.param(2, 1, id="two are"),
    ],
)
def test_a_minute_is_down_when_more_than_one_in_twenty_failed(failed: int, down: int) -> None:
    records = [
        request(number, *(["availability"] if number < failed else []), minute=3)
        for number in range(20)
    ]

    line = only_line(*records)

    assert line.down_minutes == down
    assert [minute.failed for minute in line.down] == [failed] * down


def test_minutes_in_which_nothing_was_asked_for_prove_nothing() -> None:
    """One of two minutes was down: 50 %, though a month has 43,200."""
    line = only_line(request(0, minute=1), request(1, "availability", minute=900))

    assert attained(line)["availability"] == (1, 2, 500_000)


@pytest.mark.parametrize(
    ("down", "credit_ppm"),
    [
        pytest.param(1, 0, id="99.9 %: as promised"),
        pytest.param(2, 100_000, id="99.8 %: a tenth"),
        pytest.param(11, 250_000, id="98.9 %: a quarter"),
    ],
)
def test_credits_follow_the_availability_in_steps(down: int, credit_ppm: int) -> None:
    """A thousand minutes of one request each, of which so many failed."""
    objective = Objective(availability_ppm=999_000)
    records = (request(n, *(["availability"] if n < down else []), minute=n) for n in range(1_000))

    line = only_line(*records, objective=objective)

    assert line.credit_ppm == credit_ppm
    assert line.credit_femto == 1_000_000 * credit_ppm // 1_000_000


def test_the_greatest_credit_counts_and_they_do_not_add_up() -> None:
    """TTFT at 80 % of a promised 95 is a tenth; ITL at 98 % of 99 a twentieth."""
    records = [
        request(n, *(["ttft"] if n < 20 else []), *(["itl"] if n < 2 else [])) for n in range(100)
    ]

    line = only_line(*records)

    credits_ppm = {each.objective: each.credit_ppm for each in line.attainments}
    assert credits_ppm == {"ttft": 100_000, "itl": 50_000, "availability": 0}
    assert line.credit_ppm == 100_000


def test_a_fraction_of_a_femto_is_rounded_the_caller_s_way() -> None:
    """A tenth of 1 + 1 + 1 femto is 1."""
    line = only_line(*(request(n, "availability", charge_femto=1, minute=n) for n in range(3)))

    assert line.credit_ppm == 250_000
    assert line.credit_femto == 1


def test_a_tier_that_promises_nothing_owes_nothing() -> None:
    records = [request(n, "availability", tier=Tier.FLEX, minute=n) for n in range(5)]

    line = only_line(*records, objective=Objective(availability_ppm=0))

    assert attained(line)["availability"] == (0, 5, 0)
    assert line.credit_femto == 0


def test_others_other_months_and_open_requests_are_left_out() -> None:
    made = stated(
        request(0),
        request(1, tenant="other"),
        request(2, minute=-1),
        request(3, minute=30 * 24 * 60),
        request(4, outcome=Outcome.OPEN),
    )

    assert [line.requests for line in made.lines] == [1]


@pytest.mark.parametrize("tier", Tier)
@pytest.mark.parametrize("outcome", [Outcome.RECOVERED, Outcome.EXPIRED])
def test_a_request_whose_frontend_died_counts_against_us_in_the_tier_it_asked_for(
    tier: Tier, outcome: Outcome
) -> None:
    died = request(1, tier=tier, outcome=outcome, has_receipt=False)

    line = only_line(request(0, tier=tier), died)

    assert line.tier is tier
    assert attained(line)["availability"] == (0, 1, 0)


def test_tiers_and_currencies_have_their_own_lines_strongest_first() -> None:
    tiers = (Tier.FLEX, Tier.PRIORITY, Tier.STANDARD)

    made = stated(*(request(n, tier=tier) for n, tier in enumerate(tiers)))

    assert [line.tier for line in made.lines] == [Tier.PRIORITY, Tier.STANDARD, Tier.FLEX]


def test_breaches_are_listed_up_to_a_bound_and_all_counted(monkeypatch) -> None:
    monkeypatch.setattr(sla, "BREACHES_MAX", 3)

    line = only_line(*(request(n, "availability", minute=n) for n in range(10)))

    assert (line.missed_requests, line.down_minutes) == (10, 10)
    assert [each.request_id for each in line.missed] == ["r0", "r1", "r2"]
    assert len(line.down) == 3


def test_credits_become_adjustments_that_apply_once() -> None:
    made = stated(*(request(n, "availability", minute=n) for n in range(4)), request(9, minute=9))

    (proposal,) = made.adjustments()

    assert proposal.adjustment_id == "sla/2026-11/m/priority/USD"
    assert proposal.amount_femto == -1_250
    assert (proposal.tenant_id, proposal.currency) == ("acme", "USD")
    assert "ttft, itl, availability" in proposal.reason


@given(st.lists(st.tuples(st.integers(0, 10), st.booleans(), st.integers(0, 10**12)), max_size=60))
@settings(deadline=None)
def test_a_credit_is_never_negative_nor_more_than_was_charged(
    drawn: list[tuple[int, bool, int]],
) -> None:
    records = [
        request(n, *(["availability"] if fails else []), minute=minute, charge_femto=charge)
        for n, (minute, fails, charge) in enumerate(drawn)
    ]

    for line in stated(*records).lines:
        assert 0 <= line.credit_femto <= line.charge_femto
        assert all(0 <= each.met <= each.counted for each in line.attainments)


def test_a_rule_needs_a_broken_promise() -> None:
    rule = CreditRule(objective="availability", below_ppm=999_000, credit_ppm=1)

    assert rule.applies(attained_ppm=998_999, promised_ppm=999_500)
    assert not rule.applies(attained_ppm=998_999, promised_ppm=990_000)


def test_a_signed_statement_is_verified_with_the_public_key_alone() -> None:
    made = stated(request(0), request(1, "ttft"))
    key = StatementKey(SECRET, where="sla_key")

    signed = key.sign(made, issued_unix_ms=5)

    said = verify(signed + "\n", key.public_jwk)
    assert said == json.loads(json.dumps(statement_json(made))) | {"issued_unix_ms": 5}
    assert "d" not in key.public_jwk


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(
            lambda s: s[:50] + ("A" if s[50] != "A" else "B") + s[51:], id="a changed byte"
        ),
        pytest.param(lambda s: s.rpartition(".")[0] + ".", id="no signature"),
        pytest.param(lambda s: "hello", id="another file"),
        pytest.param(lambda s: "", id="an empty file"),
        pytest.param(lambda s: "\u20ac" + s, id="no ASCII"),
    ],
)
def test_what_was_changed_does_not_verify(spoil) -> None:
    key = StatementKey(SECRET, where="sla_key")
    signed = key.sign(stated(request(0)), issued_unix_ms=5)

    with pytest.raises(InvalidRequest, match="does not verify"):
        verify(spoil(signed), key.public_jwk)


def test_another_s_statement_does_not_verify() -> None:
    signed = StatementKey(SECRET, where="a").sign(stated(request(0)), issued_unix_ms=5)

    with pytest.raises(InvalidRequest, match="does not verify"):
        verify(signed, StatementKey(b"22" * 32, where="b").public_jwk)


@pytest.mark.parametrize("secret", [b"", b"11" * 31, b"no hex" * 10, b"\xff" * 64])
def test_a_key_file_that_is_no_key_is_refused(secret: bytes) -> None:
    with pytest.raises(ConfigRefused, match="not an Ed25519 seed"):
        StatementKey(secret, where="sla_key")


def test_a_month_is_a_month_in_utc() -> None:
    december = Month.parse("2026-12")

    assert str(december) == "2026-12"
    assert NOVEMBER.ends_unix_ms == december.begins_unix_ms
    assert december.ends_unix_ms == Month.parse("2027-01").begins_unix_ms
    assert (NOVEMBER.ends_unix_ms - BEGINS) == 30 * 86_400_000
    assert BEGINS in NOVEMBER
    assert NOVEMBER.ends_unix_ms not in NOVEMBER


@pytest.mark.parametrize("text", ["", "2026", "2026-13", "2026-1", "26-11", "9999-12", "0001-01"])
def test_what_is_no_month_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        Month.parse(text)
