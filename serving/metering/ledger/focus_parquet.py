"""FOCUS rows as Parquet: decimal128, timestamps in UTC, a row group at a time."""

from collections.abc import Iterable, Mapping
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from headrace.serving.metering.ledger.currency import FEMTO_DIGITS
from headrace.serving.metering.ledger.focus import COLUMNS, FocusRow, Kind

GROUP_ROWS = 10_000
"""Rows in memory at once: about 20 MB."""

_TYPES: Mapping[Kind, Any] = {
    Kind.TEXT: pyarrow.string(),
    Kind.DECIMAL: pyarrow.decimal128(38, FEMTO_DIGITS),
    Kind.TIME: pyarrow.timestamp("ms", tz="UTC"),
}


def write_parquet(rows: Iterable[FocusRow], path: Path) -> int:
    """Write a file; answers how many rows."""
    schema = pyarrow.schema([(name, _TYPES[kind]) for name, kind in COLUMNS.items()])
    count, group = 0, list[FocusRow]()
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:

        def flush() -> None:
            columns = [
                [_value(kind, row.get(name)) for row in group] for name, kind in COLUMNS.items()
            ]
            arrays = [
                pyarrow.array(column, type=field.type)
                for column, field in zip(columns, schema, strict=True)
            ]
            writer.write_table(pyarrow.Table.from_arrays(arrays, schema=schema))
            group.clear()

        for row in rows:
            group.append(row)
            count += 1
            if len(group) == GROUP_ROWS:
                flush()
        if group:
            flush()
    return count


def _value(kind: Kind, text: str | None) -> object:
    if text is None or kind is Kind.TEXT:
        return text
    return Decimal(text) if kind is Kind.DECIMAL else datetime.fromisoformat(text)
