"""Reads usage records, from any process, while a frontend writes them."""

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.serving.domain.record import UsageRecord
from headrace.serving.domain.usage import Usage
from headrace.serving.errors import MeterUnavailable
from headrace.serving.metering import usage_schema as schema

RECORDS_MAX = 100_000
"""Most records of one answer: about 100 MB here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Which:
    """Which records: every field that is set must match."""

    tenant_id: str | None = None
    request_id: str | None = None
    since_unix_ms: int | None = None
    """Accepted at this time or later."""

    def clause(self) -> tuple[str, list[str | int]]:
        """The WHERE clause and its values; only what is set, so that an index can serve it."""
        conditions = {
            "tenant_id = ?": self.tenant_id,
            "request_id = ?": self.request_id,
            "accepted_unix_ms >= ?": self.since_unix_ms,
        }
        chosen = {text: value for text, value in conditions.items() if value is not None}
        text = f"WHERE {' AND '.join(chosen)}" if chosen else ""
        return text, list(chosen.values())


ALL = Which()


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """Sums over records of one currency."""

    currency: str
    requests: int
    usage: Usage
    charge_nano: int


class UsageReader:
    """The records in one file. Opens it for each question, so it holds nothing between them."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def records(self, which: Which = ALL, *, limit: int = 100) -> list[UsageRecord]:
        """The newest records first, at most `limit`. No file, no records.

        Raises:
            MeterUnavailable: the file cannot be read.
        """
        assert 0 < limit <= RECORDS_MAX
        where, values = which.clause()
        statement = f"{schema.SELECT_RECORDS} {where} {schema.NEWEST_FIRST}"
        return [schema.record(row) for row in self._rows(statement, [*values, limit])]

    def totals(self, which: Which = ALL) -> list[Totals]:
        """Sums over every record that matches, one entry for each currency.

        Raises:
            MeterUnavailable: the file cannot be read.
        """
        where, values = which.clause()
        rows = self._rows(f"{schema.SELECT_TOTALS} {where} {schema.EACH_CURRENCY}", values)
        return [
            Totals(
                currency=currency,
                requests=requests,
                usage=Usage(
                    prompt_tokens=prompt,
                    cached_tokens=cached,
                    completion_tokens=completion,
                    reasoning_tokens=reasoning,
                ),
                charge_nano=units * 10**9 + nano,
            )
            for currency, requests, prompt, cached, completion, reasoning, units, nano in rows
        ]

    def _rows(self, statement: str, values: Sequence[str | int]) -> list[Any]:
        if not self._path.exists():
            return []
        try:
            with closing(schema.connect_reading(self._path)) as connection:
                return connection.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise MeterUnavailable(
                f"The usage records in {self._path} cannot be read: {error}.",
                why="The file is damaged, of another format, or on a disk that does not answer.",
                fix="Check it with `headrace doctor`.",
            ) from error
