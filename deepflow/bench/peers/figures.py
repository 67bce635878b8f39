"""From rounds to figures: medians, ratios and the worst of them; as metrics, and as a table with a column per engine.

It must not know how anything was measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from deepflow.bench.peers.plan import GROUPS, OURS, Point, Round
from deepflow.bench.report import Report

Rounds = Mapping[str, Sequence[Round]]  # by point


def metrics(points: Sequence[Point], measured: Mapping[str, Rounds]) -> dict[str, float]:
    """Flat figures of all peers, by name of the peer.

    `vs_<peer>_<group>` is the worst ratio over rounds and lengths of a group, `vs_<peer>_<point>_worst` and `_median`
    those of one point, `<engine>_<point>_tps` the median of tokens/s; ours is taken over the rounds with everybody.
    """
    found: dict[str, float] = {}
    for peer, by_point in measured.items():
        for group in GROUPS:
            ratios = [
                one.ratio
                for point in points
                if point.group == group
                for one in by_point.get(point.name, ())
            ]
            if ratios:
                found[f"vs_{peer}_{group}"] = min(ratios)
    for point in points:
        ours: list[float] = []
        for peer, by_point in measured.items():
            rounds = by_point.get(point.name, ())
            if not rounds:
                continue
            ratios = [one.ratio for one in rounds]
            found[f"vs_{peer}_{point.name}_worst"] = min(ratios)
            found[f"vs_{peer}_{point.name}_median"] = statistics.median(ratios)
            found[f"{peer}_{point.name}_tps"] = statistics.median(one.best for one in rounds)
            ours += [one.ours for one in rounds]
        if ours:
            found[f"{OURS}_{point.name}_tps"] = statistics.median(ours)
    return found


def fastest(points: Sequence[Point], by_point: Rounds) -> dict[str, str]:
    """The variant of a peer that was the faster one, by point."""
    chosen = {}
    for point in points:
        for one in by_point.get(point.name, ())[-1:]:
            chosen[point.name] = max(one.theirs, key=lambda variant: one.theirs[variant])
    return chosen


@dataclass(frozen=True, slots=True, kw_only=True)
class PeersReport(Report):
    """A report whose figures stand side by side."""

    points: tuple[str, ...]
    engines: tuple[str, ...]  # ours first

    def tokens_per_s(self, engine: str, point: str) -> float | None:
        """The median, if it was measured."""
        return self.metrics.get(f"{engine}_{point}_tps")

    def worst_ratio(self, peer: str, point: str) -> float | None:
        """Ours over the peer's in the worst round, if it was measured."""
        return self.metrics.get(f"vs_{peer}_{point}_worst")

    def show(self, console: Console) -> None:
        """For people: tokens/s by point and engine, beside each peer the worst ratio of ours to it."""
        table = Table("tokens/s", *self.engines, box=None, title=f"bench {self.bench}")
        for point in self.points:
            table.add_row(point, *(self._cell(engine, point) for engine in self.engines))
        console.print(table)
        console.print("  in brackets: FlowServe / peer in the worst round", markup=False)
        for bar in self.bars:
            value = self.metrics.get(bar.metric)
            if value is not None and not bar.met_by(value):
                console.print(f"  MISSED: {bar.text} {value:.3g}", markup=False)
        for note in self.notes:
            console.print(f"  {note}", markup=False)
        console.print(
            "  " + ", ".join(f"{name} {value}" for name, value in self.machine.items()),
            markup=False,
        )

    def _cell(self, engine: str, point: str) -> str:
        rate, ratio = self.tokens_per_s(engine, point), self.worst_ratio(engine, point)
        if rate is None:
            return "-"
        return f"{rate:.0f}" if ratio is None else f"{rate:.0f} ({ratio:.2f})"
