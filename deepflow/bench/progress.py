"""How a bench shows that it is at work: a bar where there is a terminal, else a line.

It must not know what is measured.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import Progress


@contextlib.contextmanager
def step(progress: Progress, text: str, total: int) -> Iterator[Callable[[], None]]:
    """A line of progress; what it yields counts one part as done."""
    if progress.disable:  # no terminal
        progress.console.print(text, markup=False)
    task = progress.add_task(text, total=total)
    yield lambda: progress.advance(task)
    progress.update(task, completed=total)


class PullLines:
    """What a pull tells, a line per step."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def step(self, name: str, total_bytes: int) -> None:
        """A new step begins."""
        size = f" ({total_bytes / 1e6:.0f} MB)" if total_bytes else ""
        self._console.print(f"  {name}{size}", markup=False)

    def advance(self, num_bytes: int) -> None:
        """Not shown."""
