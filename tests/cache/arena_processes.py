"""Starting `tests/shared/arena_process.py`: writers that are stopped or killed in the middle of a page."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from shared.rtc_messages import Slot

SCRIPT = Path(__file__).parents[1] / "shared" / "arena_process.py"


@contextmanager
def writer(
    verb: str, directory: Path, slot_bytes: int, pages: Iterable[tuple[Slot, int]]
) -> Iterator[subprocess.Popen[str]]:
    """A process that writes these pages (slot, fill byte), all of one segment; killed at the end."""
    pages = list(pages)
    words = [f"{slot.index}:{slot.generation}:{fill}" for slot, fill in pages]
    command = [sys.executable, str(SCRIPT), verb, str(directory), pages[0][0].segment]
    with subprocess.Popen(
        [*command, str(slot_bytes), *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=SCRIPT.parents[2],
        env={"PYTHONPATH": str(SCRIPT.parents[2])},
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def said(process: subprocess.Popen[str], word: str) -> None:
    """Waits until the process says this."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == word:
            return
    raise AssertionError(f"ended without saying {word!r}")


def stopped(process: subprocess.Popen[str]) -> None:
    """Waits until the process does not run."""
    status = Path(f"/proc/{process.pid}/stat")
    while status.read_text().rpartition(")")[2].split()[0] != "T":
        time.sleep(0.002)
