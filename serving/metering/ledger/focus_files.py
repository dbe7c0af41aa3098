"""FOCUS rows as CSV and JSON, written as they come."""

import csv
import json
from collections.abc import Iterable
from typing import TextIO

from headrace.serving.metering.ledger.focus import COLUMNS, FocusRow


def write_csv(rows: Iterable[FocusRow], file: TextIO) -> int:
    """RFC 4180 with a header; null is an empty field. Answers how many rows.

    `file` is opened with newline="".
    """
    writer = csv.writer(file)
    writer.writerow(COLUMNS)
    count = 0
    for row in rows:
        writer.writerow([_cell(row.get(name)) for name in COLUMNS])
        count += 1
    return count


def write_json(rows: Iterable[FocusRow], file: TextIO) -> int:
    """A list of objects, one a line; decimals are strings, which every parser keeps exact."""
    count = 0
    file.write("[")
    for row in rows:
        file.write(",\n" if count else "\n")
        file.write(json.dumps({name: row.get(name) for name in COLUMNS}))
        count += 1
    file.write("\n]\n")
    return count


def _cell(value: str | None) -> str:
    """A text that a spreadsheet would run as a formula is made one that it shows."""
    text = value or ""
    is_number = text.startswith("-") and text[1:2].isdigit()
    return (
        f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) and not is_number else text
    )
