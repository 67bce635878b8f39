"""Processes that write to an arena and die, or stop, in the middle of it. Started by the tests, with real signals.

Usage: arena_process.py VERB DIRECTORY SEGMENT SLOT_BYTES [SLOT:GENERATION:FILL ...]; pages are filled with one byte and
named by it. All are written, then it says "ready" and waits for its input to end; but in the middle of the last
page it ends itself with SIGKILL (VERB "kill"), or stops itself with SIGSTOP until it is continued (VERB "stop").
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import numpy as np
import xxhash

from shared.arena.writer import WriteSegment
from shared.rtc_messages import Slot


class Interrupted(WriteSegment):
    """A writer to which a signal happens between the two halves of a page."""

    signal: signal.Signals | None = None

    def _copy(
        self, source: np.ndarray[tuple[int], np.dtype[np.uint8]], start: int, generation: int
    ) -> int:
        if self.signal is None:
            return super()._copy(source, start, generation)
        half = len(source) // 2
        np.copyto(self._bytes[start : start + half], source[:half])
        os.kill(os.getpid(), self.signal)
        np.copyto(self._bytes[start + half : start + len(source)], source[half:])
        return xxhash.xxh3_64_intdigest(source.data, seed=generation)


def main() -> None:
    """Does what the command line says."""
    verb, directory, name, slot_bytes, *pages = sys.argv[1:]
    segment = Interrupted.open(Path(directory), name)
    for number, page in enumerate(pages, start=1):
        index, generation, fill = map(int, page.split(":"))
        if number == len(pages):
            segment.signal = signal.SIGKILL if verb == "kill" else signal.SIGSTOP
        slot = Slot(segment=name, index=index, generation=generation)
        if not segment.write(slot, bytes([fill]) * 16, bytes([fill]) * int(slot_bytes)):
            raise SystemExit("refused")
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.read()


if __name__ == "__main__":
    main()
