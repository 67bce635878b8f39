"""TEs that come and go while requests do: by a timetable, or as a rule has it. Data; `cluster.py` and `manager.py` have
it happen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from services.scheduler.cluster.autoscaler import Autoscaler, Observation, Verdict
from services.scheduler.policy.base import COLOCATED


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling:
    """`num` TEs more of a role from `at` on, or (a negative number) fewer.

    New ones are made like the first of their role, and have to load; those that go finish what they have.
    """

    at: float
    num: int
    role: str = COLOCATED


class Rule(Protocol):
    """Who says how many TEs are to be up."""

    def observe(self, observation: Observation, now: float) -> Verdict:
        """Called every `Autoscaling.every_s`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Autoscaling:
    """Between `min_tes` and `max_tes` TEs, as many as the rule says. Times are seconds.

    `make` gives a rule of a run's own. A request counts as late where its first token comes after `slo_ttft_s`.
    """

    min_tes: int = 0
    max_tes: int = 64
    make: Callable[[], Rule] = Autoscaler
    every_s: float = 0.25
    slo_ttft_s: float = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """From `at` on, `target` TEs were to be up, when `ready` were."""

    at: float
    target: int
    ready: int
    cause: str
