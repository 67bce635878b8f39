"""A client closes its connection: how long until the blocks of its request are free, against the step it interrupts.

Seen from outside: the TE's ledger is asked for over the bus, from the moment of the close, every few milliseconds;
more often would hold up the very step that is waited for. The stream is alone on the TE, so the TE tells of the freed
blocks as soon as it has freed them. What the last pause and question take is counted in: the figure is never better
than the truth.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from random import Random
from typing import Final

from deepflow.bench.bus.plan import Plan
from deepflow.bench.client import Client
from deepflow.bench.distribution import percentile
from deepflow.bench.stack import Stack
from shared.errors import DeadlineExceeded, Internal

_OUTPUT_LEN: Final = 512  # more than is ever waited for
_NUM_CHUNKS: Final = (6, 14)
_FREE_S: Final = 10.0
_PAUSE_S: Final = 0.002


async def cancel_to_free(
    client: Client,
    stack: Stack,
    prompts: Iterator[str],
    plan: Plan,
    rng: Random,
    advance: Callable[[], None],
) -> dict[str, float]:
    """Many times: stream, leave at a random moment of a step, wait for the blocks."""
    free_ms: list[float] = []
    over_ms: list[float] = []
    steps_ms: list[float] = []
    asks_ms: list[float] = []
    (te,) = stack.tes()
    give_up = time.monotonic() + plan.cancel_budget_s
    for _ in range(plan.num_cancels):
        if free_ms and time.monotonic() > give_up:
            break
        await stack.wait_idle()
        step_s = await _leave(client, next(prompts), rng)
        left = time.perf_counter()
        while True:
            asked = time.perf_counter()
            ledger = await stack.ledger(te)
            now = time.perf_counter()
            asks_ms.append(1000 * (now - asked))
            if ledger["live"] == 0:
                break
            if now - left > _FREE_S:
                raise DeadlineExceeded(f"blocks were still held {_FREE_S:g} s after a client left")
            await asyncio.sleep(_PAUSE_S)
        free_ms.append(1000 * (now - left))
        over_ms.append(1000 * (now - left - step_s))
        steps_ms.append(1000 * step_s)
        advance()
    return {
        "cancel_to_free_p50_ms": statistics.median(free_ms),
        "cancel_to_free_p99_ms": percentile(free_ms, 99),
        "cancel_over_step_p99_ms": percentile(over_ms, 99),
        "cancel_step_p50_ms": statistics.median(steps_ms),
        "cancel_ask_p50_ms": statistics.median(asks_ms),
        "num_cancels": len(free_ms),
    }


async def _leave(client: Client, prompt: str, rng: Random) -> float:
    """Stream some tokens and close the connection within a step; the median time of a step until then."""
    times_s: list[float] = []
    num_chunks = rng.randint(*_NUM_CHUNKS)
    async with client.post(prompt, _OUTPUT_LEN) as response:
        if response.status != 200:
            raise Internal(f"a request of the bench was refused: status {response.status}")
        while len(times_s) < num_chunks:
            if not await response.content.readany():
                raise Internal("a stream of the bench ended early")
            times_s.append(time.perf_counter())
        # The first gap may hold the rest of the prefill.
        gaps_s = [late - early for early, late in pairwise(times_s[1:])]
        step_s = statistics.median(gaps_s)
        await asyncio.sleep(rng.random() * step_s)
        response.close()
    return step_s
