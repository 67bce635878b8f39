"""The five steps of a start as figures, and as the paper's table. Pure."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping

from rich.table import Table

from deepflow.bench.report import number
from shared.scaling_messages import Start, Step

_PREFIX = "step_"


def step_figures(name: str, starts: Iterable[Start]) -> dict[str, float]:
    """`step_<step>_s.<name>` for each step and `step_total_s.<name>`, medians, and the slowest start's total."""
    seen: dict[str, list[float]] = defaultdict(list)
    for start in starts:
        for step in Step:
            seen[step].append(start.steps.get(step, 0.0))
        seen["total"].append(start.total_s)
    found = {
        f"{_PREFIX}{step}_s.{name}": statistics.median(values) for step, values in seen.items()
    }
    if "total" in seen:
        found[f"{_PREFIX}total_max_s.{name}"] = max(seen["total"])
    return found


def counts(name: str, starts: Iterable[Start]) -> dict[str, float]:
    """How many starts came from which process and which weights: `starts_warm.<name>`, `weights_dram.<name>`."""
    found: dict[str, float] = defaultdict(float)
    for start in starts:
        found[f"starts_{start.process}.{name}"] += 1
        found[f"weights_{start.weights}.{name}"] += 1
    return dict(found)


def step_table(metrics: Mapping[str, float], names: Mapping[str, str]) -> Table:
    """A row per way of starting (`names`: as in the metrics -> for people), a column per step, seconds."""
    steps = [step.value for step in Step]
    table = Table("start", *steps, "in all", "first token", box=None, title="steps, s (medians)")
    for name, text in names.items():
        cells = [metrics.get(f"{_PREFIX}{step}_s.{name}") for step in (*steps, "total")]
        cells.append(metrics.get(f"zero_s.{name}"))
        if any(cell is not None for cell in cells):
            table.add_row(text, *("" if cell is None else number(cell) for cell in cells))
    return table
