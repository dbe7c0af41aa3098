"""What the ledger knows of corrections and credits, and ledgers from before credits had reasons."""

import pytest

from headrace.serving.domain.record import Adjustment, Grant
from headrace.serving.metering.ledger import schema
from headrace.serving.metering.ledger.booked import booked
from headrace.serving.metering.ledger.focus import rows
from headrace.serving.metering.ledger.ledger import Ledger
from headrace.serving.metering.ledger.reader import LedgerReader, Which
from headrace.serving.metering.ledger.reconcile import reconcile
from headrace.serving.metering.ledger.statement import statements

CREDIT = Grant(
    grant_id="g1",
    tenant_id="acme",
    amount_femto=7,
    currency="USD",
    actor="olga",
    project_id="search",
    reason="sorry",
)
CORRECTION = Adjustment(
    adjustment_id="a1",
    tenant_id="acme",
    amount_femto=-5,
    currency="USD",
    reason="a correction",
    actor="olga",
    project_id="search",
)


def test_a_correction_is_found_by_its_tenant_and_id_with_the_record_it_came_with(ledger, log):
    log.adjusts("a1", -5)
    log.grants("g1", 7, project_id="search", reason="sorry")
    ledger.apply(log.log_id, log.records)

    adjustment, credit = booked(ledger, CORRECTION), booked(ledger, CREDIT)

    assert adjustment is not None
    assert credit is not None
    assert (adjustment.correction, adjustment.log_id, adjustment.seq) == (CORRECTION, "log-1", 1)
    assert credit.seq == 2
    assert isinstance(credit.correction, Grant)
    assert (credit.correction.project_id, credit.correction.reason) == ("search", "sorry")
    other = Grant(grant_id="g1", tenant_id="apex", amount_femto=7, currency="USD", actor="olga")
    assert booked(ledger, other) is None


def test_credit_for_a_project_is_in_its_balance_its_export_and_the_proof(ledger, log):
    log.grants("g1", 7, project_id="search", reason="sorry")
    log.grants("g2", 9)
    ledger.apply(log.log_id, log.records)

    balances = {b.project_id: b.credit_femto for b in LedgerReader(ledger).balances()}
    exported = list(rows(ledger, Which(tenant_id="acme", project_id="search")))
    (statement,) = statements(ledger, tenant_id="acme", month=202611)

    assert balances == {"search": 7, "": 9}
    assert [(row["x_CorrectionId"], row["ChargeDescription"]) for row in exported] == [
        ("g1", "sorry")
    ]
    assert [(each.project_id, each.reason) for each in statement.corrections] == [
        ("search", "sorry"),
        ("", "credit granted by olga"),
    ]
    assert reconcile([log], ledger).agree


def test_a_ledger_from_before_keeps_its_credit_and_takes_on_new_ones(database, log, monkeypatch):
    with monkeypatch.context() as before:
        before.setattr(schema, "SCHEMA_VERSION", 1)
        schema.ensure(database)
    with database.transaction() as execute:
        execute("INSERT INTO log (log_no, log_id, seq, unix_ms) VALUES (1, 'old', 1, 0)", ())
        execute(
            "INSERT INTO credit (tenant_id, grant_id, budget_id, amount_femto, currency,"
            " expires_unix_ms, actor, unix_ms, month, log_no, seq)"
            " VALUES ('acme', 'old', '', 3, 'USD', 0, 'olga', 0, 202611, 1, 1)",
            (),
        )

    ledger = Ledger(database)
    log.grants("g1", 7, reason="sorry")
    ledger.apply(log.log_id, log.records)
    (statement,) = statements(ledger, tenant_id="acme", month=202611)

    assert [each.reason for each in statement.corrections] == ["sorry", "credit granted by olga"]
    versions = database.rows("SELECT version, compatible_with FROM ledger_schema")
    assert [tuple(row) for row in versions] == [(2, 1)]


@pytest.mark.parametrize("correction", [CORRECTION, CREDIT])
def test_an_empty_ledger_has_none(ledger, correction):
    assert booked(ledger, correction) is None
