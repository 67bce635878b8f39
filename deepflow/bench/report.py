"""What a bench found: flat numbers, the bars beside them, the machine and the settings; as JSON or as a table.

It must not know how anything was measured.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import orjson
from rich.console import Console
from rich.table import Table

_HOLDS: Final[dict[str, Callable[[float, float], bool]]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "<": operator.lt,
}


@dataclass(frozen=True, slots=True)
class Bar:
    """What a metric has to reach: `metric relation limit`."""

    metric: str
    relation: str  # >=, <= or <
    limit: float
    text: str

    def met_by(self, value: float) -> bool:
        """Whether the value reaches it."""
        return _HOLDS[self.relation](value, self.limit)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The outcome of one bench. `notes` are for people: how something was told apart, what to mind."""

    bench: str
    metrics: dict[str, float]
    machine: dict[str, Any]
    settings: dict[str, Any]
    bars: tuple[Bar, ...] = ()
    notes: list[str] = field(default_factory=list)

    def json(self) -> bytes:
        """All of it; `bars` holds, per metric that has one, the limit and whether it was met."""
        judged = {
            bar.metric: {
                "relation": bar.relation,
                "limit": bar.limit,
                "met": bar.met_by(self.metrics[bar.metric]),
            }
            for bar in self.bars
            if bar.metric in self.metrics
        }
        body = {
            "bench": self.bench,
            "metrics": {name: round(value, 4) for name, value in self.metrics.items()},
            "bars": judged,
            "machine": self.machine,
            "settings": self.settings,
            "notes": self.notes,
        }
        return orjson.dumps(body, option=orjson.OPT_INDENT_2) + b"\n"

    def write(self, target: str, console: Console) -> None:
        """JSON to the file `target`, or to standard output for "-"; without a target, tables to `console`."""
        if target == "-":
            console.file.write(self.json().decode())
            return
        if target:
            Path(target).write_bytes(self.json())
        self.show(console)

    def tables(self) -> list[Table]:
        """The numbers for people: one to a line, unless a bench knows better."""
        return [number_table(self.metrics)]

    def show(self, console: Console) -> None:
        """For people: the bars first, then every number."""
        if self.bars:
            table = Table("what", "found", "bar", "", box=None, title=f"bench {self.bench}")
            for bar in self.bars:
                value = self.metrics.get(bar.metric)
                found = "not measured" if value is None else f"{value:.4g}"
                met = "" if value is None else "met" if bar.met_by(value) else "MISSED"
                table.add_row(bar.text, found, f"{bar.relation} {bar.limit:g}", met)
            console.print(table)
        for table in self.tables():
            console.print(table)
        for note in self.notes:
            console.print(f"  {note}", markup=False)
        console.print(
            "  " + ", ".join(f"{name} {value}" for name, value in self.machine.items()),
            markup=False,
        )


def number_table(metrics: Mapping[str, float]) -> Table:
    """One number to a line."""
    table = Table("metric", "value", box=None)
    for name, value in metrics.items():
        table.add_row(name, number(value))
    return table


def number(value: float) -> str:
    """Four digits, but never a power of ten."""
    return f"{value:.4g}" if value < 1e4 else f"{value:.0f}"
