"""`bench bus` from start to end: a platform and a bare engine side by side, every question in one run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Final

from rich.progress import Progress

from deepflow.bench import machine, workload
from deepflow.bench.bare import BareEngine, EngineSettings
from deepflow.bench.bus.cancellation import cancel_to_free
from deepflow.bench.bus.failover import Failover
from deepflow.bench.bus.idle import added_ttft, idle_cpu
from deepflow.bench.bus.overload import overload
from deepflow.bench.bus.plan import BARS, Plan
from deepflow.bench.bus.throughput import Throughput
from deepflow.bench.client import Client
from deepflow.bench.progress import step
from deepflow.bench.report import Report
from deepflow.bench.stack import Stack
from shared.catalog import ModelFolder

_TES: Final = 2  # of the platform for fail-over
_KV_TOKENS: Final = 16_384


async def bench_bus(
    model: ModelFolder, cache_dir: Path, plan: Plan, seed: int, progress: Progress
) -> Report:
    """Measure everything. Raises DeepFlowError if something does not start or a request fails."""
    described = machine.describe("torch", "aiohttp", "nats-py")
    settings = EngineSettings.default(kv_tokens=_KV_TOKENS)
    rng = Random(seed)
    prompts = workload.random_prompts(rng, plan.prompt_len)
    metrics, notes = await _one_te(model, cache_dir, plan, settings, rng, prompts, progress)
    metrics |= await _two_tes(model, cache_dir, plan, settings, prompts, progress)
    return Report(
        bench="bus",
        metrics=metrics,
        machine=described,
        settings={"model": model.name, "seed": seed, **asdict(settings), **asdict(plan)},
        bars=BARS,
        notes=notes,
    )


async def _one_te(
    model: ModelFolder,
    cache_dir: Path,
    plan: Plan,
    settings: EngineSettings,
    rng: Random,
    prompts: Iterator[str],
    progress: Progress,
) -> tuple[dict[str, float], list[str]]:
    metrics: dict[str, float] = {}
    async with contextlib.AsyncExitStack() as open_:
        with step(progress, "starting platform and bare engine", 2) as advance:
            stack = await open_.enter_async_context(
                Stack.start(model.name, cache_dir, _variables(settings))
            )
            advance()
            bare = await open_.enter_async_context(BareEngine.start(model.path, settings))
            advance()
        client = await open_.enter_async_context(Client.open(stack.url, model.name))
        begun_with = stack.tes()
        with step(progress, "throughput, in turns", 2 * plan.num_rounds) as advance:
            compared = Throughput(client, bare, stack, plan, prompts)
            metrics |= await compared.measure(advance)
        with step(progress, "first token, in turns", plan.num_first_tokens) as advance:
            metrics |= await added_ttft(client, bare, prompts, plan, advance)
        with step(progress, "idle", 1) as advance:
            metrics |= await idle_cpu(stack, plan.idle_s)
        with step(progress, "clients that leave", plan.num_cancels) as advance:
            metrics |= await cancel_to_free(client, stack, prompts, plan, rng, advance)
        with step(progress, "overload", 1):
            metrics |= await overload(client, stack, plan, settings.max_num_seqs, prompts, rng)
        notes = [_how_told(stack.cpu_times().names_engine)]
        if stack.tes() != begun_with:
            notes.append(
                "the TE was replaced while nobody killed it: this machine is too busy to measure on."
            )
        with step(progress, "kill -9 of the only TE", 1) as advance:
            killing = Failover(client, stack, plan, prompts)
            metrics |= await killing.measure("restart", 1, 1, advance)
    return metrics, notes


async def _two_tes(
    model: ModelFolder,
    cache_dir: Path,
    plan: Plan,
    settings: EngineSettings,
    prompts: Iterator[str],
    progress: Progress,
) -> dict[str, float]:
    shared = _variables(settings) | {"DEEPFLOW_THREADS": str(max(1, settings.threads // _TES))}
    with step(progress, f"kill -9 of one of {_TES} TEs", 1 + plan.num_kills) as advance:
        async with (
            Stack.start(model.name, cache_dir, shared, num_workers=_TES) as stack,
            Client.open(stack.url, model.name) as client,
        ):
            advance()
            killing = Failover(client, stack, plan, prompts)
            return await killing.measure("failover", plan.num_kills, _TES, advance)


def _variables(settings: EngineSettings) -> dict[str, str]:
    return settings.variables() | {"DEEPFLOW_GRACE_S": "5"}


def _how_told(names_engine: bool) -> str:
    if names_engine:
        return (
            "CPU outside the engine: every thread of every process but those named `engine` "
            "(/proc/<pid>/task/*/comm; threads take over the name of the one that starts them)."
        )
    return (
        "CPU outside the engine: every thread of every process, of the TE only its main thread; "
        "no thread is named `engine` here."
    )
