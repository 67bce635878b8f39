"""Virtual time: events in the order of their times, and processes that wait without anything passing outside.

Two events of one time happen in the order in which they were set. Nothing here draws chance or reads a real clock, so
a run is a function of what is put in. This module must not know what the events are.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from heapq import heappop, heappush
from itertools import count
from typing import Any, TypeAlias

# A process yields the seconds it waits.
Process: TypeAlias = Generator[float, None, None]


class Clock:
    """An event loop whose `now` jumps from event to event. Seconds, from 0 on."""

    def __init__(self) -> None:
        self.now = 0.0
        self.num_events = 0
        self._events: list[tuple[float, int, Callable[..., Any], tuple[Any, ...]]] = []
        self._numbers = count()
        self._stopped = False

    def at(self, when: float, event: Callable[..., Any], *args: Any) -> None:
        """Have `event` called at a time; one that has passed is now."""
        heappush(self._events, (max(when, self.now), next(self._numbers), event, args))

    def after(self, delay_s: float, event: Callable[..., Any], *args: Any) -> None:
        """Have `event` called after a delay."""
        heappush(self._events, (self.now + delay_s, next(self._numbers), event, args))

    def spawn(self, process: Process) -> None:
        """Run a process: at once up to where it first waits, and on from there as its delays pass."""
        for delay_s in process:
            self.after(delay_s, self.spawn, process)
            return

    def run(self, until: float | None = None) -> None:
        """Let time pass until nothing is left to happen, or `stop`, or the given time."""
        self._stopped = False
        while self._events and not self._stopped:
            if until is not None and self._events[0][0] > until:
                self.now = until
                return
            self.now, _, event, args = heappop(self._events)
            self.num_events += 1
            event(*args)

    def stop(self) -> None:
        """Make `run` return after the present event."""
        self._stopped = True
