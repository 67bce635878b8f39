"""`deepflow bench route`: one command, several questions. What computes is imported when it is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deepflow.bench.command import Json, Model, Picture, Seed, bars, open_model, run
from deepflow.bench.report import Report
from deepflow.cli.screen import console, fail
from shared.errors import DeepFlowError

if TYPE_CHECKING:
    from deepflow.bench.route.plan import Plan
    from deepflow.sim.trace import Call


def route(
    trace: Annotated[
        str,
        typer.Option(
            metavar="FILE", help="Of Mooncake or Azure; or made here: conversation, toolagent."
        ),
    ] = "conversation",
    num: Annotated[
        int, typer.Option(min=0, help="Requests; 0: all of a file, 3,000 made here.")
    ] = 0,
    policies: Annotated[str, typer.Option(metavar="NAME,NAME,...", help="Else all of them.")] = "",
    rates: Annotated[
        str, typer.Option(metavar="R,R,...", help="Requests/s; else shares of what the TEs take.")
    ] = "",
    tes: Annotated[int, typer.Option(min=0, help="Simulated; 0: 8, with --quick 3.")] = 0,
    jes: Annotated[int, typer.Option(min=1, help="Simulated Job Executors.")] = 1,
    profile: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="Of a TE: a preset, a profile, or a report of bench engine."
        ),
    ] = "34b-tp4-npu",
    slo_ttft_s: Annotated[float, typer.Option(min=0.001, help="Of a good request.")] = 5.0,
    slo_tpot_s: Annotated[float, typer.Option(min=0.0001, help="Of a good request.")] = 0.1,
    picture: Picture = None,
    live: Annotated[
        bool,
        typer.Option("--live", help="Instead: on real TEs of this machine, against one policy."),
    ] = False,
    against: Annotated[
        str, typer.Option(metavar="NAME", help="--live: the other policy.")
    ] = "round-robin",
    shared_tier: Annotated[
        bool,
        typer.Option(
            "--shared-tier/--no-shared-tier",
            help="--live: with the host's arena, or TEs as far from each other as on several hosts.",
        ),
    ] = True,
    validate: Annotated[
        bool, typer.Option("--validate", help="Instead: the simulator against real TEs.")
    ] = False,
    throughput: Annotated[
        bool, typer.Option("--throughput", help="Instead: placements per second and core.")
    ] = False,
    paper: Annotated[
        bool, typer.Option("--paper", help="Instead: the paper's Figure 7, simulated.")
    ] = False,
    model: Model = "smollm2-135m",
    quick: Annotated[bool, typer.Option("--quick", help="Only to see that it works.")] = False,
    seed: Seed = 0,
    json: Json = "",
) -> None:
    """Where requests go, by every policy: hits, balance, latency and goodput at a ladder of rates. About 4 minutes."""
    if live + validate + throughput + paper > 1:
        fail("one question at a time: --live, --validate, --throughput or --paper", 2)
    try:
        if live:
            report = _live(model, against, seed, quick=quick, shared_tier=shared_tier)
        elif validate:
            report = _validate(model, seed, quick=quick)
        elif throughput:
            report = _throughput(seed, quick=quick)
        elif paper:
            report = _paper(seed, quick=quick)
        else:
            from deepflow.bench.route.plan import QUICK, Plan
            from deepflow.sim.calibration import open_profile

            plan = QUICK if quick else Plan()
            plan = replace(
                plan,
                num_tes=tes or plan.num_tes,
                num_jes=jes,
                profile=open_profile(profile),
                rates=_numbers(rates),
                slo_ttft_s=slo_ttft_s,
                slo_tpot_s=slo_tpot_s,
            )
            if policies:
                plan = replace(plan, policies=_policies(policies))
            report = _simulated(trace, num or (plan.num if quick else 0), plan, seed, picture)
    except DeepFlowError as error:
        fail(error.message)
    report.write(json, console)


def _simulated(trace: str, num: int, plan: Plan, seed: int, picture: Path | None) -> Report:
    from deepflow.bench.peers.picture import check
    from deepflow.bench.route.bench import bench_route
    from deepflow.bench.route.picture import draw

    if picture is not None:
        check()
    calls = _calls(trace, num, plan.num, seed)
    with bars() as progress:
        report = bench_route(calls, Path(trace).name, plan, seed, progress)
    if picture is not None:
        draw(report, picture)
    return report


def _calls(trace: str, num: int, num_made: int, seed: int) -> Sequence[Call]:
    from deepflow.sim.trace import CONVERSATION, TOOLAGENT, conversations, read

    shapes = {"conversation": CONVERSATION, "toolagent": TOOLAGENT}
    if trace in shapes:
        return conversations(num or num_made, seed, shapes[trace])
    return read(Path(trace))[: num or None]


def _policies(text: str) -> tuple[str, ...]:
    from services.scheduler.policy.roster import NAMES

    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in names:
        if name not in NAMES:
            fail(f"--policies: there is no {name!r}; there are: {', '.join(NAMES)}", 2)
    return names


def _numbers(text: str) -> tuple[float, ...]:
    """Rates, above 0."""
    try:
        found = tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        found = (0.0,)
    if not all(0 < rate < float("inf") for rate in found):
        fail(f"--rates: {text!r} is no list of numbers above 0", 2)
    return found


def _live(model: str, against: str, seed: int, *, quick: bool, shared_tier: bool) -> Report:
    from deepflow.bench.route.live import QUICK, LivePlan, bench_live

    _policies(against)
    cache_dir, folder = open_model(model)
    plan = QUICK if quick else LivePlan()
    with bars() as progress:
        return run(
            bench_live(folder, cache_dir, plan, against, seed, progress, shared_tier=shared_tier)
        )


def _throughput(seed: int, *, quick: bool) -> Report:
    from deepflow.bench.route.throughput import QUICK, ThroughputPlan, bench_throughput

    with bars() as progress:
        return bench_throughput(QUICK if quick else ThroughputPlan(), seed, progress)


def _paper(seed: int, *, quick: bool) -> Report:
    from deepflow.bench.route.paper import QUICK, PaperPlan, bench_paper

    with bars() as progress:
        return run(bench_paper(QUICK if quick else PaperPlan(), seed, progress))


def _validate(model: str, seed: int, *, quick: bool) -> Report:
    from deepflow.bench.route.validate import QUICK, ValidatePlan, bench_validate

    cache_dir, folder = open_model(model)
    plan = QUICK if quick else ValidatePlan()
    with bars() as progress:
        return run(bench_validate(folder, cache_dir, plan, seed, progress))
