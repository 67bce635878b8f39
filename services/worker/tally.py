"""Counters that survive the restart of what is counted. Pure.

A TE reports running totals, which begin at zero in each new process, and a report may be lost; the pod's own counters
must never run backwards. This module must not know Prometheus or the bus.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


class Tally:
    """The last totals of each living instance."""

    def __init__(self) -> None:
        self._totals: dict[str, dict[str, float]] = {}

    def grown(self, instance: str, totals: Mapping[str, float]) -> dict[str, float]:
        """By how much each total of `instance` has grown since its last report; never negative."""
        last = self._totals.get(instance, {})
        self._totals[instance] = {
            name: max(total, last.get(name, 0.0)) for name, total in totals.items()
        }
        return {
            name: total - last.get(name, 0.0)
            for name, total in totals.items()
            if total > last.get(name, 0.0)
        }

    def forget(self, instance: str) -> None:
        """`instance` is gone and reports no more."""
        self._totals.pop(instance, None)
