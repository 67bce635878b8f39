"""What the AUTOSCALER is compared with: a rule like Kubernetes' Horizontal Pod Autoscaler, and an oracle.

Pure; this module must not know how a run is judged.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from deepflow.sim.profile import Profile
from deepflow.sim.trace import Call
from services.scheduler.cluster.autoscaler import Cause, Observation, Verdict
from services.scheduler.cluster.price import FILLED


class Hpa:
    """Kubernetes' rule with its defaults: every 15 s the number of TEs times the ratio of the metric's average to its
    target, unless that is within a tenth of 1; up by at most as many again, or 4; down to the highest of the last
    five minutes. It does not know 0. The metric is requests in flight per TE, averaged over a scrape of 15 s."""

    _SYNC_S: Final = 15.0
    _TOLERANCE: Final = 0.1
    _STABLE_S: Final = 300.0

    def __init__(self, per_te: float) -> None:
        self._per_te = per_te
        self._target = 1
        self._next = 0.0
        self._seen: list[float] = []
        self._wanted: deque[tuple[float, int]] = deque()

    def observe(self, observation: Observation, now: float) -> Verdict:
        """See `Rule`."""
        o = observation
        low, high = max(o.min_tes, 1), o.max_tes
        self._seen.append(o.running + o.waiting + o.parked)
        if now >= self._next:
            self._next = now + self._SYNC_S
            ratio = sum(self._seen) / len(self._seen) / max(o.ready, 1) / self._per_te
            self._seen.clear()
            wanted = self._target
            if abs(ratio - 1) > self._TOLERANCE:
                wanted = math.ceil(max(o.ready, 1) * ratio)
            self._wanted.append((now, wanted))
            while self._wanted[0][0] < now - self._STABLE_S:
                self._wanted.popleft()
            stable = max(one for _, one in self._wanted)
            if wanted > self._target:
                self._target = min(wanted, self._target + max(4, self._target))
            else:
                self._target = min(self._target, stable)
            self._target = min(max(self._target, low), high)
        return Verdict(self._target, "hpa", Cause.LOAD)


@dataclass(frozen=True, slots=True)
class Timetable:
    """So many TEs by the second, whatever is seen. `begins`: the time of its first second."""

    nums: Sequence[int]
    begins: float
    ahead_s: float

    def observe(self, observation: Observation, now: float) -> Verdict:
        """See `Rule`."""
        first = math.floor(now - self.begins)
        last = math.floor(now - self.begins + self.ahead_s)
        target = max(
            (self.nums[at] for at in range(max(first, 0), last + 1) if at < len(self.nums)),
            default=0,
        )
        low, high = observation.min_tes, observation.max_tes
        return Verdict(min(max(target, low), high), "known", Cause.FORECAST)


def work_s(call: Call, profile: Profile) -> float:
    """Seconds of one TE, its batch well filled."""
    batch = min(FILLED, profile.max_num_seqs)
    step_s = profile.decode_s(batch, batch * call.input_length, 1) / batch
    return profile.prefill_s(call.input_length) + call.output_length * step_s


def known(
    calls: Sequence[Call],
    profile: Profile,
    start_s: float,
    begins: float,
    wait_s: float = 1.0,
    factor: float = 1.3,
) -> Timetable:
    """The fewest TEs by the second with which `factor` times the work would wait for `wait_s` or so."""
    span = math.ceil((calls[-1].timestamp_ms - calls[0].timestamp_ms) / 1000) + 1
    loads = [0.0] * (span + 600)
    for call in calls:
        work = work_s(call, profile) * factor
        at = (call.timestamp_ms - calls[0].timestamp_ms) / 1000
        loads[int(at)] += work
    nums, backlog_s = [], 0.0
    for load in loads:
        backlog_s += load
        num = math.ceil(backlog_s / (1 + wait_s) - 1e-9)
        backlog_s = max(0.0, backlog_s - num)
        nums.append(num)
    return Timetable(nums, begins, start_s)
