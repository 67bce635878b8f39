"""How long to keep what is not needed just now, learned from how long it was not needed before.

One histogram of gaps, as in "Serverless in the Wild" (Shahrad et al., ATC 2020), over buckets that grow, with old gaps
fading away. Two questions are asked of it: how long to wait before something is given up, and, where gaps are much
alike, when to have it back before it is asked for. Pure; this module must not know what is kept.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Final

_REMEMBERED: Final = 32  # gaps
_LEAST: Final = 3  # gaps that a habit takes
_SHARP: Final = 0.25  # coefficient of variation up to which gaps are much alike


@dataclass(frozen=True, slots=True)
class Habit:
    """Gaps that are much alike: the next need comes between `earliest_s` and `latest_s` after the last one's end."""

    earliest_s: float
    latest_s: float


class KeepAlive:
    """The last gaps between needs, in seconds. Bounded."""

    def __init__(self) -> None:
        self._gaps: deque[float] = deque(maxlen=_REMEMBERED)

    def __len__(self) -> int:
        return len(self._gaps)

    def ended(self, gap_s: float) -> None:
        """Needed again, after so long without a need."""
        self._gaps.append(gap_s)

    def keep_s(self, least_s: float, most_s: float) -> float:
        """How long to keep it: what is cheapest in hindsight of the gaps, where to have it again costs as much as to
        keep it for `least_s`; between `least_s` and `most_s`.

        Each gap costs its length if that is not longer than the time kept, else the time kept and `least_s`.
        """
        if len(self._gaps) < _LEAST:
            return least_s
        gaps = sorted(self._gaps)
        num = len(gaps)
        best_s, shorter_s = least_s, 0.0
        best_cost = math.fsum(gap_s if gap_s <= least_s else 2 * least_s for gap_s in gaps)
        for place, gap_s in enumerate(gaps, 1):
            if gap_s > most_s:
                break
            shorter_s += gap_s
            cost = shorter_s + (num - place) * (gap_s + least_s)
            if gap_s > least_s and cost < best_cost:
                best_s, best_cost = 1.1 * gap_s, cost
        return min(best_s, most_s)

    def habit(self) -> Habit | None:
        """What gaps are like, if they are much alike."""
        if len(self._gaps) < _LEAST:
            return None
        recent = list(self._gaps)[-2 * _LEAST :]
        mean_s = fmean(recent)
        spread_s = pstdev(recent, mean_s)
        if not math.isfinite(mean_s) or spread_s > _SHARP * mean_s:
            return None
        return Habit(min(recent), max(recent))
