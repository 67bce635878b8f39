"""What the command line shows: one console for people, one for errors, and the bars of a pull."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, NoReturn

import typer
from rich.console import Console
from rich.measure import Measurement
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

_MAX_WIDTH: Final = 1000

# Addresses and commands are copied from the screen: never broken, never coloured by guess.
console = Console(soft_wrap=True, highlight=False)
errors = Console(soft_wrap=True, highlight=False, stderr=True)


def say(line: str) -> None:
    """One line for the person who watches."""
    console.print(line, markup=False)


def show_table(table: Table) -> None:
    """A table, as wide as it is: names are copied from it. On a narrow screen its lines go on in the next one."""
    wide = console.options.update(max_width=_MAX_WIDTH)
    table.width = Measurement.get(console, wide, table).maximum
    console.print(table)


def fail(line: str, code: int = 1) -> NoReturn:
    """One line of error, and the end of the command."""
    errors.print(line, markup=False, style="red")
    raise typer.Exit(code)


class Bars:
    """A pull's steps as progress bars; where there is no terminal, a line per step."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._task: TaskID | None = None

    def step(self, name: str, total_bytes: int) -> None:
        """A new step begins and the former one is over; `total_bytes` 0 means of unknown size."""
        self._finish()
        size = f" ({total_bytes / 1e6:.0f} MB)" if total_bytes else ""
        if not console.is_terminal:
            say(f"  {name}{size}")
        self._task = self._bars.add_task(name, total=total_bytes or None)

    def advance(self, num_bytes: int) -> None:
        """So many more bytes of the present step are done."""
        if self._task is not None:
            self._bars.advance(self._task, num_bytes)

    def _finish(self) -> None:
        if self._task is not None:
            done = self._bars.tasks[self._task].completed
            self._bars.update(self._task, total=done or 1, completed=done or 1)


@contextmanager
def bars() -> Iterator[Bars]:
    """Progress bars for as long as the block runs."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        shown = Bars(progress)
        yield shown
        shown._finish()
