"""The ladder as a picture: a curve per policy over the rates, for the time to the first token, goodput and hits.

matplotlib is imported here and only when a picture is wanted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from deepflow.bench.peers.picture import check
from deepflow.bench.report import Report

# What is drawn: the metric's name, what the axis says, and whether it is logarithmic.
_PANELS: Final = (
    ("ttft_p99_s", "TTFT, P99, s", True),
    ("jct_p99_s", "job completion, P99, s", True),
    ("goodput", "goodput, requests/s", False),
    ("loaded_hit_vs_ideal", "prompt tokens found / ideal", False),
)
_SHADES: Final = ("#0b6e4f", "#8d99ae", "#b08968", "#6d597a", "#577590", "#c1666b", "#999999")


def curves(metrics: Mapping[str, float], name: str) -> dict[str, list[tuple[float, float]]]:
    """By policy: (rate, value) in the order of the rates, of the metrics `<name>.<policy>.<rate>`."""
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for metric, value in metrics.items():
        kind, _, rest = metric.partition(".")
        policy, _, rate = rest.partition(".")
        if kind == name and rate:
            found[policy].append((float(rate), value))
    return {policy: sorted(points) for policy, points in found.items()}


def draw(report: Report, path: Path) -> None:
    """Writes the picture; its format is that of the file's suffix. Raises InvalidRequest without matplotlib."""
    check()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.0 * len(_PANELS), 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    for place, (name, label, is_logarithmic) in enumerate(_PANELS):
        axes = figure.add_subplot(1, len(_PANELS), place + 1)
        drawn = curves(report.metrics, name)
        for number, (policy, points) in enumerate(drawn.items()):
            rates, values = zip(*points, strict=True)
            axes.plot(
                rates,
                values,
                marker="o",
                markersize=3,
                linewidth=2.2 if number == 0 else 1.2,
                color=_SHADES[number % len(_SHADES)],
                label=policy,
                zorder=len(drawn) - number,  # ours, the first, lies on top
            )
        if is_logarithmic:
            axes.set_yscale("log")
        axes.set_xlabel("requests/s", fontsize=8)
        axes.set_title(label, fontsize=9)
        axes.tick_params(which="both", labelsize=7)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if place == 0:
            axes.legend(fontsize=7, frameon=False)
    shown = report.settings
    figure.suptitle(
        f"{shown.get('trace', '')}: {shown.get('num_tes', '?')} TEs, {shown.get('profile', '')}",
        fontsize=10,
    )
    figure.savefig(path, dpi=150)
