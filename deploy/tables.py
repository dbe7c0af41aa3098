"""Tables for people. Nothing is cut where the reader is a pipe or a file."""

import sys
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

PIPE_COLUMNS = 300
"""Width where there is no terminal: enough for every table of ours."""


def show_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    numbers: Sequence[str] = (),
    footer: Sequence[str] = (),
) -> None:
    """Print rows under their columns; those named in `numbers` are set flush right."""
    console = Console(width=None if sys.stdout.isatty() else PIPE_COLUMNS, highlight=False)
    table = Table(box=box.SIMPLE_HEAD, show_footer=bool(footer), pad_edge=False)
    for i, name in enumerate(columns):
        table.add_column(
            name,
            justify="right" if name in numbers else "left",
            footer=footer[i] if footer else "",
            overflow="fold",
        )
    for row in rows:
        # Text, not markup: square brackets in a name are only that.
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)


def money(nano: int, currency: str = "") -> str:
    """The exact amount in decimal: 131_000 is 0.000131000."""
    sign = "-" if nano < 0 else ""
    units, rest = divmod(abs(nano), 10**9)
    return f"{sign}{units}.{rest:09d} {currency}".rstrip()
