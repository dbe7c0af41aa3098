"""Which correction or credit the ledger has under an id."""

from dataclasses import dataclass, fields

from headrace.serving.domain.record import Adjustment, Grant
from headrace.serving.metering.ledger import schema
from headrace.serving.metering.ledger.database import columns_of
from headrace.serving.metering.ledger.ledger import Ledger


@dataclass(frozen=True, slots=True, kw_only=True)
class Booked:
    """A correction or credit, and the record that it came with."""

    correction: Adjustment | Grant
    log_id: str
    seq: int


def booked(ledger: Ledger, correction: Adjustment | Grant) -> Booked | None:
    """What the ledger applied under this one's id; None when there is nothing.

    Raises:
        LedgerUnavailable: the ledger cannot be read.
    """
    ledger.prepare()
    if isinstance(correction, Adjustment):
        table, columns, key = "adjustment", schema.ADJUSTMENT, "adjustment_id"
        name = correction.adjustment_id
    else:
        table, columns, key = "credit", schema.CREDIT, "grant_id"
        name = correction.grant_id
    rows = ledger.database.rows(
        f"SELECT {columns_of(columns, prefix=f'{table}.')}, log.log_id FROM {table}"
        f" JOIN log ON log.log_no = {table}.log_no WHERE tenant_id = ? AND {key} = ?",
        (correction.tenant_id, name),
    )
    if not rows:
        return None
    row = dict(zip([*columns, "log_id"], rows[0], strict=True))
    found = type(correction)(**{field.name: row[field.name] for field in fields(correction)})
    return Booked(correction=found, log_id=row["log_id"], seq=row["seq"])
