"""`deepflow bench scale`: one command, two questions. What computes is imported when it is asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from deepflow.bench.command import Json, Model, Picture, Seed, bars, open_model, run
from deepflow.bench.report import Report
from deepflow.bench.scale.plan import PARTS
from deepflow.cli.screen import console, fail
from shared.errors import DeepFlowError


def scale(
    to: Annotated[int, typer.Option("--to", min=2, max=1024, help="TEs, from one.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Of that climb; the median counts.")] = 3,
    only: Annotated[
        str, typer.Option(metavar=",".join(PARTS), help="Only these parts.")
    ] = ",".join(PARTS),
    day: Annotated[
        bool, typer.Option("--day", help="Instead: three models' waves and zeros, in minutes.")
    ] = False,
    day_s: Annotated[float, typer.Option(min=1, help="--day: how long it takes.")] = 180.0,
    picture: Picture = None,
    model: Model = "smollm2-135m",
    quick: Annotated[bool, typer.Option("--quick", help="Only to see that it works.")] = False,
    seed: Seed = 0,
    json: Json = "",
) -> None:
    """How fast TEs come up: 1 -> 64, none -> one, `deepflow up`, weights to 32 others; and what they take. Minutes."""
    parts = tuple(dict.fromkeys(part.strip() for part in only.split(",") if part.strip()))
    for part in parts:
        if part not in PARTS:
            fail(f"--only: there is no {part!r}; there are: {', '.join(PARTS)}", 2)
    try:
        if picture is not None:
            from deepflow.bench.peers.picture import check

            check()
        if day:
            report = _day(model, day_s, seed, picture, quick=quick)
        else:
            report = _scale(model, to, rounds, parts, seed, picture, quick=quick)
    except DeepFlowError as error:
        fail(error.message)
    report.write(json, console)


def _scale(
    model: str,
    to: int,
    rounds: int,
    parts: tuple[str, ...],
    seed: int,
    picture: Path | None,
    *,
    quick: bool,
) -> Report:
    from deepflow.bench.scale.bench import bench_scale
    from deepflow.bench.scale.picture import draw_steps
    from deepflow.bench.scale.plan import QUICK, Plan

    cache_dir, folder = open_model(model)
    plan = QUICK if quick else replace(Plan(), to=to, num_rounds=rounds)
    with bars() as progress:
        report = run(bench_scale(folder, cache_dir, plan, parts, seed, progress))
    if picture is not None:
        draw_steps(report, picture)
    return report


def _day(model: str, day_s: float, seed: int, picture: Path | None, *, quick: bool) -> Report:
    from deepflow.bench.scale.day import bench_day
    from deepflow.bench.scale.picture import draw_day
    from deepflow.bench.scale.plan import QUICK_DAY, DayPlan

    cache_dir, folder = open_model(model)
    plan = QUICK_DAY if quick else DayPlan(day_s=day_s)
    with bars() as progress:
        report = run(bench_day(folder, cache_dir, plan, seed, progress))
    if picture is not None:
        draw_day(report, picture)
    return report
