"""How fast an instance hands out bytes, over all its connections together: as fast as it can, or no faster than told.

So a source that has other work keeps room for it. It must not know what the bytes are, nor who reads them.
"""

from __future__ import annotations

import threading
import time


class Egress:
    """The way out of one instance; any thread. Those that share it take turns, chunk by chunk."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bytes_s = 0.0
        self._free_at = 0.0  # when what was handed out so far will have gone

    def limit(self, bytes_s: float) -> None:
        """From the next chunk on, so many bytes a second; 0: no limit."""
        with self._lock:
            self._bytes_s = bytes_s

    def book(self, num_bytes: int) -> float:
        """Let so many bytes be the next to go; the seconds to wait before they do."""
        with self._lock:
            if not self._bytes_s:
                return 0.0
            now = time.monotonic()
            start = max(now, self._free_at)
            self._free_at = start + num_bytes / self._bytes_s
            return start - now
