"""From one TE to many: until each has streamed the first token of a request that came in through HTTP.

A request is sent as soon as a TE says that it is ready; the platform's own policy decides who gets it, and the platform
is asked afterwards who it was. Should one have got two and another none, one more is sent, and the clock runs on.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import aiohttp

from deepflow.bench.client import Client
from deepflow.bench.sample import Sample
from deepflow.bench.scale.fleet import FleetWatch
from deepflow.bench.stack import Stack
from shared.errors import Internal
from shared.messages import TeBeat

_LONG_S: Final = 120.0
_LOOK_S: Final = 0.05


@dataclass(slots=True)
class Climb:
    """One of them. Seconds count from the word to scale; `first_token_s` is by TE, `extra` the requests that went to a
    TE that had one before."""

    num_tes: int
    ready_s: float = 0.0  # until all were
    first_token_s: dict[str, float] = field(default_factory=dict)
    done_s: float = 0.0  # until every request had its last token
    extra: int = 0

    @property
    def to_s(self) -> float:
        """Until each TE had streamed its first token."""
        return max(self.first_token_s.values())


async def climb(
    stack: Stack,
    client: Client,
    watch: FleetWatch,
    prompts: Iterator[str],
    num_tes: int,
    output_len: int,
) -> Climb:
    """Scale to `num_tes` and serve a request with each. Raises DeepFlowError if that fails or takes two minutes."""
    samples: list[Sample] = []
    asked: set[str] = set()
    found = Climb(num_tes)

    async def ask() -> None:
        sample = await client.complete(next(prompts), output_len)
        if not sample.ok:
            raise Internal(f"a request of the bench failed: {sample.status}, {sample.error!r}")
        samples.append(sample)

    started = time.perf_counter()
    async with asyncio.timeout(_LONG_S), asyncio.TaskGroup() as tasks:
        scaling = tasks.create_task(watch.scale(client.model, num_tes, num_tes))
        while len(asked) < num_tes:
            for te in watch.ready():
                if te not in asked:
                    asked.add(te)
                    tasks.create_task(ask())
            if len(asked) < num_tes:
                await watch.pause(_LOOK_S)
        await scaling
    found.ready_s = max(watch.ready_at[te] for te in asked) - started
    while True:
        placed = await _placements(stack.url, samples)
        found.first_token_s = _first_tokens(placed, samples, started)
        if len(found.first_token_s) >= num_tes:
            break
        if time.perf_counter() - started > _LONG_S:
            raise Internal(f"only {len(found.first_token_s)} of {num_tes} TEs got a request")
        async with asyncio.TaskGroup() as tasks:
            for _ in range(num_tes - len(found.first_token_s)):
                tasks.create_task(ask())
    found.done_s = max(sample.times_s[-1] for sample in samples) - started
    found.extra = len(samples) - num_tes
    return found


async def back_to(watch: FleetWatch, model: str, num_tes: int) -> None:
    """Scale down, and wait until that is so and all is quiet. Raises DeepFlowError."""
    await watch.scale(model, num_tes, num_tes)
    await watch.until(
        lambda: watch.num_up(model) == num_tes == len(watch.ready()), f"{num_tes} TEs, no more"
    )
    await watch.until(
        lambda: not any(_busy(beat) for _, beat in watch.beats.values()), "TEs at rest"
    )


def _busy(beat: TeBeat) -> bool:
    return beat.state == "ready" and beat.running + beat.waiting > 0


def _first_tokens(
    placed: dict[str, str], samples: list[Sample], started: float
) -> dict[str, float]:
    """By TE, the earliest first token of its requests."""
    found: dict[str, float] = {}
    for sample in samples:
        te, at = placed[sample.id], sample.times_s[0] - started
        found[te] = min(found.get(te, at), at)
    return found


async def _placements(url: str, samples: list[Sample]) -> dict[str, str]:
    """By request, the TE that served it. Raises Internal if the platform does not remember."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=16)) as session:

        async def one(name: str) -> tuple[str, str]:
            async with session.get(f"{url}/debug/requests/{name}/placement") as response:
                body: dict[str, Any] = await response.json()
            chosen = [one["chosen"] for one in body.get("decisions", ()) if one.get("chosen")]
            if not chosen:
                raise Internal(f"nobody knows where {name} was served: {body}")
            return name, chosen[-1]

        return dict(await asyncio.gather(*(one(sample.id) for sample in samples)))
