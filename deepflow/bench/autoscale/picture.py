"""What was asked and how many TEs were up over time, and what each fleet paid for what it reached.

matplotlib is imported here and only when a picture is wanted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from deepflow.bench.autoscale.bench import OURS, AutoscaleReport
from deepflow.bench.peers.picture import check
from deepflow.sim.trace import Call

_SHADES: Final = {"deepflow": "#0b6e4f", "hpa": "#c1666b", "oracle": "#577590"}
_WINDOW_S: Final = 10


def draw(report: AutoscaleReport, calls: Sequence[Call], path: Path) -> None:
    """Writes the picture; its format is that of the file's suffix. Raises InvalidRequest without matplotlib."""
    check()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 3)
    asked = figure.add_subplot(grid[0, :2])
    windows = Counter(int(call.timestamp_ms / 1000 // _WINDOW_S) for call in calls)
    places = range(max(windows) + 1)
    asked.fill_between(
        [place * _WINDOW_S for place in places],
        [windows[place] / _WINDOW_S for place in places],
        step="post",
        color="#8d99ae",
    )
    asked.set_title("requests/s", fontsize=9)
    fleet = figure.add_subplot(grid[1, :2], sharex=asked)
    for kind, decisions in report.decisions.items():
        fleet.step(
            [one.at for one in decisions],
            [one.target for one in decisions],
            where="post",
            color=_SHADES[kind],
            label=kind,
            linewidth=1.6 if kind == OURS else 1.0,
        )
    fleet.set_title("TEs wanted", fontsize=9)
    fleet.set_xlabel("s", fontsize=8)
    fleet.legend(fontsize=7, frameon=False)
    price = figure.add_subplot(grid[:, 2])
    for name, share in report.metrics.items():
        measure, _, kind = name.partition(".")
        if measure == "attainment" and kind:
            at = report.metrics[f"te_seconds.{kind}"]
            price.plot([at], [share * 100], "o", color=_SHADES.get(kind, "#999999"))
            price.annotate(kind, (at, share * 100), fontsize=7)
    price.set_title("within the objective, %", fontsize=9)
    price.set_xlabel("TE-seconds", fontsize=8)
    for axes in (asked, fleet, price):
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{report.settings['trace']}: {report.settings['profile']}", fontsize=10)
    figure.savefig(path, dpi=150)
