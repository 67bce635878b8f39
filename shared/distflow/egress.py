"""How fast an instance hands out what can wait, over all its connections together: as fast as it can, or as it is told.

So a source that has other work keeps room for it. It must not know what the bytes are, nor who reads them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Egress:
    """The way out of one instance; any thread. Those that share it take turns, chunk by chunk."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rate: Callable[[], float] = float
        self._free_at = 0.0  # when what was booked so far will have gone

    def limit(self, rate: Callable[[], float]) -> None:
        """From the next chunk on, as many bytes a second as `rate` says then; 0: no limit."""
        with self._lock:
            self._rate = rate

    def book(self, num_bytes: int) -> float:
        """Let so many bytes be the next to go; the seconds until the last of them would have, after which to send."""
        with self._lock:
            bytes_s = self._rate()
            if not bytes_s:
                return 0.0
            now = time.monotonic()
            self._free_at = max(now, self._free_at) + num_bytes / bytes_s
            return self._free_at - now
