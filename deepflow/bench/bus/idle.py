"""With nothing to do: the time a first token takes beyond the bare engine's own, and what waiting costs."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Final

from deepflow.bench.bare import BareEngine
from deepflow.bench.bus.plan import Plan
from deepflow.bench.client import Client
from deepflow.bench.distribution import percentile
from deepflow.bench.stack import Stack
from shared.errors import Internal

_PAUSE_S: Final = 0.05  # both sides come from rest
_SETTLE_S: Final = 2.0


async def added_ttft(
    client: Client,
    bare: BareEngine,
    prompts: Iterator[str],
    plan: Plan,
    advance: Callable[[], None],
) -> dict[str, float]:
    """Prompts of their own, each sent to both sides in turning order; the median of the differences.

    Both sides count from the text handed in to the text of the first token, tokenising included.
    """
    served_ms, bare_ms = [], []

    async def ask_served(prompt: str) -> None:
        await asyncio.sleep(_PAUSE_S)
        sample = await client.complete(prompt, 2)
        if not sample.ok:
            raise Internal(f"a request of the bench failed: {sample.status}, {sample.error!r}")
        served_ms.append(1000 * sample.ttft_s)

    async def ask_bare(prompt: str) -> None:
        await asyncio.sleep(_PAUSE_S)
        bare_ms.append(1000 * await bare.ttft_s(prompt))

    give_up = time.monotonic() + plan.first_token_budget_s
    for number in range(-1, plan.num_first_tokens):
        if len(bare_ms) > 2 and time.monotonic() > give_up:
            break
        prompt = next(prompts)
        sides = (ask_served, ask_bare) if number % 2 else (ask_bare, ask_served)
        for side in sides:
            await side(prompt)
        if number < 0:  # the first of each opens connections and warms caches
            served_ms.clear()
            bare_ms.clear()
        else:
            advance()
    added_ms = [served - own for served, own in zip(served_ms, bare_ms, strict=True)]
    return {
        "added_ttft_p50_ms": statistics.median(added_ms),
        "added_ttft_p90_ms": percentile(added_ms, 90),
        "served_ttft_p50_ms": statistics.median(served_ms),
        "bare_ttft_p50_ms": statistics.median(bare_ms),
        "num_first_tokens": len(added_ms),
    }


async def idle_cpu(stack: Stack, seconds: float) -> dict[str, float]:
    """CPU time of the whole platform while nobody asks for anything, in percent of one core."""
    await asyncio.sleep(_SETTLE_S)
    before, started = stack.cpu_times(), time.monotonic()
    await asyncio.sleep(seconds)
    used = stack.cpu_times().since(before)
    elapsed_s = time.monotonic() - started
    found = {"idle_cpu_percent": 100 * sum(used.values()) / elapsed_s}
    for role, cpu_s in sorted(used.items()):
        found[f"idle_cpu_percent_{role}"] = 100 * cpu_s / elapsed_s
    return found
