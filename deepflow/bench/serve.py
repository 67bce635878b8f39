"""`bench serve`: a load on any server of the OpenAI API, and what its clients see of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from random import Random
from typing import Any

from rich.progress import Progress

from deepflow.bench import load, machine, workload
from deepflow.bench.client import Client, Endpoint
from deepflow.bench.report import Report
from deepflow.bench.sample import Goal, Sample, figures
from deepflow.bench.workload import Dataset


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What to send where. `rate` is per second, infinite: as fast as `concurrency` allows."""

    url: str
    model: str
    num: int
    concurrency: int | None
    rate: float
    burstiness: float
    prompt_len: int
    output_len: int
    dataset: Dataset
    prefix_len: int
    num_prefixes: int
    endpoint: Endpoint
    goals: tuple[Goal, ...] = ()
    seed: int = 0
    num_warmups: int = 1
    timeout_s: float = 600.0
    api_key: str = field(default="", repr=False)


async def bench_serve(settings: Settings, progress: Progress) -> Report:
    """Send the load; failed requests are part of the report, never raised."""
    rng = Random(settings.seed)
    source = _prompts(settings, rng)
    async with Client.open(
        settings.url,
        settings.model,
        api_key=settings.api_key,
        endpoint=settings.endpoint,
        timeout_s=settings.timeout_s,
    ) as client:

        async def send(prompt: str) -> Sample:
            return await client.complete(prompt, settings.output_len)

        warm = list(islice(source, settings.num_warmups))
        await load.closed(send, warm, max(1, settings.num_warmups))
        prompts = list(islice(source, settings.num))
        task = progress.add_task("requests", total=settings.num)

        def done(_: Sample) -> None:
            progress.advance(task)

        if settings.rate == float("inf"):
            concurrency = settings.concurrency or settings.num
            samples = await load.closed(send, prompts, concurrency, done)
        else:
            times_s = workload.arrivals(rng, settings.num, settings.rate, settings.burstiness)
            samples = await load.scheduled(send, prompts, times_s, settings.concurrency, done)
    return Report(
        bench="serve",
        metrics=figures(samples, settings.goals),
        machine=machine.describe("aiohttp"),
        settings=_shown(settings),
        notes=sorted({sample.error for sample in samples if sample.error})[:5],
    )


def _prompts(settings: Settings, rng: Random) -> Iterator[str]:
    if settings.dataset is Dataset.PREFIX_REPETITION:
        return workload.prefix_repetition(
            rng,
            prefix_len=settings.prefix_len,
            suffix_len=settings.prompt_len,
            num_prefixes=settings.num_prefixes,
        )
    return workload.random_prompts(rng, settings.prompt_len)


def _shown(settings: Settings) -> dict[str, Any]:
    """The settings without the key, and without an infinity, which JSON cannot say."""
    shown = asdict(settings)
    del shown["api_key"]
    if settings.rate == float("inf"):
        shown["rate"] = None
    return shown
