"""The figures as a picture: a group of bars per point, a bar per engine, each point on its own scale.

matplotlib is imported here and only when a picture is wanted.
"""

from __future__ import annotations

from pathlib import Path

from deepflow.bench.peers.figures import PeersReport
from shared.errors import InvalidRequest


def check() -> None:
    """Raises InvalidRequest if no picture can be drawn here; ask before the long part."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InvalidRequest(
            "--picture needs matplotlib: pip install matplotlib (it comes with deepflow[dev])"
        ) from error


def draw(report: PeersReport, path: Path) -> None:
    """Writes the picture; its format is that of the file's suffix. Raises InvalidRequest without matplotlib."""
    check()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.2 * len(report.points), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    shades = ("#0b6e4f", "#8d99ae", "#b08968", "#6d597a", "#577590", "#999999")
    for place, point in enumerate(report.points):
        axes = figure.add_subplot(1, len(report.points), place + 1)
        rates = [report.tokens_per_s(engine, point) or 0.0 for engine in report.engines]
        bars = axes.bar(report.engines, rates, color=shades[: len(rates)])
        axes.bar_label(bars, fmt="%.0f", fontsize=8)
        axes.set_title(point, fontsize=9)
        axes.tick_params(axis="x", labelrotation=60, labelsize=8)
        axes.tick_params(axis="y", labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    cores = report.machine.get("cores", "?")
    figure.suptitle(
        f"{report.settings.get('model', '')}, tokens/s on {cores} cores (medians)", fontsize=10
    )
    figure.savefig(path, dpi=150)
