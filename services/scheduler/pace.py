"""How much nobody waits on may be in flight at once: as much as the TEs take without refusing, found by trying.

The limit grows by one with each answer until the first refusal, from then on by one a round; a refusal takes a third
off, once a round, and is a pause (additive increase, multiplicative decrease, as TCP does it). So batches fill what is
idle, and a few refusals tell when it no longer is. `Turns` shares the limit out among tenants. This module must not
know what is in flight.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from random import Random
from typing import Final

START: Final = 8
_CUT: Final = 0.7
_PAUSE_S: Final = 0.25
_MAX_PAUSE_S: Final = 15.0


class Pace:
    """The limit. Pure: the clock is passed in."""

    def __init__(self, most: int, random: Random) -> None:
        self.limit = float(min(START, most))
        self._most = most
        self._random = random
        self._threshold = float(most)  # below it the limit grows fast
        self._cut_at = -1.0
        self._paused_until = 0.0
        self._num_refusals = 0  # since the last success

    def pause_s(self, now: float) -> float:
        """How long nothing may start."""
        return max(0.0, self._paused_until - now)

    def can_start(self, num_in_flight: int, now: float) -> bool:
        """Whether one more may be in flight."""
        return num_in_flight < int(self.limit) and now >= self._paused_until

    def succeeded(self, num_in_flight: int) -> None:
        """One was answered. A limit that was not used says nothing."""
        self._num_refusals = 0
        if num_in_flight + 1 >= int(self.limit):
            grown = 1.0 if self.limit < self._threshold else 1.0 / self.limit
            self.limit = min(self.limit + grown, float(self._most))

    def refused(self, started: float, now: float, retry_after_s: float | None) -> None:
        """One that started then was refused. Those of one round are one refusal."""
        if started < self._cut_at:
            return
        self._cut_at = now
        self.limit = max(1.0, self.limit * _CUT)
        # Those after the first tell of a time without room, not of how much room there is.
        if not self._num_refusals:
            self._threshold = self.limit
        pause_s = retry_after_s or _PAUSE_S * 2.0 ** min(self._num_refusals, 10)
        self._num_refusals += 1
        pause_s = min(pause_s, _MAX_PAUSE_S) * (0.75 + self._random.random() / 2)
        self._paused_until = now + pause_s


class Turns:
    """Turns to be in flight: the next one goes to the tenant with the fewest, in the order in which they asked."""

    def __init__(self, pace: Pace, clock: Callable[[], float] = time.monotonic) -> None:
        self.pace = pace
        self._clock = clock
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        self._in_flight: dict[str, int] = {}
        self._timer: asyncio.TimerHandle | None = None

    @property
    def num_in_flight(self) -> int:
        """Of all tenants."""
        return sum(self._in_flight.values())

    @property
    def is_idle(self) -> bool:
        """Whether nobody has a turn or waits for one."""
        return not self._in_flight and not self._waiting

    @contextlib.asynccontextmanager
    async def turn(self, tenant: str) -> AsyncIterator[None]:
        """Wait for a turn, and have it until the block ends."""
        ready = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append(ready)
        self._grant()
        try:
            await ready
        except asyncio.CancelledError:
            if ready.done() and not ready.cancelled():
                self._release(tenant)
            else:
                self._forget(tenant, ready)
            raise
        try:
            yield
        finally:
            self._release(tenant)

    def _grant(self) -> None:
        now = self._clock()
        while self._waiting and self.pace.can_start(self.num_in_flight, now):
            tenant = min(self._waiting, key=lambda name: self._in_flight.get(name, 0))
            queue = self._waiting.pop(tenant)
            ready = queue.popleft()
            if queue:
                self._waiting[tenant] = queue  # behind the others with as few
            self._in_flight[tenant] = self._in_flight.get(tenant, 0) + 1
            ready.set_result(None)
        pause_s = self.pace.pause_s(now)
        if self._waiting and pause_s and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(pause_s, self._resume)

    def _resume(self) -> None:
        self._timer = None
        self._grant()

    def _release(self, tenant: str) -> None:
        self._in_flight[tenant] -= 1
        if not self._in_flight[tenant]:
            del self._in_flight[tenant]
        self._grant()

    def _forget(self, tenant: str, ready: asyncio.Future[None]) -> None:
        queue = self._waiting.get(tenant)
        if queue is not None and ready in queue:
            queue.remove(ready)
            if not queue:
                del self._waiting[tenant]
