"""The result of a benchmark: rows of figures, as JSON for scripts and as a table for people."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from headrace.deploy.bench.figures import LOWER_IS_BETTER, best, ratio
from headrace.deploy.bench.machine import Machine

OURS = "headrace"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One figure of one engine."""

    name: str
    """What was done: "llm/int8/streams=8"."""
    peer: str
    """Who did it."""
    metric: str
    value: float
    unit: str
    ratio: float | None = None
    """Ours over the best peer's, on our rows; the best is the highest rate or the lowest time."""


@dataclass(slots=True, eq=False)
class Report:
    """A whole run. Rows are added as they are known."""

    kind: str
    machine: Machine
    roofline: Mapping[str, object]
    rows: list[Row] = field(default_factory=list[Row])
    skipped: dict[str, str] = field(default_factory=dict[str, str])
    """Who did not take part, and why."""
    notes: list[str] = field(default_factory=list[str])

    def to_json(self) -> dict[str, object]:
        return {
            "kind": self.kind,
            "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": self.machine.to_json(),
            "roofline": self.roofline,
            "rows": [asdict(row) for row in self.rows],
            "skipped": self.skipped,
            "notes": self.notes,
        }

    def save(self, home: Path) -> Path:
        """Write it to `<home>/bench/<date>-<kind>.json` and answer the path."""
        folder = home / "bench"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = folder / f"{datetime.now(UTC):%Y-%m-%dT%H-%M-%S}-{self.kind}.json"
        path.write_text(json.dumps(self.to_json(), indent=1) + "\n", "utf-8")
        return path

    def show(self, console: Console) -> None:
        """One table for each thing that was done: engines down, metrics across."""
        by_name: defaultdict[str, list[Row]] = defaultdict(list)
        for row in self.rows:
            by_name[row.name].append(row)
        for name, rows in by_name.items():
            console.print(_table(name, rows))
        for note in self.notes:
            console.print(Text(note, style="dim"))
        for peer, why in self.skipped.items():
            console.print(Text(f"left out: {peer}: {why}", style="yellow"))
        if not self.machine.quiet:
            console.print(
                Text(
                    f"Other processes used {self.machine.others_cores:.2f} cores before the run: "
                    "do not quote these figures.",
                    style="bold yellow",
                )
            )


def with_ratios(rows: Sequence[Row], *, ours: Sequence[str] = (OURS,)) -> list[Row]:
    """The rows, with our ones compared to the best of the others in the same name and metric.

    Figures of ours are never a peer's: rows of any name in `ours` are compared, not compared with.
    """
    theirs: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for row in rows:
        if row.peer not in ours:
            theirs[row.name, row.metric].append(row.value)
    return [
        Row(
            name=row.name,
            peer=row.peer,
            metric=row.metric,
            value=row.value,
            unit=row.unit,
            ratio=ratio(row.value, best(theirs[row.name, row.metric], row.unit)),
        )
        if row.peer in ours
        else row
        for row in rows
    ]


def _table(name: str, rows: Sequence[Row]) -> Table:
    metrics = list(dict.fromkeys(row.metric for row in rows))
    units = {row.metric: row.unit for row in rows}
    cells = {(row.peer, row.metric): row for row in rows}
    table = Table(title=name, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for metric in metrics:
        table.add_column(f"{_short(metric)}\n{units[metric]}", justify="right")
    for peer in dict.fromkeys(row.peer for row in rows):
        found = [cells.get((peer, metric)) for metric in metrics]
        table.add_row(Text(peer), *(_cell(row) for row in found))
    return table


def _short(metric: str) -> str:
    return metric.rpartition("_")[0].replace("_", " ") or metric


def _cell(row: Row | None) -> Text:
    if row is None:
        return Text("")
    text = Text(number(row.value))
    if row.ratio is not None:
        wins = row.ratio <= 1 if row.unit in LOWER_IS_BETTER else row.ratio >= 1
        text.append(f" ({row.ratio:.2f}x)", style="green" if wins else "red")
    return text


def number(value: float) -> str:
    """Three significant digits or a whole number, whichever is longer: 0.0123, 4.56, 1,234."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"
