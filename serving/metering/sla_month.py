"""A calendar month in UTC, as statements and invoices are cut."""

import re
from dataclasses import dataclass
from datetime import UTC, datetime

from headrace.serving.errors import InvalidRequest

_MONTH = re.compile(r"([0-9]{4})-(0[1-9]|1[0-2])")


@dataclass(frozen=True, slots=True, order=True)
class Month:
    """`unix_ms in month` says whether an instant lies in it."""

    year: int
    number: int

    @classmethod
    def parse(cls, text: str) -> "Month":
        """`2026-11`.

        Raises:
            InvalidRequest: it is not a month.
        """
        found = _MONTH.fullmatch(text)
        if found is None or not 1970 <= int(found[1]) < 9999:
            raise InvalidRequest(
                f"The month is {text[:32]!r}.",
                why="A statement covers one calendar month in UTC.",
                fix="Write it like 2026-11.",
                field="month",
            )
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.year:04d}-{self.number:02d}"

    def __contains__(self, unix_ms: int) -> bool:
        return self.begins_unix_ms <= unix_ms < self.ends_unix_ms

    @property
    def begins_unix_ms(self) -> int:
        return _unix_ms(self.year, self.number)

    @property
    def ends_unix_ms(self) -> int:
        """The first instant of the next month."""
        return _unix_ms(self.year + self.number // 12, self.number % 12 + 1)


def _unix_ms(year: int, month: int) -> int:
    return int(datetime(year, month, 1, tzinfo=UTC).timestamp()) * 1000
