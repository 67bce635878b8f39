"""How much of the machine others use while something is measured: a figure taken beside them is no figure.

It must not know what is measured.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import psutil


class Others:
    """Cores that were busy with other things than ours, over the spans that were watched."""

    def __init__(self) -> None:
        self._cpu_s = 0.0
        self._wall_s = 0.0

    @contextlib.contextmanager
    def watched(self, ours_s: Callable[[], float]) -> Iterator[None]:
        """Count what passes in the block; `ours_s` is the processor time that we have used up to now."""
        before_s, since = _busy_s() - ours_s(), time.monotonic()
        yield
        self._cpu_s += max(_busy_s() - ours_s() - before_s, 0.0)
        self._wall_s += time.monotonic() - since

    @property
    def cores(self) -> float:
        """On average; 0 where nothing was watched."""
        return self._cpu_s / self._wall_s if self._wall_s else 0.0


def _busy_s() -> float:
    """Of all processors of the machine, time stolen by its host included."""
    times = psutil.cpu_times()
    idle_s = times.idle + getattr(times, "iowait", 0.0)
    # A guest's time is counted in the user's.
    guest_s = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)
    return float(sum(times) - idle_s - guest_s)
