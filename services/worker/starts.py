"""How long the five steps of each TE's start took: one `Starting` while it comes up, `Starts` for those that are up.

The TE measures what happens in it and says so; the pod host measures what lies before and after. Pure: the clock is
passed in. This module must not know processes or the bus.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from services.worker.tie import Loaded, Ready, StepTook, TeEvent, WeightsCame
from shared.scaling_messages import Start, Step

KEPT: Final = 64
RECENT_S: Final = 2.0  # so long a start is in the beats: a few may be lost


class Starting:
    """A TE on its way up: asked for at `asked`, seconds of any steady clock."""

    def __init__(self, asked: float) -> None:
        self.asked = asked
        self.progress = 0  # percent
        self.process = ""  # how its process came to be
        self._weights = "disk"
        self._steps = dict.fromkeys(Step, 0.0)
        self._ready: float | None = None
        self._heard: float | None = None

    def made(self, process: str, now: float) -> None:
        """There is a process for it."""
        self.process = process
        self._steps[Step.SCALER_PRE] = now - self.asked

    def take(self, event: TeEvent, now: float) -> None:
        """What the TE says of itself."""
        match event:
            case StepTook(step, seconds):
                self._steps[step] = seconds
            case Loaded(percent):
                self.progress = percent
            case WeightsCame(source):
                self._weights = source
            case Ready():
                self._ready = now

    def heard(self, now: float) -> None:
        """Its first beat as a ready one came in."""
        if self._heard is None:
            self._heard = now

    def done(self, te: str, model: str, role: str) -> Start | None:
        """The whole of it; None until both the TE said that it is ready and its beat was heard, in either order."""
        if self._ready is None or self._heard is None:
            return None
        self._steps[Step.SCALER_POST] = max(0.0, self._heard - self._ready)
        return Start(
            te=te,
            model=model,
            role=role,
            process=self.process,
            weights=self._weights,
            steps={step.value: round(seconds, 6) for step, seconds in self._steps.items()},
            total_s=round(max(self._heard, self._ready) - self.asked, 6),
        )


class Starts:
    """The last starts of a pod host."""

    def __init__(self) -> None:
        self._starts: deque[tuple[float, Start]] = deque(maxlen=KEPT)

    def add(self, start: Start, now: float) -> None:
        """A TE is up."""
        self._starts.append((now, start))

    def all(self) -> list[Start]:
        """The oldest first."""
        return [start for _, start in self._starts]

    def recent(self, now: float) -> list[Start]:
        """Those of the last few seconds."""
        return [start for at, start in self._starts if now - at <= RECENT_S]
