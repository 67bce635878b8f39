"""When a dead child is started again: exponential back-off, and giving up. Pure: the clock is passed in.

This module must not know what died or how it is started.
"""

from __future__ import annotations

from collections import deque
from typing import Final

FIRST_S: Final = 0.2
LONGEST_S: Final = 10.0
LIMIT: Final = 5  # deaths ...
WINDOW_S: Final = 60.0  # ... within this time mean that starting again does not help


class Restarts:
    """The deaths of one place under supervision."""

    def __init__(self) -> None:
        self._deaths: deque[float] = deque(maxlen=LIMIT)
        self._delay_s = FIRST_S

    def died(self, now: float) -> float | None:
        """Count a death at `now` (seconds of any steady clock): how long to wait, None to give up.

        The wait doubles from death to death, and starts over after a life longer than the window.
        """
        if self._deaths and now - self._deaths[-1] > WINDOW_S:
            self._delay_s = FIRST_S
        self._deaths.append(now)
        if len(self._deaths) == LIMIT and now - self._deaths[0] <= WINDOW_S:
            return None
        delay_s, self._delay_s = self._delay_s, min(2 * self._delay_s, LONGEST_S)
        return delay_s
