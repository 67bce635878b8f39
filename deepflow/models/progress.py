"""How a pull tells what it is doing: steps with a size in bytes, and their advance. Knows nothing of terminals."""

from __future__ import annotations

import fnmatch
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol


class Progress(Protocol):
    """What the command line implements to draw bars. Calls may come from a helper thread, never from two at once."""

    def step(self, name: str, total_bytes: int) -> None:
        """A new step begins and the former one is over; `total_bytes` 0 means of unknown size."""

    def advance(self, num_bytes: int) -> None:
        """So many more bytes of the present step are done."""


class Silent:
    """A Progress that shows nothing."""

    def step(self, name: str, total_bytes: int) -> None:
        """Ignored."""

    def advance(self, num_bytes: int) -> None:
        """Ignored."""


@contextmanager
def watching(
    folder: Path, progress: Progress, *, pattern: str = "*", period_s: float = 0.2
) -> Iterator[None]:
    """Reports the growth of the files under `folder` that match: for downloaders that do not report themselves."""
    over = threading.Event()

    def watch() -> None:
        seen = 0
        while True:
            last = over.wait(period_s)
            size = _tree_bytes(folder, pattern)
            if size > seen:
                progress.advance(size - seen)
                seen = size
            if last:
                return

    watcher = threading.Thread(target=watch, name="pull-progress", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def _tree_bytes(folder: Path, pattern: str) -> int:
    """Files and folders that are moved away meanwhile do not count: that is what downloaders do."""
    total = 0
    for root, _, names in os.walk(folder):  # passes over a folder that is gone, as glob does not
        for name in fnmatch.filter(names, pattern):
            with suppress(OSError):
                total += os.stat(os.path.join(root, name)).st_size
    return total
