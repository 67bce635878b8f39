"""The report of `bench engine` for people: a line per batch size and per prompt, with where the time went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from rich.table import Table

from deepflow.bench.engine.profile import PARTS
from deepflow.bench.report import Report, number, number_table

# What tables of their own show; everything else is listed below them.
_SHOWN: Final = ("decode_tps_", "tpot_", "prefill_tps_", "prefill_roofline_", "profile_")
_DECODE: Final = {
    "tokens/s": "decode_tps_{}",
    "worst": "decode_tps_{}_min",
    "TPOT p50 ms": "tpot_{}_p50_ms",
    "p99 ms": "tpot_{}_p99_ms",
}
_PREFILL: Final = {
    "tokens/s": "prefill_tps_{}",
    "worst": "prefill_tps_{}_min",
    "of peak": "prefill_roofline_{}",
}


class EngineReport(Report):
    """As any report, but its tables."""

    __slots__ = ()

    def tables(self) -> list[Table]:
        """Decode by batch size, prefill by length, the parts of both, the rest one to a line."""
        rest = {name: value for name, value in self.metrics.items() if not name.startswith(_SHOWN)}
        batches, lengths = self.settings["batches"], self.settings["prefill_lengths"]
        return [
            _rates(self.metrics, "decode at batch", batches, _DECODE),
            _rates(self.metrics, "prompt of", lengths, _PREFILL),
            _splits(self.metrics, {"decode": batches, "prefill": lengths}),
            number_table(rest),
        ]


def _rates(
    metrics: Mapping[str, float], what: str, sizes: Sequence[int], columns: Mapping[str, str]
) -> Table:
    """A line per size."""
    table = Table(what, *columns, box=None)
    for size in sizes:
        found = (number(metrics[metric.format(size)]) for metric in columns.values())
        table.add_row(str(size), *found)
    return table


def _splits(metrics: Mapping[str, float], sizes: Mapping[str, Sequence[int]]) -> Table:
    """Of one decode step, and of one prompt, each part in milliseconds and as a share."""
    names = [f"{kind}_{size}" for kind, all_sizes in sizes.items() for size in all_sizes]
    parts = [part for part in PARTS if f"profile_{names[0]}_{part}_ms" in metrics]
    table = Table("ms of a step", *parts, box=None)
    for name in names:
        spent = (
            f"{metrics[f'profile_{name}_{part}_ms']:.3g} "
            f"{metrics[f'profile_{name}_{part}_share']:.0%}"
            for part in parts
        )
        table.add_row(name.replace("_", " "), *spent)
    return table
