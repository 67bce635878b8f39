"""What the commands of the benches have in common: options, the model, bars, and a run to its end.

It must not know any bench.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Awaitable, Iterator
from pathlib import Path
from typing import Annotated, TypeVar

import typer
import uvloop
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from deepflow.bench.progress import PullLines
from deepflow.cli.screen import fail
from shared import catalog
from shared.catalog import ModelFolder
from shared.config import ConfigError, Settings
from shared.errors import DeepFlowError, ModelNotFound

# Standard output belongs to the report.
_screen = Console(stderr=True, highlight=False, soft_wrap=True)

T = TypeVar("T")

Json = Annotated[
    str, typer.Option("--json", metavar="FILE", help="Write JSON there; - is standard output.")
]
Seed = Annotated[int, typer.Option(help="Of prompts and arrivals.")]
Model = Annotated[str, typer.Option(help="On this machine, or as `deepflow pull` takes it.")]
Threads = Annotated[int, typer.Option(min=0, help="That compute; 0: one per core.")]
Picture = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Draw the figures (.png, .svg, .pdf).")
]


def open_model(model: str) -> tuple[Path, ModelFolder]:
    """The cache of this machine, and the model in it; ends the command if there is none."""
    try:
        cache_dir = Settings.load(os.environ).cache_dir.absolute()
        return cache_dir, _ensure(model, cache_dir)
    except ConfigError as error:
        fail(str(error), 2)
    except DeepFlowError as error:
        fail(error.message)


def _ensure(model: str, cache_dir: Path) -> ModelFolder:
    """The model, pulled if it is not on this machine yet. Raises DeepFlowError."""
    try:
        return catalog.open_model(cache_dir, model)
    except ModelNotFound:
        from deepflow.models.pull import pull

        return pull(model, cache_dir, progress=PullLines(_screen))


@contextlib.contextmanager
def bars() -> Iterator[Progress]:
    """Bars on standard error; where that is no terminal, nothing."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    # A bar that is redrawn often would take from what is measured.
    with Progress(
        *columns, console=_screen, refresh_per_second=1, disable=not _screen.is_terminal
    ) as progress:
        yield progress


def run(bench: Awaitable[T]) -> T:
    """Run a bench to its end; Ctrl-C and SIGTERM let it clean up. What goes wrong ends the command."""

    async def watched() -> T:
        task = asyncio.current_task()
        assert task is not None
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, task.cancel)
        return await bench

    results: list[T] = []
    failures: list[str] = []
    try:
        results.append(uvloop.run(watched()))
    except* DeepFlowError as group:
        failures += map(str, _leaves(group))
    except* asyncio.CancelledError:
        failures.append("interrupted")
    if not results:
        fail("; ".join(failures))
    return results[0]


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error
