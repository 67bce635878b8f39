"""Do the executors live? Each counts up in shared memory while it runs; who no longer does is stopped, or worse.

A thread counts, so a rank that computes or waits for the others beats on, and one that SIGSTOP froze does not. That a
rank computes for ever is not seen here but in the steps that no longer come: the pod host watches those. This module
must not know processes.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from collections.abc import Sequence
from typing import Final

BEAT_S: Final = 0.1
HUNG_S: Final = 2.0  # without a beat
# Before a rank has loaded, imports of large libraries may keep the interpreter from its threads.
HUNG_LOADING_S: Final = 60.0
FORGIVEN_S: Final = 1.0  # who watches and was away for so long cannot tell
_COUNT: Final = struct.Struct("<Q")
_STRIDE: Final = 64  # a cache line each


class Heartbeats:
    """One counter for each rank, in an anonymous file that all of them map."""

    def __init__(self, fd: int, num_ranks: int) -> None:
        self._memory = mmap.mmap(fd, num_ranks * _STRIDE)
        self._num_ranks = num_ranks
        self._count = 0

    @staticmethod
    def make(num_ranks: int) -> int:
        """The descriptor of new counters, all 0."""
        fd = os.memfd_create("deepflow-heartbeats")
        os.ftruncate(fd, num_ranks * _STRIDE)
        return fd

    def beat(self, rank: int) -> None:
        """Count one up. Only `rank` itself does."""
        self._count += 1
        _COUNT.pack_into(self._memory, rank * _STRIDE, self._count)

    def counts(self) -> list[int]:
        """All counters, by rank."""
        return [_COUNT.unpack_from(self._memory, r * _STRIDE)[0] for r in range(self._num_ranks)]


class Judge:
    """Who hangs. Pure: counters and clock are passed in. To be asked several times a second.

    If the judge itself stood still (SIGSTOP of its process, a frozen machine), everybody gets their time anew.
    """

    def __init__(self) -> None:
        self._seen: dict[int, tuple[int, float]] = {}  # rank -> its count, and since when
        self._asked = -math.inf

    def hung(self, counts: Sequence[int], now: float, *, within_s: float) -> list[int]:
        """The ranks from 1 on whose counters have stood still for longer than `within_s`."""
        was_away, self._asked = now - self._asked > FORGIVEN_S, now
        for rank, count in enumerate(counts):
            if was_away or self._seen.get(rank, (-1, 0.0))[0] != count:
                self._seen[rank] = (count, now)
        return [r for r in range(1, len(counts)) if now - self._seen[r][1] > within_s]
