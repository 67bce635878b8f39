"""How much work will come in the next moments, from how much came in the last ones.

Pure; this module must not know TEs.
"""

from __future__ import annotations

import math


class Forecast:
    """The rate of work: seconds of one TE per second."""

    def __init__(self, fast_s: float, slow_s: float) -> None:
        self._taus = (fast_s, slow_s)
        self._rates = [0.0, 0.0]
        self._last: float | None = None

    def observe(self, work_s: float, now: float) -> None:
        """So much work has arrived since the last call."""
        if self._last is None:
            self._last = now
            return
        step_s = now - self._last
        self._last = now
        if step_s <= 0.0:
            return
        for place, tau_s in enumerate(self._taus):
            keep = math.exp(-step_s / tau_s)
            self._rates[place] = self._rates[place] * keep + work_s / step_s * (1 - keep)

    @property
    def fast(self) -> float:
        """Of the last moments."""
        return self._rates[0]

    @property
    def slow(self) -> float:
        """Of the recent past."""
        return self._rates[1]
