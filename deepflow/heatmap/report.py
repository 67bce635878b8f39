"""What a heatmap shows, in numbers and as a table. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from rich.table import Table

from deepflow.bench.report import Bar, Report, number_table
from services.scheduler.heatmap import Heatmap

BARS: Final = (Bar("stability", ">=", 0.8, "cells with one sign at every rate"),)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeatmapReport(Report):
    """Its numbers, and the map itself."""

    heatmap: Heatmap

    def tables(self) -> list[Table]:
        """The sum over the rates, a row per prefill length; then the numbers."""
        grid = Table("prefill \\ decode/prefill", box=None, title="H, the sum over the rates")
        for ratio in self.heatmap.ratios:
            grid.add_column(f"{ratio:.3g}", justify="right")
        for length, row in zip(self.heatmap.prefill_lens, self.heatmap.sums, strict=True):
            cells = [f"[{'green' if value > 0 else 'red'}]{value:+.2f}[/]" for value in row]
            grid.add_row(str(length), *cells)
        return [grid, number_table(self.metrics)]


def report(
    heatmap: Heatmap, machine: Mapping[str, Any], settings: Mapping[str, Any], notes: list[str]
) -> HeatmapReport:
    """The numbers of a heatmap: how stable its signs are, and what a right choice gains and a wrong one loses."""
    cells = [value for table in heatmap.values for row in table for value in row]
    gains = [value for value in cells if value > 0]
    # What colocation wins where it does, by the same measure: JCT of the other / its own - 1.
    losses = [1.0 / (1.0 + value) - 1.0 for value in cells if value <= 0]
    sums = [value for row in heatmap.sums for value in row]
    metrics = {
        "num_cells": float(len(cells)),
        "stability": heatmap.stability,
        "split_share": sum(value > 0 for value in sums) / len(sums),
        "gain_mean": sum(gains) / max(1, len(gains)),
        "gain_max": max(gains, default=0.0),
        "colocated_gain_mean": sum(losses) / max(1, len(losses)),
        "colocated_gain_max": max(losses, default=0.0),
    }
    for rate, table in zip(heatmap.rates, heatmap.values, strict=True):
        flat = [value for row in table for value in row]
        metrics[f"split_share.{rate:g}"] = sum(value > 0 for value in flat) / len(flat)
    return HeatmapReport(
        bench="heatmap",
        metrics=metrics,
        machine=dict(machine),
        settings={
            **settings,
            "prefill_lens": heatmap.prefill_lens,
            "ratios": heatmap.ratios,
            "rates": heatmap.rates,
            "source": heatmap.source,
        },
        bars=BARS,
        notes=notes,
        heatmap=heatmap,
    )
