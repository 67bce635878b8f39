"""AUTOSCALER: how many TEs of one model are to be up.

Pure: what was seen goes in, a number comes out; the clock is passed in. This module must not know the bus, pod hosts,
or where a TE would go.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from services.scheduler.cluster.forecast import Forecast
from services.scheduler.cluster.keep_alive import KeepAlive


class Cause(StrEnum):
    """Why a target is what it is, for metrics."""

    BOUND = "bound"  # the operator's or the pod hosts' minimum or maximum
    PARKED = "parked"  # somebody waits and nobody is up
    BACKLOG = "backlog"  # what waits would not be done in time
    LOAD = "load"  # predicted work
    SLOTS = "slots"  # choices that run at once
    LATE = "late"  # the objective is missed
    FORECAST = "forecast"  # demand is expected
    COOLING = "cooling"  # not for long enough without a need
    IDLE = "idle"  # nothing is asked for


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """One model at one time. `arrivals`, `work_s`, `answered` and `late` are since the last observation.

    `num_slots`: choices that one TE runs at once; 0: not known. `parked_wait_s` is for people: what counts is how many
    wait, and what they ask for. `work_s`: predicted work of the arrivals, in seconds of one TE with a well-filled batch
    (`price`). `start_s`: from an order to a TE that serves. `keep_alive_s`: an operator's, else what is learned.
    """

    model: str
    min_tes: int
    max_tes: int
    ready: int = 0
    starting: int = 0
    draining: int = 0
    num_slots: int = 0
    running: int = 0
    waiting: int = 0
    parked: int = 0
    parked_wait_s: float = 0.0
    arrivals: int = 0
    work_s: float = 0.0
    answered: int = 0
    late: int = 0
    start_s: float = 1.0
    keep_alive_s: float | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """How many TEs are to be up, and why: for metrics, and for people."""

    target: int
    reason: str
    cause: Cause = Cause.IDLE


MOMENT_S: Final = 0.5  # between two observations, at the most
_LONGEST_GAP_S: Final = 3600.0  # longer ones are nobody's habit


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoscalerSettings:
    """What the rule goes by; times are seconds. Nothing in it depends on a model or its machine."""

    utilization: float = 0.85  # of a TE by predicted work: more TEs above it
    relaxed: float = 0.7  # fewer only where those that stay are below it
    slots: float = 0.8  # of a TE's
    drain_s: float = 3.0  # what waits is to be done in that time
    fast_s: float = 4.0  # over which a burst's rate is taken
    slow_s: float = 30.0
    least_keep_s: float = 8.0  # a TE that is not needed is kept so long, and
    start_keep: float = 6.0  # for so many starts, at the least
    last_keep: float = 4.0  # the last one for so many times as long
    most_keep_s: float = 300.0


class Autoscaler:
    """One model's. `observe` several times a second.

    What is needed now follows from the rate of work, what waits, what is late and the slots that are taken. A TE is
    kept for as long as the gaps between needs of as many TEs as there are with it make worth while, and had again
    before the next need where these gaps are much alike: the n-th TE has a `KeepAlive` of its own.
    """

    def __init__(self, settings: AutoscalerSettings | None = None) -> None:
        self._settings = settings or AutoscalerSettings()
        self._rate = Forecast(self._settings.fast_s, self._settings.slow_s)
        self._levels: list[_Level] = []
        self._target = 0
        self._is_new = True
        self._mean_s = 0.0  # work of an arrival
        self._late = 0.0  # share of the answers

    def observe(self, observation: Observation, now: float) -> Verdict:
        """How many TEs are to be up now that this was seen."""
        o = observation
        if self._is_new:
            self._take_over(o, now)
        self._learn(o, now)
        low, high = min(o.min_tes, o.max_tes), o.max_tes
        needed, cause, why = self._need(o)
        needed = min(needed, high)
        kept = self._keep(needed, o, now)
        target = needed
        if kept.target > needed:
            target, cause, why = kept.target, kept.cause, kept.reason
        if target < low:
            target, cause, why = low, Cause.BOUND, f"{low} at the least"
        self._target = min(target, high)
        return Verdict(self._target, why, cause)

    def _take_over(self, o: Observation, now: float) -> None:
        """What is found at first was needed by somebody who knew more: it is kept as if that were now."""
        self._is_new = False
        self._target = min(o.ready + o.starting, o.max_tes)
        for _ in range(self._target):
            self._levels.append(_Level(now))

    def _learn(self, o: Observation, now: float) -> None:
        self._rate.observe(o.work_s, now)
        if o.arrivals:
            weight = min(1.0, 0.05 * o.arrivals) if self._mean_s else 1.0
            self._mean_s += weight * (o.work_s / o.arrivals - self._mean_s)
        if o.answered:
            weight = min(0.5, 0.02 * o.answered)
            self._late += weight * (min(o.late / o.answered, 1.0) - self._late)

    def _need(self, o: Observation) -> tuple[int, Cause, str]:
        """What is needed now, if nothing but the present counted."""
        s = self._settings
        num = o.running + o.waiting + o.parked
        if not num and not o.arrivals:
            return 0, Cause.IDLE, "nothing is asked for"
        rate = max(self._rate.fast, self._rate.slow)
        queued = o.waiting + o.parked
        backlog = queued * self._mean_s / s.drain_s
        load = (rate + backlog) * (1.0 + self._late)
        # As many as there are requests at the most: a TE more would have nothing to do.
        up = min(math.ceil(load / s.utilization), max(num, 1))
        down = min(self._target, math.ceil(load / s.relaxed))
        if o.parked and not o.ready and up <= 1:
            needs = [(1, Cause.PARKED, f"{o.parked} wait and nobody is up")]
        elif backlog > rate:
            needs = [(max(up, down), Cause.BACKLOG, f"{queued} wait")]
        elif self._late > 0.05:
            needs = [(max(up, down), Cause.LATE, f"{self._late:.0%} of the answers are late")]
        else:
            needs = [(max(up, down), Cause.LOAD, f"work for {load:.1f} TEs")]
        needs.append((1, Cause.LOAD, f"{num} requests"))
        if o.num_slots:
            taken = math.ceil(num / (s.slots * o.num_slots))
            needs.append((taken, Cause.SLOTS, f"{num} requests, {o.num_slots} to a TE"))
        return max(needs, key=lambda one: one[0])

    def _keep(self, needed: int, o: Observation, now: float) -> Verdict:
        """How many are kept, or to be had again, whatever is needed now."""
        s = self._settings
        while len(self._levels) < needed:
            self._levels.append(_Level())
        kept = Verdict(0, "")
        for place, level in enumerate(self._levels):
            least_s = max(s.least_keep_s, s.start_keep * o.start_s)
            least_s = min(least_s if place else least_s * s.last_keep, s.most_keep_s)
            if place < needed:
                level.needed(now, least_s)
                continue
            keep_s = level.gaps.keep_s(least_s, s.most_keep_s)
            if place == 0 and o.keep_alive_s is not None:
                keep_s = o.keep_alive_s
            idle_s = now - level.last
            habit = level.gaps.habit()
            if idle_s <= keep_s and place < self._target:
                why = f"the need of {place + 1} is {idle_s:.0f} s ago, kept for {keep_s:.0f} s"
                kept = Verdict(place + 1, why, Cause.COOLING)
            elif habit is not None:
                margin_s = MOMENT_S + 0.1 * habit.latest_s
                ahead_s = habit.earliest_s - idle_s
                if ahead_s <= o.start_s + margin_s and idle_s <= habit.latest_s + margin_s:
                    why = f"{place + 1} are expected to be needed in {max(ahead_s, 0.0):.0f} s"
                    kept = Verdict(place + 1, why, Cause.FORECAST)
        return kept


class _Level:
    """When the n-th TE was needed. Gaps through which it is kept anyhow teach nothing."""

    __slots__ = ("gaps", "last")

    def __init__(self, last: float = -math.inf) -> None:
        self.last = last
        self.gaps = KeepAlive()

    def needed(self, now: float, least_s: float) -> None:
        gap_s = now - self.last
        if least_s < gap_s <= _LONGEST_GAP_S:
            self.gaps.ended(gap_s)
        self.last = now
