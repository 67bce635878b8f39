"""Is the engine getting anywhere? The age of its last progress, as a TE's beats tell it. Pure: the clock is passed in.

Written by the engine thread (`busy`, `idle`), read by the shell (`age_s`). This module must not know threads: a single
attribute changes hands, which is atomic in CPython.
"""

from __future__ import annotations

import math
from typing import Final

# The shell asks with every beat; a longer gap means that the whole process stood still.
FORGIVEN_S: Final = 1.0


class Pulse:
    """When the engine last finished something while it had work."""

    def __init__(self) -> None:
        self._progress: float | None = None  # None: no work
        self._asked: float | None = None
        self._forgiven = -math.inf  # the shell's own: the engine thread alone writes `_progress`

    def busy(self, now: float) -> None:
        """A step was finished, or work came in, and there is work."""
        self._progress = now

    def idle(self) -> None:
        """There is no work."""
        self._progress = None

    def age_s(self, now: float) -> float:
        """Seconds since the last progress; 0 without work. To be asked several times a second.

        After a stop of the whole process (SIGSTOP, a frozen container) the engine gets its time anew: it could not
        have made progress.
        """
        asked, self._asked = self._asked, now
        progress = self._progress
        if progress is None:
            return 0.0
        if asked is not None and now - asked > FORGIVEN_S:
            self._forgiven = now
        return max(0.0, now - max(progress, self._forgiven))
