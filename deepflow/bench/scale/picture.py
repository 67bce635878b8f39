"""The figures as pictures: where a start's time goes, and a day's TEs beside what was asked for.

matplotlib is imported here and only when a picture is wanted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from deepflow.bench.peers.picture import check
from deepflow.bench.report import Report
from deepflow.bench.scale.day import DayReport
from deepflow.bench.scale.plan import WAYS
from shared.scaling_messages import Step

_SHADES: Final = ("#0b6e4f", "#577590", "#b08968", "#6d597a", "#8d99ae")


def draw_steps(report: Report, path: Path) -> None:
    """A bar per way to start, its steps stacked. Raises InvalidRequest without matplotlib."""
    check()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    metrics = report.metrics
    ways = [way for way in WAYS if f"zero_s.{way.name}" in metrics]
    figure = Figure(figsize=(8, 0.6 * len(ways) + 1.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    left = [0.0] * len(ways)
    for step, shade in zip(Step, _SHADES, strict=True):
        widths = [metrics.get(f"step_{step}_s.{way.name}", 0.0) for way in ways]
        axes.barh([way.text for way in ways], widths, left=left, color=shade, label=step.value)
        left = [done + width for done, width in zip(left, widths, strict=True)]
    firsts = [metrics[f"zero_s.{way.name}"] for way in ways]
    axes.plot(firsts, [way.text for way in ways], "k|", markersize=14, label="first token")
    axes.invert_yaxis()
    axes.set_xlabel("s")
    axes.legend(fontsize=8)
    figure.suptitle(f"{report.settings.get('model', '')}: from no TE to one", fontsize=10)
    figure.savefig(path, dpi=150)


def draw_day(report: DayReport, path: Path) -> None:
    """A panel per model: its TEs over time, and a tick for each request. Raises InvalidRequest without matplotlib."""
    check()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.7 * len(report.tes) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    for place, (model, changes) in enumerate(report.tes.items()):
        axes = figure.add_subplot(len(report.tes), 1, place + 1)
        times, nums = zip(*changes, strict=True)
        axes.step(times, nums, where="post", color=_SHADES[0])
        arrivals = report.arrivals[model]
        axes.plot(arrivals, [-0.3] * len(arrivals), "|", color=_SHADES[3], markersize=8)
        axes.set_ylabel(f"{model}\nTEs", fontsize=8)
    axes.set_xlabel("s")
    figure.savefig(path, dpi=150)
