"""`bench scale` from start to end: TEs by the dozen, one from none, and others beside them."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any, Final

from rich.progress import Progress
from rich.table import Table

from deepflow.bench import machine, workload
from deepflow.bench.client import Client
from deepflow.bench.progress import step
from deepflow.bench.report import Report, number_table
from deepflow.bench.scale.climb import Climb, back_to, climb
from deepflow.bench.scale.fleet import FleetWatch
from deepflow.bench.scale.memory import Memory, extra_te_mb, family, memory_of
from deepflow.bench.scale.plan import BARS, WAYS, Plan
from deepflow.bench.scale.relay import relay
from deepflow.bench.scale.startup import cold_up, peers_start
from deepflow.bench.scale.steps import counts, step_figures, step_table
from deepflow.bench.scale.zero import from_zero
from deepflow.bench.stack import Stack
from shared.catalog import ModelFolder

_SETTLE_S: Final = 1.0
_NOTES: Final = (
    "to_<n>_s: from the word to scale until each TE has streamed the first token of a request; medians of rounds.",
    "extra_te_mb: PSS of the pod host and all below it, many TEs less one, per TE; KV pages that were touched count.",
    "relay_<n>_s: weights to n hosts by TCP, each with a way out of relay_link_mb_s, from asking until verified.",
    "fork_slowdown_*: a source's tokens/s alone / while a process beside it reads its weights again and again by TCP.",
    "zero_to_first_token_s: request sent -> first token over HTTP while no TE of the model is up, weights prepared.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleReport(Report):
    """With the steps as the paper's table."""

    def tables(self) -> list[Table]:
        """The steps by way, then everything else, a number to a line."""
        names = {way.name: way.text for way in WAYS}
        names |= {str(num): f"1 -> {num} TEs" for num in self.settings["steps"]}
        rest = {name: value for name, value in self.metrics.items() if "." not in name}
        return [step_table(self.metrics, names), number_table(rest)]


async def bench_scale(
    model: ModelFolder,
    cache_dir: Path,
    plan: Plan,
    parts: Sequence[str],
    seed: int,
    progress: Progress,
) -> ScaleReport:
    """The `parts` of the plan (`plan.PARTS`). Raises DeepFlowError if something does not start."""
    described = machine.describe("torch", "aiohttp", "nats-py")
    prompts = workload.random_prompts(Random(seed), plan.prompt_len)
    metrics: dict[str, float] = {}
    notes = list(_NOTES)
    if "up" in parts:
        total = plan.num_rounds + len(plan.steps()) - 1
        with step(progress, f"from one TE to {plan.to}", total) as advance:
            metrics |= await _up(model, cache_dir, plan, prompts, advance)
    if "zero" in parts:
        with step(progress, "from none to one", len(plan.ways)) as advance:
            found, more = await from_zero(model, cache_dir, plan, prompts, advance)
            metrics |= found
            notes += more
    if "cold" in parts:
        with step(progress, "cold `deepflow up`", plan.num_cold) as advance:
            metrics |= await cold_up(model, cache_dir, plan, prompts, advance)
    if "relay" in parts:
        text = f"weights to 1 and {plan.relay.num_targets} others"
        with step(progress, text, plan.relay.num_steps) as advance:
            metrics |= await relay(model, cache_dir, plan.relay, seed, advance)
    if "peers" in parts and plan.peers:
        with step(progress, "starts of others", len(plan.peers)) as advance:
            found, more = await peers_start(model, cache_dir, plan, progress.console, advance)
            metrics |= found
            notes += more
    settings: dict[str, Any] = {"model": model.name, "seed": seed, "steps": plan.steps()}
    return ScaleReport(
        bench="scale",
        metrics=metrics,
        machine=described,
        settings=settings | asdict(plan),
        bars=BARS,
        notes=notes,
    )


async def _up(
    model: ModelFolder,
    cache_dir: Path,
    plan: Plan,
    prompts: Iterator[str],
    advance: Callable[[], None],
) -> dict[str, float]:
    metrics: dict[str, float] = {}
    rounds: list[Climb] = []
    async with (
        Stack.start(model.name, cache_dir, plan.variables(), max_workers=plan.to) as stack,
        Client.open(stack.url, model.name) as client,
    ):
        watch = await FleetWatch.open(stack)
        for num in [*plan.steps(), *[plan.to] * (plan.num_rounds - 1)]:
            await back_to(watch, model.name, 1)
            await asyncio.sleep(_SETTLE_S)
            known = set(watch.starts)
            before = await _pod_memory(stack)
            found = await climb(stack, client, watch, prompts, num, plan.output_len)
            starts = await watch.new_starts(known, num - 1)
            metrics |= step_figures(str(num), starts) | counts(str(num), starts)
            if num == plan.to:
                rounds.append(found)
                await asyncio.sleep(_SETTLE_S)
                metrics |= extra_te_mb(before, await _pod_memory(stack), num - 1)
            else:
                metrics |= _climbed([found])
            advance()
    return metrics | _climbed(rounds)


def _climbed(rounds: Sequence[Climb]) -> dict[str, float]:
    num = rounds[0].num_tes
    return {
        f"to_{num}_s": statistics.median(one.to_s for one in rounds),
        f"to_{num}_best_s": min(one.to_s for one in rounds),
        f"to_{num}_worst_s": max(one.to_s for one in rounds),
        f"ready_{num}_s": statistics.median(one.ready_s for one in rounds),
        f"done_{num}_s": statistics.median(one.done_s for one in rounds),
        f"extra_requests_{num}": statistics.median(one.extra for one in rounds),
    }


async def _pod_memory(stack: Stack) -> Memory:
    """Of the pod host and all below it: TEs share what they do not change with it and with each other."""
    pods = [reply.pid for reply in await stack.ask_all("pod")]
    pids = [pid for pod in pods for pid in family(pod)]
    return await asyncio.to_thread(memory_of, pids)
