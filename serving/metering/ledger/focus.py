"""Usage as FOCUS 1.2 rows: the FinOps Foundation's columns for cost and usage data.

One row for each unit of each request that ended, and one for each adjustment and credit. Costs are
exact decimals with up to 15 digits behind the point, never floats: whoever adds them up gets the
ledger's sum. What only we know is in `x_` columns, as the specification asks.

Waived work (a fault of ours) has its list cost and is billed nothing.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum

from headrace.serving.domain.units import IMAGE_PIXELS, TEXT_UNITS
from headrace.serving.domain.usage import Outcome
from headrace.serving.errors import InvalidRequest
from headrace.serving.metering import outcomes
from headrace.serving.metering.ledger.currency import FEMTO_DIGITS, decimal
from headrace.serving.metering.ledger.database import Row, Value
from headrace.serving.metering.ledger.ledger import Ledger
from headrace.serving.metering.ledger.reader import Which
from headrace.serving.metering.ledger.schema import WHY_CREDITED

FOCUS_VERSIONS = ("1.2",)
PROVIDER = "Headrace"


class Kind(StrEnum):
    """What a column holds."""

    TEXT = "text"
    DECIMAL = "decimal"
    TIME = "time"


_DECIMALS = (
    *("BilledCost", "ContractedCost", "EffectiveCost", "ListCost"),
    *("ContractedUnitPrice", "ListUnitPrice", "ConsumedQuantity", "PricingQuantity"),
)
_TIMES = ("BillingPeriodStart", "BillingPeriodEnd", "ChargePeriodStart", "ChargePeriodEnd")
_TEXTS = (
    *("BillingAccountId", "BillingAccountName", "BillingAccountType", "BillingCurrency"),
    *("ChargeCategory", "ChargeClass", "ChargeDescription", "ChargeFrequency", "ConsumedUnit"),
    *("InvoiceId", "InvoiceIssuerName", "PricingCategory", "PricingCurrency", "PricingUnit"),
    *("ProviderName", "PublisherName", "RegionId", "RegionName", "ResourceId", "ResourceName"),
    *("ResourceType", "ServiceCategory", "ServiceName", "ServiceSubcategory", "SkuId"),
    *("SkuMeter", "SkuPriceDetails", "SkuPriceId", "SubAccountId", "SubAccountName"),
    *("SubAccountType", "Tags"),
    *("x_CorrectionId", "x_KeyId", "x_Model", "x_Outcome", "x_PriceVersion", "x_ProjectId"),
    *("x_RequestId", "x_TenantId", "x_Tier", "x_TierServed", "x_Unit"),
)
COLUMNS: Mapping[str, Kind] = dict(
    sorted(
        {
            **dict.fromkeys(_TEXTS, Kind.TEXT),
            **dict.fromkeys(_DECIMALS, Kind.DECIMAL),
            **dict.fromkeys(_TIMES, Kind.TIME),
        }.items(),
        key=lambda item: (item[0].startswith("x_"), item[0]),
    )
)
"""In the order of the files: FOCUS's own by name, then ours."""

FocusRow = Mapping[str, str | None]
"""Column to text; decimals and times as texts too, None for null. Columns that are not there are
null."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Measure:
    """How a unit is spoken of."""

    consumed: str
    pricing: str
    """Of 10^pricing_digits consumed."""
    pricing_digits: int


_TOKENS = _Measure(consumed="tokens", pricing="1M tokens", pricing_digits=6)
_PIXELS = _Measure(consumed="pixels", pricing="1M pixels", pricing_digits=6)
_VIDEO = _Measure(consumed="milliseconds", pricing="seconds", pricing_digits=3)


def rows(ledger: Ledger, which: Which) -> Iterator[FocusRow]:
    """Every row that matches, by the order of the logs; a bounded number of them in memory.

    Raises:
        LedgerUnavailable: the ledger cannot be read; what came before is not the whole.
    """
    ledger.prepare()
    where, values = which.clause()
    where = f"{where} AND request.month IS NOT NULL" if where else "WHERE request.month IS NOT NULL"
    for row in ledger.database.stream(
        f"{_USAGE} {where} ORDER BY quantity.log_no, quantity.seq, quantity.unit", values
    ):
        yield _usage(row)
    if not which.names_requests:
        where, values = _corrections_of(which)
        for row in ledger.database.stream(f"{_ADJUSTMENTS} {where} ORDER BY 1, 2", values):
            yield _correction(row, category="Adjustment")
        where = f"{where} AND budget_id = ''" if where else "WHERE budget_id = ''"
        for row in ledger.database.stream(f"{_CREDITS} {where} ORDER BY 1, 2", values):
            yield _correction(row, category="Credit")


def check_version(version: str) -> None:
    """Refuse what we cannot write.

    Raises:
        InvalidRequest: we do not write that version's columns.
    """
    if version not in FOCUS_VERSIONS:
        raise InvalidRequest(
            f"FOCUS {version[:16]} is not a version that can be exported.",
            why=f"Versions are {', '.join(FOCUS_VERSIONS)}.",
            fix="Choose one of these with --focus.",
            field="focus",
        )


_USAGE = (
    "SELECT request.tenant_id, request.project_id, request.key_id, request.request_id,"
    " request.model, request.version, request.tier, request.tier_served, request.outcome,"
    " request.accepted_unix_ms, request.settled_unix_ms, request.month, price.currency,"
    " price.version, price.price_id, price.rates, quantity.unit, quantity.quantity,"
    " invoice.number FROM quantity"
    " JOIN request ON request.log_no = quantity.log_no AND request.seq = quantity.seq"
    " JOIN price ON price.price_id = request.price_id"
    " LEFT JOIN invoice ON invoice.tenant_id = request.tenant_id"
    " AND invoice.month = request.month AND invoice.currency = price.currency"
)
_ADJUSTMENTS = (
    "SELECT tenant_id, adjustment_id, project_id, request_id, amount_femto, currency, reason,"
    " unix_ms, month FROM adjustment"
)
_CREDITS = (
    f"SELECT tenant_id, grant_id, project_id, '', -amount_femto, currency, {WHY_CREDITED},"
    " unix_ms, month FROM credit"
)


def _corrections_of(which: Which) -> tuple[str, list[Value]]:
    chosen: dict[str, Value] = {
        "tenant_id = ?": which.tenant_id,
        "project_id = ?": which.project_id,
        "unix_ms >= ?": which.since_unix_ms,
        "unix_ms < ?": which.until_unix_ms,
        "month = ?": which.month,
    }
    conditions = {text: value for text, value in chosen.items() if value is not None}
    where = f"WHERE {' AND '.join(conditions)}" if conditions else ""
    return where, list(conditions.values())


def _usage(row: Row) -> FocusRow:
    (tenant, project, key_id, request_id, model, version, tier, tier_served, outcome, *rest) = row
    (accepted, settled, month, currency, price_version, price_id, rates, unit, quantity, number) = (
        rest
    )
    rate = json.loads(rates).get(unit, 0)
    measure = measure_of(unit)
    is_charged = outcomes.RULES[Outcome(outcome)].charged is not outcomes.Charged.NOTHING
    listed = decimal(quantity * rate, FEMTO_DIGITS)
    billed = listed if is_charged else decimal(0, FEMTO_DIGITS)
    # A rate is nano for a million: 10^-15 for one unit, times the units of one pricing unit.
    unit_price = decimal(rate * 10**measure.pricing_digits, FEMTO_DIGITS)
    return {
        **_account(tenant, project, currency, month),
        "BilledCost": billed,
        "ContractedCost": billed,
        "EffectiveCost": billed,
        "ListCost": listed,
        "ContractedUnitPrice": unit_price,
        "ListUnitPrice": unit_price,
        "ConsumedQuantity": decimal(quantity, 0),
        "ConsumedUnit": measure.consumed,
        "PricingQuantity": decimal(quantity, measure.pricing_digits),
        "PricingUnit": measure.pricing,
        "PricingCategory": "Standard",
        "ChargeCategory": "Usage",
        "ChargeDescription": f"{model}: {unit}, {tier}",
        "ChargeFrequency": "Usage-Based",
        "ChargePeriodStart": time_text(accepted),
        # Exclusive, and never before the start: a clock may have been set back meanwhile.
        "ChargePeriodEnd": time_text(max(accepted, settled) + 1),
        "InvoiceId": None if number is None else f"HR-{month // 100:04d}-{number:06d}",
        "ResourceId": f"{model}@{version}" if version else model,
        "ResourceName": model,
        "ResourceType": "Model",
        "SkuId": f"{model}/{unit}",
        "SkuMeter": unit,
        "SkuPriceDetails": json.dumps({"x_Tier": tier, "x_PriceVersion": price_version}),
        "SkuPriceId": f"{price_id}/{model}/{tier}/{unit}",
        "Tags": json.dumps({"project": project, "tier": tier}),
        "x_KeyId": key_id,
        "x_Model": model,
        "x_Outcome": outcome,
        "x_PriceVersion": price_version,
        "x_RequestId": request_id,
        "x_Tier": tier,
        "x_TierServed": tier_served or tier,
        "x_Unit": unit,
    }


def _correction(row: Row, *, category: str) -> FocusRow:
    tenant, correction_id, project, request_id, femto, currency, reason, unix_ms, month = row
    cost = decimal(femto, FEMTO_DIGITS)
    return {
        **_account(tenant, project, currency, month),
        "BilledCost": cost,
        "ContractedCost": cost,
        "EffectiveCost": cost,
        "ListCost": cost,
        "ChargeCategory": category,
        "ChargeDescription": reason,
        "ChargeFrequency": "One-Time",
        "ChargePeriodStart": time_text(unix_ms),
        "ChargePeriodEnd": time_text(unix_ms + 1),
        "Tags": json.dumps({"project": project} if project else {}),
        "x_CorrectionId": correction_id,
        "x_RequestId": request_id or None,
    }


def _account(tenant: str, project: str, currency: str, month: int) -> dict[str, str | None]:
    """What every row has: whose it is, and in which period."""
    year, number = divmod(month, 100)
    return {
        "BillingAccountId": tenant,
        "BillingAccountName": tenant,
        "BillingAccountType": "Organisation",
        "BillingCurrency": currency,
        "PricingCurrency": currency,
        "BillingPeriodStart": f"{year:04d}-{number:02d}-01T00:00:00Z",
        "BillingPeriodEnd": f"{year + number // 12:04d}-{number % 12 + 1:02d}-01T00:00:00Z",
        "InvoiceIssuerName": PROVIDER,
        "ProviderName": PROVIDER,
        "PublisherName": PROVIDER,
        "ServiceCategory": "AI and Machine Learning",
        "ServiceSubcategory": "Generative AI",
        "ServiceName": "Model serving",
        "SubAccountId": project or None,
        "SubAccountName": project or None,
        "SubAccountType": "Project" if project else None,
        "x_TenantId": tenant,
        "x_ProjectId": project or None,
    }


def measure_of(unit: str) -> _Measure:
    if unit in TEXT_UNITS:
        return _TOKENS
    return _PIXELS if unit == IMAGE_PIXELS else _VIDEO


def time_text(unix_ms: int) -> str:
    """ISO 8601, UTC, to the millisecond."""
    whole, ms = divmod(unix_ms, 1000)
    return f"{datetime.fromtimestamp(whole, UTC):%Y-%m-%dT%H:%M:%S}.{ms:03d}Z"
