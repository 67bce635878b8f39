"""`deepflow bench autoscale`. What computes is imported when it is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deepflow.bench.command import Json, Picture, Seed, bars
from deepflow.cli.screen import console, fail
from shared.errors import DeepFlowError

if TYPE_CHECKING:
    from deepflow.sim.trace import Call


def autoscale(
    trace: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help="Of Azure or Mooncake; or made here: bursts, waves, zeros, steps, spikes, lone.",
        ),
    ] = "bursts",
    profile: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="Of a TE: a preset, a profile, or a report of bench engine."
        ),
    ] = "34b-tp4-npu",
    start_s: Annotated[float, typer.Option(min=0.0, help="That a TE takes to start.")] = 2.0,
    slo_ttft_s: Annotated[float, typer.Option(min=0.001, help="Of a good request.")] = 5.0,
    picture: Picture = None,
    quick: Annotated[bool, typer.Option("--quick", help="Only to see that it works.")] = False,
    seed: Seed = 0,
    json: Json = "",
) -> None:
    """How well the AUTOSCALER follows a load and at what price, in the simulator. About a minute."""
    from deepflow.bench.autoscale.bench import QUICK, Plan, bench_autoscale
    from deepflow.bench.autoscale.picture import draw
    from deepflow.bench.peers.picture import check
    from deepflow.sim.calibration import open_profile

    try:
        if picture is not None:
            check()
        plan = replace(
            QUICK if quick else Plan(),
            profile=open_profile(profile),
            start_s=start_s,
            slo_ttft_s=slo_ttft_s,
        )
        calls = _calls(trace, plan.span_s, seed)
        with bars() as progress:
            report = bench_autoscale(calls, Path(trace).name, plan, seed, progress)
        if picture is not None:
            draw(report, calls, picture)
    except DeepFlowError as error:
        fail(error.message)
    report.write(json, console)


def _calls(trace: str, span_s: float, seed: int) -> Sequence[Call]:
    from deepflow.bench.autoscale.shapes import made
    from deepflow.sim.trace import read

    return made(trace, span_s, seed) or read(Path(trace))
