"""What a verification found: every check with its outcome and its time, and what it was found on. JSON and a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import orjson
from rich.console import Console
from rich.markup import escape
from rich.table import Table

# Of the details, what a person wants to see at once.
_SHOWN: Final = (
    "num_devices",
    "computes",
    "num_tokens",
    "num_ties",
    "error",
    "num_graphs",
    "num_blocks",
    "backend",
    "all_reduce_and_gather_ms",
    "send_and_recv_ms",
    "decode_tps_1",
    "decode_tps_8",
    "prefill_tps",
    "start_s",
)
_STYLES: Final = {"passed": "green", "skipped": "yellow", "failed": "red"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Of one check: passed, skipped or failed, with the reason for the latter two; `details` are numbers and names."""

    check: str
    state: str
    seconds: float
    reason: str = ""
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """The report. `findings` are the doctor's."""

    device: str
    started: str  # ISO 8601, UTC
    machine: dict[str, Any]
    findings: list[dict[str, Any]]
    outcomes: Sequence[Outcome]

    @property
    def passed(self) -> bool:
        """Nothing failed, and something was checked."""
        states = [outcome.state for outcome in self.outcomes]
        return "passed" in states and "failed" not in states

    def json(self) -> bytes:
        """All of it."""
        body = {
            "verify": self.device,
            "passed": self.passed,
            "started": self.started,
            "machine": self.machine,
            "checks": [asdict(outcome) for outcome in self.outcomes],
            "findings": self.findings,
        }
        return orjson.dumps(body, option=orjson.OPT_INDENT_2) + b"\n"

    def write(self, target: str, console: Console) -> None:
        """JSON to the file `target`, or to standard output for "-"; otherwise, and besides a file, a table."""
        if target == "-":
            console.file.write(self.json().decode())
            return
        if target:
            Path(target).write_bytes(self.json())
        table = Table(box=None, pad_edge=False)
        for title in ("check", "", "s", "found"):
            table.add_column(title)
        for outcome in self.outcomes:
            style = _STYLES[outcome.state]
            found = outcome.reason or ", ".join(
                f"{name} {outcome.details[name]}" for name in _SHOWN if name in outcome.details
            )
            table.add_row(
                outcome.check,
                f"[{style}]{outcome.state}[/{style}]",
                f"{outcome.seconds:.1f}",
                escape(found),
            )
        console.print(table)
        word = "passed" if self.passed else "did NOT pass"
        console.print(f"\n{self.device}: {word}", markup=False)
