"""Pod hosts that do not have what they were ordered to: what is no use asking them for. Pure: the clock is passed in.

A pod host is the judge of its own memory, and may refuse what its budget, as far as it is known here, has room for. It
then simply has fewer TEs than it should, beat after beat. For a while it is taken to be able to have no more, longer
each time, so that its share goes elsewhere and does not come back with every beat. So it is with TEs that die as often
as they are started, where another pod host may do better.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import Final

from services.scheduler.policy.base import COLOCATED
from shared.scaling_messages import PodBeat

PATIENCE_S: Final = 1.0  # for so long, at least, it has had the order
_FIRST_S: Final = 5.0
_LONGEST_S: Final = 80.0
_RESTING_MS: Final = (
    11_000  # longer than a pod host waits between two starts: it has given up for now
)


@dataclass(slots=True)
class _Short:
    wanted: int
    since: float
    until: float = 0.0  # it can have no more before
    rest_s: float = _FIRST_S
    has: int = 0  # that many, when it was found out


class Shortages:
    """By pod host and model; those of a pod host are forgotten with it."""

    def __init__(self) -> None:
        self._short: dict[tuple[str, str], _Short] = {}

    def saw(self, beat: PodBeat, wanted: dict[str, int], now: float, *, others: Set[str]) -> None:
        """A beat of a pod host that has had its order. `others`: the models that another one could run, too."""
        is_making_room = any(te.state == "draining" for te in beat.tes)
        for model, num in wanted.items():
            has = sum(
                te.model == model
                and te.role == COLOCATED
                and te.state != "draining"
                and not (model in others and te.state == "waiting" and te.since_ms > _RESTING_MS)
                for te in beat.tes
            )
            self._judge((beat.id, model), num, has, now, is_waiting=is_making_room)

    def _judge(
        self, key: tuple[str, str], wanted: int, has: int, now: float, *, is_waiting: bool
    ) -> None:
        short = self._short.get(key)
        if short is not None and has > short.has:
            short = self._short[key] = _Short(wanted, now, has=has)  # it can, after all
        if has >= wanted or is_waiting:
            if short is not None:
                short.wanted, short.since = wanted, now
            return
        if short is None:
            self._short[key] = _Short(wanted, now, has=has)
        elif wanted != short.wanted:
            short.wanted, short.since = wanted, now
        elif now - short.since >= PATIENCE_S and now >= short.until:
            short.has, short.until = has, now + short.rest_s
            short.rest_s = min(2 * short.rest_s, _LONGEST_S)

    def caps(self, now: float) -> dict[str, dict[str, int]]:
        """By pod host: how many TEs of a model it can have at the most, where it was found out."""
        found: dict[str, dict[str, int]] = {}
        for (pod, model), short in self._short.items():
            if now < short.until:
                found.setdefault(pod, {})[model] = short.has
        return found

    def forget(self, pod: str) -> None:
        """It is gone."""
        for key in [key for key in self._short if key[0] == pod]:
            del self._short[key]
