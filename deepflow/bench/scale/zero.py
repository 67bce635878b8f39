"""From no TE at all to a first token, in each of the ways in which a TE may come up."""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from deepflow.bench.client import Client
from deepflow.bench.scale.fleet import FleetWatch
from deepflow.bench.scale.plan import JUDGED, Plan, Way
from deepflow.bench.scale.steps import counts, step_figures
from deepflow.bench.stack import Stack
from shared.catalog import ModelFolder
from shared.errors import Internal, Unavailable
from shared.scaling_messages import Start

_KEEP_ALIVE_S: Final = 0.3
_SETTLE_S: Final = 1.0  # a new warm TE takes processor time, too


async def from_zero(
    model: ModelFolder,
    cache_dir: Path,
    plan: Plan,
    prompts: Iterator[str],
    advance: Callable[[], None],
) -> tuple[dict[str, float], list[str]]:
    """Every way of the plan, each on a platform of its own; notes say what could not be had. Raises DeepFlowError."""
    metrics: dict[str, float] = {}
    notes: list[str] = []
    for way in plan.ways:
        try:
            metrics |= await _way(model, cache_dir, plan, way, prompts)
        except (Unavailable, Internal) as error:
            notes.append(f"{way.text}: not measured: {error.message}")
        advance()
        num_hits = metrics.get(f"weights_dram.{way.name}", 0.0)
        if way.cold and num_hits:
            notes.append(f"{way.text}: {num_hits:.0f} starts found their weights in DRAM after all")
    for metric, name in JUDGED.items():
        if f"zero_s.{name}" in metrics:
            metrics[metric] = metrics[f"zero_s.{name}"]
    return metrics, notes


async def _way(
    model: ModelFolder, cache_dir: Path, plan: Plan, way: Way, prompts: Iterator[str]
) -> dict[str, float]:
    variables = plan.variables() | dict(way.settings)
    num_warm = int(way.settings.get("DEEPFLOW_WARM_TES", "1"))
    found_s: list[float] = []
    starts: list[Start] = []
    async with (
        Stack.start(model.name, cache_dir, variables, num_workers=0, max_workers=1) as stack,
        Client.open(stack.url, model.name) as client,
    ):
        watch = await FleetWatch.open(stack)
        await watch.scale(model.name, 0, 1, keep_alive_s=_KEEP_ALIVE_S)
        for number in range(-1, plan.num_zeros):  # the first prepares what is not prepared yet
            await watch.until(lambda: not watch.num_up(model.name), "no TE")
            await watch.until(lambda: watch.num_warm() >= num_warm, f"{num_warm} warm TEs")
            await asyncio.sleep(_SETTLE_S)
            if way.cold:
                forget_pages(cache_dir)
            before = set(watch.starts)
            sent = time.perf_counter()
            sample = await client.complete(next(prompts), plan.output_len)
            if not sample.ok:
                raise Internal(f"a request of the bench failed: {sample.status}, {sample.error!r}")
            new = await watch.new_starts(before, 1)
            if number >= 0:
                found_s.append(sample.times_s[0] - sent)
                starts += new
    return {
        f"zero_s.{way.name}": statistics.median(found_s),
        f"zero_worst_s.{way.name}": max(found_s),
        **step_figures(way.name, starts),
        **counts(way.name, starts),
    }


def forget_pages(cache_dir: Path) -> None:
    """Have the kernel drop the prepared weights from its page cache, as far as nobody maps them."""
    for path in (cache_dir / "prepared").glob("*/*"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
