"""`deepflow replay`: arguments in, one replay out. What computes is imported when it is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deepflow.bench.command import Json, Seed, bars, run
from deepflow.bench.progress import step
from deepflow.bench.report import Report
from deepflow.bench.sample import Goal
from deepflow.cli.screen import console, fail
from deepflow.sim.trace import Call, read
from shared.config import ConfigError
from shared.errors import DeepFlowError

if TYPE_CHECKING:
    from deepflow.replay.live import Target
    from deepflow.replay.prompts import Prompts
    from deepflow.replay.simulated import Deployment

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def replay(
    trace: Annotated[
        Path, typer.Argument(metavar="TRACE", help="Of Mooncake (.jsonl) or Azure (.csv).")
    ],
    url: Annotated[
        str, typer.Option("--url", metavar="URL", help="Send it to this server of the OpenAI API.")
    ] = "",
    simulate: Annotated[
        bool, typer.Option("--simulate", help="Do not send it: simulate a deployment.")
    ] = False,
    num: Annotated[int, typer.Option(min=0, help="The first requests only; 0: all.")] = 0,
    speed: Annotated[
        float, typer.Option(min=0.001, help="2: in half of the trace's own time.")
    ] = 1.0,
    model: Annotated[str, typer.Option(help="--url: as the server names it.")] = "smollm2-135m",
    block: Annotated[
        int,
        typer.Option(
            min=1, max=512, help="--url: tokens sent for each 512 of the trace; lengths scale."
        ),
    ] = 64,
    context: Annotated[
        int, typer.Option(min=2, help="--url: tokens that fit; longer prompts are cut.")
    ] = 8192,
    max_output: Annotated[int, typer.Option(min=1, help="--url: tokens at most.")] = 256,
    vocabulary: Annotated[
        int, typer.Option(min=300, help="--url: prompts are made of token ids below it.")
    ] = 32_000,
    timeout_s: Annotated[float, typer.Option(min=0.1, help="--url: of one request.")] = 600.0,
    api_key: Annotated[str, typer.Option(envvar="OPENAI_API_KEY")] = "",
    policy: Annotated[
        str, typer.Option(metavar="NAME", help="--simulate: of placement; the platform's own.")
    ] = "deepflow",
    tes: Annotated[int, typer.Option(min=0, help="--simulate: colocated TEs.")] = 8,
    pairs: Annotated[
        int, typer.Option(min=0, help="--simulate: pairs of a prefill and a decode TE.")
    ] = 0,
    jes: Annotated[int, typer.Option(min=1, help="--simulate: Job Executors.")] = 1,
    profile: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="--simulate: a preset, a profile, or a report of bench engine."
        ),
    ] = "34b-tp4-npu",
    blocks: Annotated[
        int, typer.Option(min=0, help="--simulate: of 512 tokens per TE; 0: as the profile says.")
    ] = 0,
    accuracy: Annotated[
        float, typer.Option(min=0, max=1, help="--simulate: of the predicted output lengths.")
    ] = 1.0,
    goodput: Annotated[
        list[str] | None,
        typer.Option(metavar="ttft:MS", help="What a good request keeps to; also tpot, e2el."),
    ] = None,
    seed: Seed = 0,
    json: Json = "",
) -> None:
    """Replay a trace at its own times: against a server, or in the simulator."""
    if bool(url) == simulate:
        fail("say where to: either --url URL, or --simulate", 2)
    goals = _goals(goodput or [])
    try:
        calls = read(trace)[: num or None]
        if simulate:
            deployment = _deployment(
                num_tes=tes,
                num_pairs=pairs,
                num_jes=jes,
                policy=policy,
                profile=profile,
                num_blocks=blocks or None,
                accuracy=accuracy,
                speed=speed,
                goals=goals,
                seed=seed,
            )
            report = _simulated(calls, trace.name, deployment)
        else:
            from deepflow.replay.live import Target
            from deepflow.replay.prompts import Prompts

            target = Target(
                url=url, model=model, speed=speed, timeout_s=timeout_s, goals=goals, api_key=api_key
            )
            prompts = Prompts(
                block=block,
                context=context,
                max_output=max_output,
                vocabulary=vocabulary,
                seed=seed,
            )
            report = _live(calls, trace.name, target, prompts)
    except (DeepFlowError, ConfigError) as error:
        fail(str(error), 2)
    report.write(json, console)
    if not simulate and not report.metrics["num_completed"]:
        fail(f"no request was answered: {'; '.join(report.notes)}")


def _deployment(*, profile: str, **fields: Any) -> Deployment:
    from deepflow.replay.simulated import Deployment
    from deepflow.sim.calibration import open_profile

    if not fields["num_tes"] and not fields["num_pairs"]:
        fail("nobody serves: --tes and --pairs are both 0", 2)
    return Deployment(profile=open_profile(profile), **fields)


def _simulated(calls: list[Call], name: str, deployment: Deployment) -> Report:
    from deepflow.replay.simulated import replay_simulated

    with bars() as progress, step(progress, f"simulating {name}", 1):
        return replay_simulated(calls, name, deployment)


def _live(calls: list[Call], name: str, target: Target, prompts: Prompts) -> Report:
    from deepflow.replay.live import replay_live

    with bars() as progress:
        return run(replay_live(calls, name, target, prompts, progress))


def _goals(texts: list[str]) -> tuple[Goal, ...]:
    try:
        return tuple(Goal.parse(text) for text in texts)
    except ValueError as error:
        fail(f"--goodput: {error}", 2)
