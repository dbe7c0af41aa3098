"""Statements and invoices: exact sums, rounded once a line, and issued for good."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace.serving.domain.usage import Outcome, Price, Usage
from headrace.serving.errors import InvalidRequest, InvoiceBlocked
from headrace.serving.metering.ledger import invoice
from headrace.serving.metering.ledger.currency import decimal, minor_of
from headrace.serving.metering.ledger.ledger import Ledger
from headrace.serving.metering.ledger.reconcile import reconcile
from headrace.serving.metering.ledger.sqlite_database import SqliteDatabase
from headrace.serving.metering.ledger.statement import parse_month, statements
from headrace.serving.testing.memory_log import NOVEMBER, PRICE, MemoryLog

DECEMBER = NOVEMBER + 30 * 86_400_000
CENT = 10**13


def text_price(currency: str, rate: int) -> Price:
    return Price.text(
        version="book-7",
        currency=currency,
        prompt_nano_per_mtok=rate,
        cached_nano_per_mtok=rate,
        completion_nano_per_mtok=rate,
    )


def issue(ledger: Ledger, log: MemoryLog, *, now_unix_ms: int = DECEMBER, month: int = 202611):
    return invoice.issue(
        ledger, reconcile([log], ledger), tenant_id="acme", month=month, now_unix_ms=now_unix_ms
    )


@pytest.mark.parametrize(
    ("femto", "currency", "minor"),
    [
        (0, "USD", 0),
        (5 * CENT // 10, "USD", 0),
        (5 * CENT // 10 + 1, "USD", 1),
        (15 * CENT // 10, "USD", 2),
        (25 * CENT // 10, "USD", 2),
        (-5 * CENT // 10, "USD", 0),
        (-15 * CENT // 10, "USD", -2),
        (15 * 10**14, "JPY", 2),
        (15 * 10**11, "KWD", 2),
    ],
)
def test_amounts_are_rounded_to_the_smallest_coin_half_to_even(femto, currency, minor):
    assert minor_of(femto, currency) == minor


def test_a_currency_without_a_coin_is_refused():
    with pytest.raises(InvalidRequest, match="'XXX' is not one"):
        minor_of(1, "XXX")


def test_decimals_are_exact():
    assert decimal(-12_050, 3) == "-12.050"
    assert decimal(7, 0) == "7"
    assert decimal(1, 15) == "0.000000000000001"


def test_a_line_is_a_project_model_tier_unit_and_price(ledger, log):
    """Two requests of 6, 4 and 5 tokens; a fault of ours and another tenant are not on it."""
    log.serves("r1")
    log.serves("r2")
    log.serves("r3", tier="priority")
    log.serves("r4", project_id="chat", tenant_id="zeta")
    log.settles(log.reserves("r5"), outcome=Outcome.FAILED)
    ledger.apply(log.log_id, log.records)

    (statement,) = statements(ledger, tenant_id="acme", month=202611)

    lines = {(each.tier, each.unit): (each.quantity, each.exact_femto) for each in statement.lines}
    assert lines == {
        ("standard", "prompt_tokens"): (12, 12 * 10**9),
        ("standard", "cache_read_tokens"): (8, 8 * 10**8),
        ("standard", "completion_tokens"): (10, 20 * 10**9),
        ("priority", "prompt_tokens"): (6, 6 * 10**9),
        ("priority", "cache_read_tokens"): (4, 4 * 10**8),
        ("priority", "completion_tokens"): (5, 10 * 10**9),
    }
    assert statement.total_minor == 0
    assert statement.exact_femto == 3 * 16_400 * 10**6


def test_corrections_and_credits_have_lines_of_their_own(ledger, log):
    log.adjusts("a1", -250 * CENT)
    log.grants("g1", 100 * CENT)
    log.grants("slice", 999 * CENT, budget_id="b1")
    ledger.apply(log.log_id, log.records)

    (statement,) = statements(ledger, tenant_id="acme", month=202611)

    reasons = {each.correction_id: each.reason for each in statement.corrections}
    assert reasons == {"a1": "a correction", "g1": "credit granted by olga"}
    found = {(each.kind, each.correction_id): each.amount_minor for each in statement.corrections}
    assert found == {("adjustment", "a1"): -250, ("credit", "g1"): -100}
    assert statement.total_minor == -350


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    requests=st.lists(
        st.tuples(
            st.sampled_from(["search", "chat"]),
            st.sampled_from(["USD", "JPY", "KWD"]),
            st.integers(0, 10**10),
            st.integers(0, 10**6),
            st.integers(0, 10**6),
        ),
        min_size=1,
        max_size=12,
    ),
    corrections=st.lists(st.integers(-(10**17), 10**17), max_size=4),
)
def test_a_line_is_off_by_at_most_half_a_coin(tmp_path_factory, requests, corrections):
    """Whatever was used at whatever rates: exact sums over lines are the charges of the log."""
    log = MemoryLog()
    for i, (project, currency, rate, prompt, completion) in enumerate(requests):
        hold = log.reserves(f"r{i}", project_id=project, price=text_price(currency, rate))
        log.settles(hold, Usage(prompt_tokens=prompt, completion_tokens=completion))
    for i, femto in enumerate(corrections):
        log.adjusts(f"a{i}", femto)
    ledger = Ledger(SqliteDatabase(tmp_path_factory.mktemp("ledger") / "ledger.db"))
    ledger.apply(log.log_id, log.records)

    found = statements(ledger, tenant_id="acme", month=202611)
    ledger.close()

    charged = sum(each.event.settle.charge_femto for each in log.records)
    assert sum(each.exact_femto for each in found) == charged + sum(corrections)
    for statement in found:
        unit = {"USD": 10**13, "JPY": 10**15, "KWD": 10**12}[statement.currency]
        parts = [*statement.lines, *statement.corrections]
        assert all(2 * abs(each.amount_minor * unit - each.exact_femto) <= unit for each in parts)
        off = abs(statement.total_minor * unit - statement.exact_femto)
        assert 2 * off <= unit * len(parts)


def test_an_invoice_is_numbered_and_says_for_ever_what_it_said(ledger, log):
    price = text_price("USD", 10**12)
    log.settles(log.reserves("r1", price=price), Usage(prompt_tokens=25_000))
    ledger.apply(log.log_id, log.records)
    (first,) = issue(ledger, log)
    log.settles(log.reserves("late", price=price), Usage(prompt_tokens=10_000))
    ledger.apply(log.log_id, log.records)

    (again,) = issue(ledger, log)

    assert (first.invoice_id, first.total_minor) == ("HR-2026-000001", 2_500)
    assert again == first
    assert [each.number for each in invoice.changed_since(ledger)] == [1]


def test_every_currency_has_an_invoice_of_its_own(ledger, log):
    for currency in ("USD", "JPY"):
        log.serves(f"in {currency}", price=text_price(currency, 10**12))
    ledger.apply(log.log_id, log.records)

    issued = issue(ledger, log)

    assert [(each.number, each.currency) for each in issued] == [(1, "JPY"), (2, "USD")]


def test_nothing_is_invoiced_while_the_books_differ(ledger, log):
    log.serves("r1")
    ledger.apply(log.log_id, log.records)
    with ledger.database.transaction() as execute:
        execute("UPDATE request SET charge_femto = charge_femto - 1", ())

    with pytest.raises(InvoiceBlocked, match="differ in 3 places: Request 'r1' has charge_femto"):
        issue(ledger, log)

    assert invoice.issued_for(ledger) == []


def test_a_month_that_is_not_over_is_not_invoiced(ledger, log):
    log.serves("r1")
    ledger.apply(log.log_id, log.records)

    with pytest.raises(InvalidRequest, match="2026-11 is not over"):
        issue(ledger, log, now_unix_ms=DECEMBER - 1)
    with pytest.raises(InvalidRequest, match="nothing to invoice"):
        issue(ledger, log, month=202610)


def test_invoices_move_to_a_ledger_that_was_made_again(ledger, log, tmp_path):
    """They are in no log; their numbers must not be given out twice."""
    log.serves("r1")
    ledger.apply(log.log_id, log.records)
    issued = issue(ledger, log)
    again = Ledger(SqliteDatabase(tmp_path / "again.db"))

    assert invoice.copy_invoices(ledger, again) == invoice.copy_invoices(ledger, again) == 1
    assert invoice.issued_for(again) == issued
    again.close()


@pytest.mark.parametrize(
    "text", ["", "2026", "2026-13", "2026-1", "26-11", "2026-00", "\uff12\uff10\uff12\uff16-11"]
)
def test_a_month_is_a_year_and_two_digits(text):
    assert parse_month("2026-11") == 202611
    with pytest.raises(InvalidRequest):
        parse_month(text)


def test_prices_of_one_name_and_other_rates_have_lines_apart(ledger, log):
    """A book of config.yaml whose version somebody forgot to change is still exact."""
    log.serves("r1", price=PRICE)
    log.serves("r2", price=text_price("USD", 3 * 10**9))
    ledger.apply(log.log_id, log.records)

    (statement,) = statements(ledger, tenant_id="acme", month=202611)

    prompt = [each for each in statement.lines if each.unit == "prompt_tokens"]
    assert [(each.rate_nano_per_million, each.quantity) for each in prompt] == [
        (10**9, 6),
        (3 * 10**9, 6),
    ]
