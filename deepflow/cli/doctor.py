"""`deepflow doctor`: what this machine can run, what is amiss, and how to mend it; a table or JSON.

This module must not know how anything is found out.
"""

from __future__ import annotations

import json
from typing import Final

import typer
from rich.markup import escape
from rich.table import Table

from deepflow.cli.home import Home
from deepflow.cli.screen import console, say
from deepflow.doctor.doctor import examine, here
from deepflow.doctor.finding import Examination, State

_STYLES: Final = {
    State.OK: "green",
    State.NOTE: "yellow",
    State.UNKNOWN: "yellow",
    State.MISSING: "red",
}


def show(home: Home, device: str, *, as_json: bool) -> None:
    """Print what was found for `device`; exit code 1 if something that it needs is missing."""
    found = examine(here(), home.cache, device)
    if as_json:
        console.print(json.dumps(found.json(), indent=2), markup=False)
    else:
        _table(found)
    if found.missing:
        raise typer.Exit(1)


def _table(found: Examination) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    for finding in found.findings:
        if finding.state is State.MISSING and finding.needed_by and finding not in found.missing:
            # Another device would need it: not there, but not missed.
            table.add_row(finding.subject, "[dim]absent[/dim]", escape(finding.text))
            continue
        style = _STYLES[finding.state]
        remedy = f"\n[dim]-> {escape(finding.remedy)}[/dim]" if finding.remedy else ""
        table.add_row(
            finding.subject,
            f"[{style}]{finding.state.value}[/{style}]",
            escape(finding.text) + remedy,
        )
    console.print(table)
    if found.missing:
        say(f"\n{found.device}: not usable here, for what is marked missing")
    else:
        say(
            f"\n{found.device}: usable"
            + (f" (auto; {found.why})" if found.wished == "auto" else "")
        )
