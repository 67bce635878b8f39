"""A heatmap as a picture: one panel per rate and one for their sum; green where the pair is faster.

matplotlib is imported here and only when a picture is wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from deepflow.bench.peers.picture import check
from services.scheduler.heatmap import Heatmap


def draw(heatmap: Heatmap, title: str, path: Path) -> None:
    """Writes the picture; its format is that of the file's suffix. Raises InvalidRequest without matplotlib."""
    check()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [
        (f"{rate:g} requests/s", table)
        for rate, table in zip(heatmap.rates, heatmap.values, strict=True)
    ]
    panels.append(("sum over the rates", heatmap.sums))
    figure = Figure(figsize=(4.4 * len(panels), 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    for place, (name, table) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), place + 1)
        reach = len(heatmap.rates) if place == len(panels) - 1 else 1
        image = axes.imshow(
            table, cmap="PRGn", vmin=-reach, vmax=reach, origin="lower", aspect="auto"
        )
        axes.set_xticks(range(len(heatmap.ratios)), [f"{ratio:.3g}" for ratio in heatmap.ratios])
        axes.set_yticks(range(len(heatmap.prefill_lens)), list(map(str, heatmap.prefill_lens)))
        axes.tick_params(labelsize=7)
        axes.tick_params(axis="x", labelrotation=60)
        axes.set_xlabel("decode / prefill", fontsize=8)
        axes.set_title(name, fontsize=9)
        _write_values(axes, table, reach)
        if place == 0:
            axes.set_ylabel("prefill, tokens", fontsize=8)
        if place == len(panels) - 1:
            figure.colorbar(image, ax=axes, extend="both", shrink=0.8)
    figure.suptitle(f"JCT colocated / JCT disaggregated - 1: {title}", fontsize=10)
    figure.savefig(path, dpi=130)


def _write_values(axes: object, table: Sequence[Sequence[float]], reach: float) -> None:
    """The number in each cell, as long as they can be read."""
    from matplotlib.axes import Axes

    assert isinstance(axes, Axes)
    if len(table[0]) > 16:
        return
    for row, values in enumerate(table):
        for column, value in enumerate(values):
            shade = "white" if abs(value) > 0.6 * reach else "black"
            axes.text(
                column, row, f"{value:+.2f}", ha="center", va="center", fontsize=5, color=shade
            )
