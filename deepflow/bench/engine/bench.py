"""`bench engine` from start to end: limits of the machine, starts, decode and prefill, profile, limits again.

Engines run one per process. Those that are compared take turns, so that whatever disturbs the machine disturbs all.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from random import Random
from typing import Final

from rich.progress import Progress

from deepflow.bench import machine
from deepflow.bench.engine import figures
from deepflow.bench.engine.drive import budget
from deepflow.bench.engine.figures import Runs
from deepflow.bench.engine.plan import (
    BARS,
    DEFAULT_DRAFTS,
    START_PROMPT_LEN,
    Compare,
    Plan,
    prompts,
)
from deepflow.bench.engine.runner import Runner, RunnerSettings, Started
from deepflow.bench.engine.table import EngineReport
from deepflow.bench.engine.work import Work
from deepflow.bench.limits import Limits, measure_limits
from deepflow.bench.progress import step
from deepflow.bench.report import Report
from services.worker.flowserve.config import ModelConfig
from shared.catalog import ModelFolder
from shared.errors import InvalidRequest

_MIB: Final = 1 << 20
_SPARE_TOKENS: Final = 64  # of KV per sequence: the last page is never full
_CLEARLY: Final = 1.5  # times as fast
_MAIN: Final = ""  # the engine that was asked for, among its variants


async def bench_engine(
    model: ModelFolder,
    cache_dir: Path,
    settings: RunnerSettings,
    plan: Plan,
    seed: int,
    progress: Progress,
) -> Report:
    """Measure everything. Raises InvalidRequest for lengths that the model's context has no room for, Unavailable if
    an engine does not start or fails."""
    return await _Bench(model, cache_dir, settings, plan, seed, progress).run()


class _Bench:
    """What the parts of one run have in common."""

    def __init__(
        self,
        model: ModelFolder,
        cache_dir: Path,
        settings: RunnerSettings,
        plan: Plan,
        seed: int,
        progress: Progress,
    ) -> None:
        self._model = model
        self._cache_dir = cache_dir
        self._plan = plan
        self._seed = seed
        self._progress = progress
        self._config = ModelConfig.from_folder(model.path)
        self._work = Work.of(self._config)
        self._lengths = plan.prefill_lengths(self._config.context)
        self._streams = itertools.count()
        self._settings = replace(
            settings,
            max_num_seqs=max(settings.max_num_seqs, *plan.batches),
            max_batched_tokens=max(settings.max_batched_tokens, *plan.batches),
        )
        self._max_tokens = self._budgets()

    def _budgets(self) -> dict[int, int]:
        """Tokens that a sequence may generate, by batch size."""
        plan, rows = self._plan, self._settings.max_batched_tokens
        drafts = max(self._settings.speculation, DEFAULT_DRAFTS if plan.compare else 0)
        budgets = {
            batch: budget(batch, plan.prompt_len, plan.output_len, rows, drafts)
            for batch in plan.batches
        }
        longest = plan.prompt_len + max(budgets.values())
        if longest > self._config.context:
            raise InvalidRequest(
                f"a prompt of {plan.prompt_len} tokens and up to {max(budgets.values())} to generate do not fit "
                f"the model's context of {self._config.context}"
            )
        return budgets

    async def run(self) -> Report:
        described = machine.describe("torch", "numpy")
        with step(self._progress, "what the machine can do", 1):
            limits = await self._limits()
        started = await self._starts()
        runs, memory = await self._measure()
        profiled = await self._profile() if self._settings.asynchronous else runs[_MAIN]
        with step(self._progress, "what the machine can do, again", 1):
            limits = limits.best(await self._limits())
        main, dtype = runs[_MAIN], self._settings.dtype
        metrics = figures.speed(main)
        metrics |= figures.rooflines(main, self._work, limits, dtype)
        metrics |= figures.starts(started)
        for what in self._plan.compare:
            is_on = _is_on(self._settings, what)
            on, off = (main, runs[what]) if is_on else (runs[what], main)
            metrics |= figures.compared(what, on, off)
        metrics |= {f"memory_{name}_mib": num_bytes / _MIB for name, num_bytes in memory.items()}
        metrics |= figures.splits(profiled)
        return EngineReport(
            bench="engine",
            metrics=metrics,
            machine=described,
            settings={
                "model": self._model.name,
                "seed": self._seed,
                "computes": started[-1].description,
                **asdict(self._settings),
                **asdict(self._plan),
                "prefill_lengths": self._lengths,
            },
            bars=BARS.get(dtype, ()),
            notes=self._notes(limits),
        )

    async def _limits(self) -> Limits:
        return await measure_limits(
            buffer_bytes=round(self._work.bytes_per_step(self._settings.dtype)),
            threads=self._settings.threads,
            with_bf16=self._settings.dtype == "bf16",
        )

    async def _starts(self) -> list[Started]:
        """Engines as a worker would start them. The first may have to prepare weights or read files: not counted."""
        started = []
        num_starts = 1 + self._plan.num_starts
        with step(self._progress, "starting", num_starts) as advance:
            for _ in range(num_starts):
                async with self._runner(self._settings) as runner:
                    started.append(runner.started)
                advance()
        return started[1:]

    async def _measure(self) -> tuple[dict[str, Runs], dict[str, int]]:
        """The engine that was asked for and those it is compared with, in turns; and the memory that it takes."""
        variants = {_MAIN: self._settings}
        variants |= {what: _switched(self._settings, what) for what in self._plan.compare}
        runs = {name: Runs() for name in variants}
        async with contextlib.AsyncExitStack() as open_:
            runners = {
                name: await open_.enter_async_context(self._runner(self._with_room(settings)))
                for name, settings in variants.items()
            }
            await self._rounds(runners, runs, self._plan.num_rounds, "decode and prefill")
            memory = await runners[_MAIN].memory()
        return runs, memory

    async def _profile(self) -> Runs:
        """One round of the same engine with everything one after the other."""
        runs = Runs()
        settings = self._with_room(replace(self._settings, asynchronous=False))
        async with self._runner(settings) as runner:
            await self._rounds({_MAIN: runner}, {_MAIN: runs}, 1, "profile")
        return runs

    async def _rounds(
        self, runners: Mapping[str, Runner], runs: Mapping[str, Runs], num_rounds: int, text: str
    ) -> None:
        """The same prompts for all engines, each prompt once."""
        plan = self._plan
        to_decode = self._prompts(plan.prompt_len)
        to_prefill = {length: self._prompts(length) for length in self._lengths}
        total = num_rounds * len(runners) * (len(plan.batches) + len(to_prefill))
        with step(self._progress, text, total) as advance:
            for _ in range(num_rounds):
                for batch in plan.batches:
                    texts = list(itertools.islice(to_decode, batch))
                    for name, runner in runners.items():
                        decode = await runner.decode(
                            texts, plan.output_len, self._max_tokens[batch]
                        )
                        runs[name].decodes[batch].append(decode)
                        advance()
                for length, stream in to_prefill.items():
                    prompt = next(stream)
                    for name, runner in runners.items():
                        runs[name].prefills[length].append(await runner.prefill(prompt))
                        advance()

    def _runner(self, settings: RunnerSettings) -> contextlib.AbstractAsyncContextManager[Runner]:
        first = next(self._prompts(START_PROMPT_LEN))
        return Runner.start(self._model.path, self._cache_dir, settings, first)

    def _prompts(self, length: int) -> Iterator[list[int]]:
        rng = Random(f"{self._seed}/{next(self._streams)}")
        return prompts(rng, self._config.vocab, length, repetitive=self._plan.repetitive)

    def _with_room(self, settings: RunnerSettings) -> RunnerSettings:
        """KV for the largest batch and the longest prompt, where nobody said how much."""
        largest = max(
            batch * (self._plan.prompt_len + num_tokens + _SPARE_TOKENS)
            for batch, num_tokens in self._max_tokens.items()
        )
        longest = max(self._lengths) + _SPARE_TOKENS
        return replace(settings, kv_tokens=settings.kv_tokens or max(largest, longest))

    def _notes(self, limits: Limits) -> list[str]:
        ratio = limits.read_cached_bytes_per_s / limits.read_bytes_per_s
        bandwidth = (
            f"read bandwidth: a buffer of {limits.buffer_bytes / 1e6:.0f} MB summed as int64 words by "
            f"{limits.threads} thread(s); from the cores' caches the same sum is {ratio:.1f} times as fast, so it is "
            f"{'' if ratio > _CLEARLY else 'NOT '}shown that memory limits it."
        )
        start = (
            "start_s: from the beginning of the engine's construction to its first token, weights prepared and in "
            "the page cache; exec_to_first_token_s adds the interpreter and its imports."
        )
        notes = [
            bandwidth,
            start,
            "decode: only steps in which every sequence of the batch decodes; each prompt is new to the cache.",
        ]
        if self._settings.asynchronous:
            notes.append("profile: of the same engine in synchronous mode, where nothing overlaps.")
        return notes


def _is_on(settings: RunnerSettings, what: Compare) -> bool:
    return settings.asynchronous if what is Compare.ASYNC else settings.speculation > 0


def _switched(settings: RunnerSettings, what: Compare) -> RunnerSettings:
    """The same engine with one switch the other way."""
    if what is Compare.ASYNC:
        return replace(settings, asynchronous=not settings.asynchronous)
    return replace(settings, speculation=0 if settings.speculation else DEFAULT_DRAFTS)
