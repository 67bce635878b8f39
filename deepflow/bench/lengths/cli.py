"""`deepflow bench lengths`. What computes is imported when the command runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deepflow.bench.command import Json, Model, Seed, Threads, bars, open_model
from deepflow.cli.screen import console, fail
from shared.errors import DeepFlowError


def lengths(
    model: Model = "smollm2-135m",
    num: Annotated[int, typer.Option(min=200, help="Answers of the model.")] = 1500,
    traffic: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Recorded traffic (DEEPFLOW_RECORD) instead of those."),
    ] = None,
    keep: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the answers' lengths there, for --traffic."),
    ] = None,
    threads: Threads = 0,
    seed: Seed = 0,
    json: Json = "",
) -> None:
    """How well the length of an answer is predicted. Some ten minutes on two cores, seconds with --traffic."""
    from deepflow.bench.lengths.bench import (
        bench_lengths,
        model_answers,
        read_answers,
        write_answers,
    )

    try:
        settings: dict[str, object] = {"seed": seed}
        if traffic is not None:
            answers = read_answers(traffic)
            settings |= {"traffic": traffic.name}
        else:
            cache_dir, folder = open_model(model)
            with bars() as progress:
                answers = model_answers(
                    folder, cache_dir, num, seed, threads=threads or None, progress=progress
                )
            settings |= {"model": model, "num": num}
        if keep is not None:
            write_answers(keep, answers)
        report = bench_lengths(answers, seed=seed, settings=settings)
    except DeepFlowError as error:
        fail(error.message)
    report.write(json, console)
