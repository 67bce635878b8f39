"""Two TEs on this machine, in two platforms of their own: one serves colocated, the other by a pair.

Both are up for the whole time and idle by turns, so the machine is the same for both.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from random import Random
from typing import Final, Self

from deepflow.bench.client import Client
from deepflow.bench.engine.plan import prompts
from deepflow.bench.load import closed, scheduled
from deepflow.bench.sample import Sample
from deepflow.bench.stack import Stack
from deepflow.heatmap.grid import Shape
from services.worker.flowserve.config import ModelConfig
from shared.catalog import ModelFolder
from shared.errors import Unavailable

_WARM_UP: Final = 4
_CONCURRENCY: Final = 16  # where the rate is sought that the TEs can take
_SOUGHT: Final = 32
_TIMEOUT_S: Final = 600.0
# Whatever there is to prefill is split, and nothing of it is found in a tier below the TEs.
_SETTINGS: Final = {"DEEPFLOW_PD_MIN_TOKENS": "1"}


class Real:
    """Both platforms; make it with `start`."""

    source: Final = "engine"

    def __init__(self, whole: tuple[Stack, Client], pair: tuple[Stack, Client], vocab: int) -> None:
        self._whole = whole
        self._pair = pair
        self._vocab = vocab

    @classmethod
    @contextlib.asynccontextmanager
    async def start(cls, model: ModelFolder, cache_dir: Path) -> AsyncIterator[Self]:
        """Both platforms, warm, for as long as the block runs. Raises Unavailable."""
        vocab = ModelConfig.from_folder(model.path).vocab
        async with (
            _platform(model.name, cache_dir, {}) as whole,
            _platform(model.name, cache_dir, {"DEEPFLOW_PD": "1p1d"}) as pair,
        ):
            hardware = cls(whole, pair, vocab)
            for platform in (whole, pair):
                await hardware._run(platform, Shape(64, 8), [0.0] * _WARM_UP, -1)
            yield hardware

    async def capacity(self, shape: Shape) -> float:
        """Measured: with so many under way at a time."""
        _, client = self._whole
        began = time.perf_counter()
        samples = await closed(
            lambda prompt: client.complete(prompt, shape.decode_len),
            self._prompts(shape, _SOUGHT, -2),
            _CONCURRENCY,
        )
        seconds = time.perf_counter() - began
        _check(samples)
        return _SOUGHT / seconds

    async def jct_s(self, shape: Shape, times_s: Sequence[float], seed: int) -> tuple[float, float]:
        """The colocated TEs first, then the pair."""
        return (
            await self._run(self._whole, shape, times_s, seed),
            await self._run(self._pair, shape, times_s, seed),
        )

    async def _run(
        self,
        platform: tuple[Stack, Client],
        shape: Shape,
        times_s: Sequence[float],
        seed: int,
    ) -> float:
        stack, client = platform
        samples = await scheduled(
            lambda prompt: client.complete(prompt, shape.decode_len),
            self._prompts(shape, len(times_s), seed),
            times_s,
        )
        _check(samples)
        await stack.wait_idle()
        return statistics.fmean(sample.e2el_s for sample in samples)

    def _prompts(self, shape: Shape, num: int, seed: int) -> list[list[int]]:
        stream = prompts(Random(seed), self._vocab, shape.prefill_len, repetitive=False)
        return [next(stream) for _ in range(num)]


@contextlib.asynccontextmanager
async def _platform(
    model: str, cache_dir: Path, settings: dict[str, str]
) -> AsyncIterator[tuple[Stack, Client]]:
    num_workers = 0 if "DEEPFLOW_PD" in settings else 2
    async with (
        Stack.start(model, cache_dir, _SETTINGS | settings, num_workers=num_workers) as stack,
        Client.open(stack.url, model, timeout_s=_TIMEOUT_S) as client,
    ):
        await stack.wait_ready(2)
        yield stack, client


def _check(samples: Sequence[Sample]) -> None:
    """Raises Unavailable if a request failed: a mean of the rest would say nothing."""
    failed = [sample for sample in samples if not sample.ok]
    if failed:
        one = failed[0]
        raise Unavailable(
            f"{len(failed)} of {len(samples)} requests failed: {one.status}, {one.error}"
        )
