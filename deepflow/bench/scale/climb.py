"""From one TE to many: until each has streamed the first token of a request that came in through HTTP.

Once as many TEs as were asked for say that they are ready, as many requests are sent at once. The platform's own policy
decides who gets them, and its JEs are asked afterwards who it was. Should a TE have got none, as many are sent
once more, and the clock runs on. (Sent one by one, they would go where the platform packs a light load: to a few.)
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from deepflow.bench.client import Client
from deepflow.bench.sample import Sample
from deepflow.bench.scale.fleet import FleetWatch
from deepflow.bench.stack import Stack
from shared.errors import Internal
from shared.messages import TeBeat

_LONG_S: Final = 120.0


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
    placed: dict[str, str | None] = {}
    found = Climb(num_tes)

    async def ask() -> None:
        sample = await client.complete(next(prompts), output_len)
        if not sample.ok:
            raise Internal(f"a request of the bench failed: {sample.status}, {sample.error!r}")
        samples.append(sample)

    jes = [reply.id for reply in await stack.ask_all("scheduler")]
    started = time.perf_counter()
    await watch.scale(client.model, num_tes, num_tes)
    await watch.until(lambda: len(watch.ready()) >= num_tes, f"{num_tes} TEs are ready")
    found.ready_s = time.perf_counter() - started
    while len(found.first_token_s) < num_tes:
        if time.perf_counter() - started > _LONG_S:
            raise Internal(f"only {len(found.first_token_s)} of {num_tes} TEs got a request")
        async with asyncio.TaskGroup() as tasks:
            for _ in range(num_tes):
                tasks.create_task(ask())
        for sample in samples:
            if sample.id not in placed:
                placed[sample.id] = await _placed(stack, jes, sample.id)
        found.first_token_s = _first_tokens(placed, samples, started)
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
    placed: dict[str, str | None], samples: list[Sample], started: float
) -> dict[str, float]:
    """By TE, the earliest first token of its requests."""
    found: dict[str, float] = {}
    for sample in samples:
        te, at = placed[sample.id], sample.times_s[0] - started
        if te is not None:
            found[te] = min(found.get(te, at), at)
    return found


async def _placed(stack: Stack, jes: Sequence[str], request: str) -> str | None:
    """The TE that served a request; None if no JE remembers: it counts for none."""
    for je in jes:
        if (te := await stack.placed(je, request)) is not None:
            return te
    return None
