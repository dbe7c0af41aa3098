"""Exports in FOCUS columns: exact decimals, whatever the format."""

import csv
import io
import json
from decimal import Decimal
from itertools import islice

import pyarrow.parquet
import pytest

from headrace.serving.domain.usage import Outcome, Price, Usage
from headrace.serving.errors import InvalidRequest
from headrace.serving.metering.ledger import focus, focus_files, invoice
from headrace.serving.metering.ledger.focus_parquet import GROUP_ROWS, write_parquet
from headrace.serving.metering.ledger.reader import ALL, Which
from headrace.serving.metering.ledger.reconcile import reconcile
from headrace.serving.testing.memory_log import NOVEMBER, PRICE, USED

REQUIRED = (
    *("BilledCost", "BillingAccountId", "BillingAccountName", "BillingCurrency"),
    *("BillingPeriodEnd", "BillingPeriodStart", "ChargeCategory", "ChargeClass"),
    *("ChargeDescription", "ChargePeriodEnd", "ChargePeriodStart", "ContractedCost"),
    *("EffectiveCost", "InvoiceIssuerName", "ListCost", "PricingQuantity", "PricingUnit"),
    *("ProviderName", "PublisherName", "ServiceCategory", "ServiceName"),
)
"""What FOCUS 1.2 requires of everybody."""


@pytest.fixture
def month(ledger, log):
    log.serves("r1")
    log.settles(log.reserves("r2"), Usage(completion_tokens=3), outcome=Outcome.FAILED)
    log.voids(log.reserves("r3"))
    log.adjusts("a1", -(10**12))
    log.grants("g1", 2 * 10**12)
    log.grants("slice", 10**12, budget_id="b1")
    log.reserves("running")
    ledger.apply(log.log_id, log.records)
    return ledger


def test_a_unit_of_a_request_is_a_row(month):
    """5 completion tokens at 2 dollars a million."""
    (row,) = (
        each
        for each in focus.rows(month, Which(request_id="r1"))
        if each["x_Unit"] == "completion_tokens"
    )

    assert set(row) <= set(focus.COLUMNS)
    assert {
        "BilledCost": "0.000010000000000",
        "ListCost": "0.000010000000000",
        "ConsumedQuantity": "5",
        "ConsumedUnit": "tokens",
        "PricingQuantity": "0.000005",
        "PricingUnit": "1M tokens",
        "ListUnitPrice": "2.000000000000000",
        "BillingPeriodStart": "2026-11-01T00:00:00Z",
        "BillingPeriodEnd": "2026-12-01T00:00:00Z",
        "ServiceCategory": "AI and Machine Learning",
        "SkuMeter": "completion_tokens",
        "x_TenantId": "acme",
        "x_ProjectId": "search",
        "InvoiceId": None,
    }.items() <= row.items()


def test_every_required_column_is_there():
    assert set(REQUIRED) <= set(focus.COLUMNS)
    assert all(name[0].isupper() or name.startswith("x_") for name in focus.COLUMNS)
    with pytest.raises(InvalidRequest, match=r"FOCUS 0\.5"):
        focus.check_version("0.5")


def test_costs_add_up_to_the_ledgers_and_waived_work_is_listed_only(month):
    rows = list(focus.rows(month, ALL))

    billed = sum(Decimal(str(each["BilledCost"])) for each in rows)
    listed = sum(Decimal(str(each["ListCost"])) for each in rows)
    assert billed == Decimal("0.000016400000000") - Decimal("0.001") - Decimal("0.002")
    assert listed == billed + Decimal("0.000006")
    categories = [each["ChargeCategory"] for each in rows]
    assert categories == ["Usage"] * 4 + ["Adjustment", "Credit"]


def test_video_is_priced_by_the_second(ledger, log):
    """4 s at 0.05 dollars a second: a rate of 5 * 10^10 nano for a million milliseconds."""
    unit = "video_ms/720p/24fps/silent"
    hold = log.reserves("v1", price=Price(version="book-8", rates={unit: 5 * 10**10}))
    log.settles(hold, Usage(), quantities={unit: 4_000})
    ledger.apply(log.log_id, log.records)

    (row,) = focus.rows(ledger, ALL)

    assert (row["PricingQuantity"], row["PricingUnit"]) == ("4.000", "seconds")
    assert (row["ListUnitPrice"], row["BilledCost"]) == ("0.050000000000000", "0.200000000000000")


def test_rows_name_their_invoice_once_it_is_issued(ledger, log):
    log.serves("r1")
    ledger.apply(log.log_id, log.records)
    findings = reconcile([log], ledger)
    invoice.issue(
        ledger, findings, tenant_id="acme", month=202611, now_unix_ms=NOVEMBER + 40 * 86_400_000
    )

    assert {each["InvoiceId"] for each in focus.rows(ledger, ALL)} == {"HR-2026-000001"}


def test_csv_json_and_parquet_say_the_same(month, tmp_path):
    csv_file, json_file, path = io.StringIO(), io.StringIO(), tmp_path / "usage.parquet"
    assert focus_files.write_csv(focus.rows(month, ALL), csv_file) == 6
    assert focus_files.write_json(focus.rows(month, ALL), json_file) == 6
    assert write_parquet(focus.rows(month, ALL), path) == 6

    of_csv = list(csv.DictReader(io.StringIO(csv_file.getvalue())))
    of_json = json.loads(json_file.getvalue())
    table = pyarrow.parquet.read_table(path)
    for column in ("BilledCost", "ListCost"):
        values = [Decimal(each[column]) for each in of_json]
        assert [Decimal(each[column]) for each in of_csv] == values
        assert table[column].to_pylist() == values
    assert str(table.schema.field("BilledCost").type) == "decimal128(38, 15)"
    assert list(of_csv[0]) == list(of_json[0]) == table.column_names == list(focus.COLUMNS)


def test_a_name_that_a_spreadsheet_would_run_is_only_shown(ledger, log):
    log.serves("=cmd()|x")
    ledger.apply(log.log_id, log.records)
    file = io.StringIO()

    focus_files.write_csv(focus.rows(ledger, ALL), file)

    assert {row["x_RequestId"] for row in csv.DictReader(io.StringIO(file.getvalue()))} == {
        "'=cmd()|x"
    }


def test_an_export_of_any_length_takes_little_memory(ledger, log, tmp_path):
    """Rows come as they are asked for, and a Parquet file is written a group at a time."""
    for i in range(50):
        log.serves(f"r{i}")
    ledger.apply(log.log_id, log.records)

    rows = focus.rows(ledger, ALL)
    assert len(list(islice(rows, 3))) == 3
    rows.close()  # pyright: ignore[reportAttributeAccessIssue]

    one = next(iter(focus.rows(ledger, Which(request_id="r1"))))
    assert write_parquet((one for _ in range(GROUP_ROWS + 1)), tmp_path / "p") == GROUP_ROWS + 1
    assert pyarrow.parquet.ParquetFile(tmp_path / "p").num_row_groups == 2


def test_what_is_asked_for_bounds_corrections_too(month):
    assert [each["x_CorrectionId"] for each in focus.rows(month, Which(tenant_id="zeta"))] == []
    of_project = [
        each["ChargeCategory"]
        for each in focus.rows(month, Which(project_id="search", month=202611))
    ]
    assert of_project == ["Usage"] * 4 + ["Adjustment"]
    assert USED.completion_tokens == 5
    assert PRICE.version == "book-7"
