"""What a request without a TE may expect: whether one is on its way, how far it is, and how long all that takes.

The cluster manager tells (`Fleet`), beats of loading TEs tell, and what was seen of this JE's own queue tells. A fleet
that has not been heard of for a while counts for nothing: then nobody is refused, and nobody is held back.
Pure: the clock is passed in; this module must not know the bus, or what is parked.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from shared.errors import NotReady
from shared.messages import TeBeat
from shared.scaling_messages import Fleet

FRESH_S: Final = 3.0  # three times as long as the manager takes between two words
SPREAD_S: Final = 10.0  # that long TEs on their way are waited for, while others are up
SOON_MS: Final = 2000  # within that, a burst had better wait for the TEs that come than share one
RETRY_AFTER_S: Final = (1.0, 300.0)
OFF_RETRY_S: Final = 60.0  # an operator does not change his mind every second
_UNKNOWN_S: Final = 5.0  # how long a start takes, until one was seen
_GAP_KEPT_S: Final = 60.0
_WEIGHT: Final = 1 / 16  # of the latest gap
_MAX_MODELS: Final = 4096


@dataclass(frozen=True, slots=True)
class Stage:
    """What a parked request waits for: queued | loading (`percent` done) | warm (a TE is up, others go first)."""

    name: str
    percent: int = 0


QUEUED: Final = Stage("queued")
WARM: Final = Stage("warm")


@dataclass(slots=True)
class _Seen:
    """What was seen of one model."""

    fleet: Fleet | None = None
    heard: float = float("-inf")
    starting_since: float | None = None  # TEs are on their way, without a break
    asleep_since: float | None = None  # requests wait, and no TE was up when the first one came
    start_s: float | None = None  # smoothed: how long such a first one waited
    left: float | None = None  # when a parked request last left for a TE, and others stayed
    gap_s: float = 0.0  # smoothed: between two that left


class Outlook:
    """Of all models, as one JE sees it."""

    def __init__(self) -> None:
        self._seen: dict[str, _Seen] = {}

    # ------------------------------------------------------------------------------------------------ what one hears

    def heard(self, fleet: Fleet, now: float) -> None:
        """The cluster manager says what it is about; a former one that still talks is not listened to."""
        seen = self._of(fleet.model)
        before = self.fleet(fleet.model, now)
        if before is not None and fleet.term < before.term:
            return
        if not fleet.starting:
            seen.starting_since = None
        elif seen.starting_since is None:
            seen.starting_since = now
        seen.fleet, seen.heard = fleet, now

    def waits(self, model: str, now: float) -> None:
        """A request is parked as the first one of its model, and no TE is up."""
        seen = self._of(model)
        seen.asleep_since, seen.left = now, None

    def woke(self, model: str, now: float) -> None:
        """A TE of the model is up."""
        seen = self._seen.get(model)
        if seen is not None and seen.asleep_since is not None:
            took_s = now - seen.asleep_since
            seen.start_s = took_s if seen.start_s is None else (seen.start_s + took_s) / 2
            seen.asleep_since = None

    def left(self, model: str, now: float, *, is_last: bool) -> None:
        """A parked request went to a TE; `is_last`: nobody else waits."""
        seen = self._of(model)
        if seen.left is not None:
            gap_s = min(now - seen.left, _GAP_KEPT_S)
            seen.gap_s += (gap_s - seen.gap_s) * (_WEIGHT if seen.gap_s else 1.0)
        seen.left = None if is_last else now

    # ----------------------------------------------------------------------------------------------- what may be told

    def fleet(self, model: str, now: float) -> Fleet | None:
        """What the cluster manager said last, if that was just now."""
        seen = self._seen.get(model)
        return seen.fleet if seen is not None and now - seen.heard <= FRESH_S else None

    def stage(self, model: str, beats: Iterable[TeBeat], now: float) -> Stage:
        """What a parked request waits for; `beats` are those of the model's live TEs."""
        fleet = self.fleet(model, now)
        loading = [fleet.progress] if fleet is not None and fleet.starting else []
        for beat in beats:
            if beat.state == "ready":
                return WARM
            if beat.state == "loading":
                loading.append(beat.loading)
        return Stage("loading", max(0, min(100, max(loading)))) if loading else QUEUED

    def is_spreading(self, model: str, now: float) -> bool:
        """Whether more TEs come so soon that those that are up are not to be given more than they run at once."""
        seen = self._seen.get(model)
        return (
            seen is not None
            and seen.starting_since is not None
            and now - seen.starting_since <= SPREAD_S
            and self.fleet(model, now) is not None
        )

    def share(self, model: str, num_tasks: int, now: float) -> int | None:
        """How many of all the tasks that run and wait one TE is to have, while others come at any moment; None where
        a TE may have as many as it runs at once."""
        fleet = self.fleet(model, now)
        if fleet is None or not 0 <= fleet.eta_ms <= SOON_MS:
            return None
        return max(1, -(-num_tasks // max(1, fleet.target)))

    def refusal(
        self, model: str, *, budget_s: float, num_ahead: int, is_alive: bool, now: float
    ) -> NotReady | None:
        """Why a request that may wait for `budget_s` until a TE is ready is not to wait at all; None: it may well be
        served in time.

        `is_alive`: a TE of the model is there, in some other state. Only what the cluster manager knows is held against
        a request: what was seen of former starts may have been the fault of a bad hour.
        """
        fleet = self.fleet(model, now)
        if fleet is None:
            return None
        if self.is_off(model, is_alive=is_alive, now=now):
            return NotReady(
                f"model {model!r} is switched off: it may have no replica",
                retry_after_s=OFF_RETRY_S,
            )
        if fleet.eta_ms < 0:
            return None
        wait_s = fleet.eta_ms / 1000 + num_ahead * self._gap_s(model)
        if wait_s <= budget_s:
            return None
        return NotReady(
            f"no replica of model {model!r} is up, and none will be in time",
            retry_after_s=_bounded(wait_s),
        )

    def is_off(self, model: str, *, is_alive: bool, now: float) -> bool:
        """Whether the model is to have no TE, and has none."""
        fleet = self.fleet(model, now)
        return (
            fleet is not None
            and not is_alive
            and not (fleet.max_tes or fleet.target or fleet.ready or fleet.starting)
        )

    def retry_after_s(self, model: str, *, num_ahead: int, is_ready: bool, now: float) -> float:
        """When to try again: once a TE is up, and has taken those who waited before."""
        seen, fleet = self._seen.get(model), self.fleet(model, now)
        start_s = 0.0
        if not is_ready:
            if fleet is not None and fleet.eta_ms >= 0:
                start_s = fleet.eta_ms / 1000
            else:
                start_s = _UNKNOWN_S if seen is None or seen.start_s is None else seen.start_s
        return _bounded(start_s + num_ahead * self._gap_s(model))

    def _gap_s(self, model: str) -> float:
        seen = self._seen.get(model)
        return seen.gap_s if seen is not None else 0.0

    def _of(self, model: str) -> _Seen:
        seen = self._seen.get(model)
        if seen is None:
            if len(self._seen) >= _MAX_MODELS:
                del self._seen[next(iter(self._seen))]
            seen = self._seen[model] = _Seen()
        return seen


def _bounded(seconds: float) -> float:
    low, high = RETRY_AFTER_S
    return max(low, min(high, seconds))
