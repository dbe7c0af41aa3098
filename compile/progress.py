"""What long work reports while it runs, and a rich progress bar that shows it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)


class Progressing(Protocol):
    """Told what is being done. One stage follows the other; a stage may know how far it is."""

    def stage(self, title: str) -> None:
        """Begin the next stage, which ends the one before."""
        ...

    def advance(self, *, done: float, total: float) -> None:
        """State how much of this stage is done, in a unit of its own."""
        ...


class Silent:
    """Shows nothing."""

    def stage(self, title: str) -> None: ...

    def advance(self, *, done: float, total: float) -> None: ...


class Bars:
    """One line a stage, on standard error, so that what is printed for programs stays clean."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task: TaskID | None = None

    def stage(self, title: str) -> None:
        self._complete()
        self._task = self._progress.add_task(title, total=None)

    def advance(self, *, done: float, total: float) -> None:
        assert self._task is not None, "a stage begins before it advances"
        self._progress.update(self._task, completed=done, total=total)

    def _complete(self) -> None:
        if self._task is not None:
            self._progress.update(self._task, total=1, completed=1)


@contextmanager
def bars() -> Iterator[Bars]:
    """Show progress while the block runs."""
    columns = (
        SpinnerColumn(finished_text="[green]✓"),
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        shown = Bars(progress)
        yield shown
        shown._complete()
