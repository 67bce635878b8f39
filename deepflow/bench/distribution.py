"""Percentiles of a handful of measurements. Pure; it must not know what was measured, or in which unit."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Final

PERCENTILES: Final = (50, 90, 99)


def percentile(values: Sequence[float], percent: float) -> float:
    """The value that `percent` of the values do not pass, linear between the two nearest ranks (as numpy's default).

    Raises ValueError without values, or for a percentage outside [0, 100].
    """
    if not values or not 0 <= percent <= 100:
        raise ValueError("a percentile needs values, and a percentage within 0 to 100")
    ordered = sorted(values)
    rank = (len(ordered) - 1) * percent / 100
    low = math.floor(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def summary(name: str, unit: str, values: Sequence[float]) -> dict[str, float]:
    """`<name>_mean_<unit>`, `<name>_p50_<unit>` and so on; nothing at all without values."""
    if not values:
        return {}
    figures = {f"{name}_mean_{unit}": statistics.fmean(values)}
    for percent in PERCENTILES:
        figures[f"{name}_p{percent}_{unit}"] = percentile(values, percent)
    return figures
