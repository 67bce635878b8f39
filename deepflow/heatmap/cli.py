"""`deepflow heatmap`: arguments in, one measured heatmap out. What computes is imported when it is asked for."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from deepflow.bench.command import Json, Model, Picture, Seed, Threads, bars, open_model, run
from deepflow.cli.screen import console, fail
from shared.config import ConfigError, Settings
from shared.errors import DeepFlowError
from shared.subjects import encode

if TYPE_CHECKING:
    from deepflow.heatmap.grid import Grid, Measured

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

N = TypeVar("N", int, float)


class On(StrEnum):
    """Where the cells are measured."""

    ENGINE = "engine"
    SIMULATOR = "simulator"


_LENGTHS = {On.ENGINE: "256,1024", On.SIMULATOR: "128,256,512,1024,2048,4096,8192,16384"}
_RATIOS = {
    On.ENGINE: "0.0625,0.25,1",
    On.SIMULATOR: "0.0156,0.0312,0.0625,0.125,0.25,0.5,1,2,4",
}
_REQUESTS = {On.ENGINE: 16, On.SIMULATOR: 64}


@app.command()
def heatmap(
    on: Annotated[
        On, typer.Option(help="Real TEs of this machine, or simulated ones.")
    ] = On.ENGINE,
    model: Model = "smollm2-135m",
    profile: Annotated[
        str,
        typer.Option(
            metavar="NAME|FILE",
            help="Of simulated TEs: a preset, a file, or a report of `deepflow bench engine`; else measured first.",
        ),
    ] = "",
    save_profile: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keep the profile that was measured.")
    ] = None,
    prefill_lens: Annotated[str, typer.Option(metavar="N,N,...", help="Tokens.")] = "",
    ratios: Annotated[
        str, typer.Option(metavar="X,X,...", help="Decode length / prefill length.")
    ] = "",
    rates: Annotated[str, typer.Option(metavar="X,X,...", help="Requests per second.")] = "",
    loads: Annotated[
        str,
        typer.Option(
            metavar="X,X,...",
            help="Without --rates: as shares of what two TEs can take of the grid's middle shape.",
        ),
    ] = "0.2,0.4,0.6",
    num: Annotated[int, typer.Option(min=0, help="Requests of a cell; 0: 16 or 64.")] = 0,
    threads: Threads = 0,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Instead of the home's folder, where the JEs look."),
    ] = None,
    picture: Picture = None,
    seed: Seed = 0,
    json: Json = "",
) -> None:
    """Measure which requests gain by prefill and decode on two executors; the schedulers load the result at once."""
    from deepflow.bench import machine
    from deepflow.bench.peers.picture import check
    from deepflow.heatmap.grid import Grid
    from deepflow.heatmap.report import report

    try:
        if picture is not None:
            check()
        grid = Grid(
            prefill_lens=_numbers(prefill_lens or _LENGTHS[on], "--prefill-lens", int),
            ratios=_numbers(ratios or _RATIOS[on], "--ratios", float),
            rates=_numbers(rates, "--rates", float),
            loads=_numbers(loads, "--loads", float),
            num_requests=num or _REQUESTS[on],
            seed=seed,
        )
        path = out or _home_file(model)
    except DeepFlowError as error:
        fail(error.message, 2)
    except ConfigError as error:
        fail(str(error), 2)
    try:
        if on is On.ENGINE:
            measured, title = _measure_real(model, grid)
        else:
            measured, title = _measure_simulated(model, profile, threads, save_profile, grid)
    except DeepFlowError as error:
        fail(error.message)
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, measured.to_json(model=model, measured_on=title, num_requests=grid.num_requests))
    if picture is not None:
        from deepflow.heatmap.picture import draw

        draw(measured.heatmap, title, picture)
    settings = {
        "model": model,
        "measured_on": title,
        "num_requests": grid.num_requests,
        "seed": seed,
    }
    notes = [f"kept in {path}"]
    shown = report(measured.heatmap, machine.describe("numpy"), settings, notes)
    shown.write(json, console)


def _measure_real(model: str, grid: Grid) -> tuple[Measured, str]:
    from deepflow.heatmap.grid import measure
    from deepflow.heatmap.real import Real

    cache_dir, folder = open_model(model)

    async def real() -> Measured:
        async with Real.start(folder, cache_dir) as hardware:
            return await measure(hardware, grid, progress)

    with bars() as progress:
        return run(real()), f"{folder.name}, two executors on this machine"


def _measure_simulated(
    model: str, profile: str, threads: int, save: Path | None, grid: Grid
) -> tuple[Measured, str]:
    from deepflow.heatmap.grid import measure
    from deepflow.heatmap.simulated import Simulated
    from deepflow.sim import calibration

    with bars() as progress:
        if profile:
            found = calibration.open_profile(profile)
        else:
            cache_dir, folder = open_model(model)
            found = run(calibration.measure(folder, cache_dir, progress, threads=threads))
        if save is not None:
            save.write_bytes(found.to_json())
        return run(measure(Simulated(found), grid, progress)), f"{found.name}, simulated"


def _home_file(model: str) -> Path:
    """Where the JEs look. Raises ConfigError."""
    home = Settings.load(os.environ).home_dir
    folder = Path(os.environ.get("DEEPFLOW_HEATMAPS") or home / "heatmaps")
    return folder.expanduser() / f"{encode(model)}.json"


def _replace(path: Path, content: bytes) -> None:
    """At once: a JE may read it at any moment."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_bytes(content)
    beside.replace(path)


def _numbers(text: str, option: str, kind: type[N]) -> tuple[N, ...]:
    try:
        return tuple(kind(part) for part in text.split(",") if part.strip())
    except ValueError:
        fail(f"{option}: {text!r} is not a list of numbers", 2)
