"""`deepflow verify`: whether a device of this machine computes what it should, and how fast; a table and a JSON report.

This module must not know what is checked.
"""

from __future__ import annotations

import asyncio
import contextlib

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from deepflow.cli.home import Home
from deepflow.cli.screen import console, errors, fail
from deepflow.doctor.doctor import here, require
from deepflow.verify.verify import FULL, QUICK, resolve, verify
from shared.errors import DeepFlowError


def run(home: Home, device: str, *, quick: bool, target: str) -> None:
    """Verify `device`; the report goes to the file `target`. Exit code 1 if a check failed or it is not here."""
    device = resolve(device, home.cache)
    try:
        require(here(), device)
    except DeepFlowError as error:
        fail(error.message)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    # Standard output belongs to the report.
    with Progress(
        *columns, console=errors, refresh_per_second=1, disable=not errors.is_terminal
    ) as progress:
        found = None
        with contextlib.suppress(KeyboardInterrupt):
            found = asyncio.run(verify(device, QUICK if quick else FULL, home.cache, progress))
    if found is None:
        fail("interrupted")
    found.write(target, console)
    if not found.passed:
        raise typer.Exit(1)
