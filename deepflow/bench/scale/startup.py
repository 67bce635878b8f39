"""How long others take from the start of a process to a first token, and `deepflow up` with all that it starts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Final

from rich.console import Console

from deepflow.bench.client import Client
from deepflow.bench.peers import environment, weights
from deepflow.bench.peers.contestant import Contestant
from deepflow.bench.peers.roster import ROSTER
from deepflow.bench.progress import PullLines
from deepflow.bench.scale.plan import Plan
from deepflow.bench.stack import Stack
from services.worker.settings import num_cores
from shared.catalog import ModelFolder
from shared.errors import DeepFlowError, Internal

# The variant of each that starts fastest.
_VARIANTS: Final = {"vllm": "fp32", "llamacpp": "q4_1-fa", "openvino": "int8"}
_NUM_TOKENS: Final = 2048


async def cold_up(
    model: ModelFolder,
    cache_dir: Path,
    plan: Plan,
    prompts: Iterator[str],
    advance: Callable[[], None],
) -> dict[str, float]:
    """`deepflow up` from nothing, until it returns and until a first token; medians. Raises DeepFlowError."""
    ups_s, firsts_s = [], []
    for _ in range(plan.num_cold):
        async with (
            Stack.start(model.name, cache_dir, plan.variables()) as stack,
            Client.open(stack.url, model.name) as client,
        ):
            sent = time.perf_counter()
            sample = await client.complete(next(prompts), plan.output_len)
            if not sample.ok:
                raise Internal(f"a request of the bench failed: {sample.status}, {sample.error!r}")
            ups_s.append(stack.up_s)
            firsts_s.append(stack.up_s + sample.times_s[0] - sent)
        advance()
    return {
        "cold_up_s": statistics.median(firsts_s),
        "cold_up_worst_s": max(firsts_s),
        "cold_up_ready_s": statistics.median(ups_s),
    }


async def peers_start(
    model: ModelFolder, cache_dir: Path, plan: Plan, console: Console, advance: Callable[[], None]
) -> tuple[dict[str, float], list[str]]:
    """Of each peer whose environment is there: its process, its weights, a first token; once, with a warm page cache
    and whatever it compiles cached if it has been run before. Notes say who is missing."""
    root = cache_dir / "peers"
    metrics: dict[str, float] = {}
    notes: list[str] = []
    rng = Random(0)
    for name in plan.peers:
        folder = root / name
        if not environment.python_of(folder).exists():
            notes.append(f"{name}: not installed; `deepflow bench peers --setup-only` does that")
            advance()
            continue
        try:
            files = weights.prepare(model.name, root / "weights", PullLines(console))
            metrics[f"start_s.{name}"] = await _start(
                name, folder, model, root, {kind: str(path) for kind, path in files.items()}, rng
            )
        except DeepFlowError as error:
            notes.append(f"{name}: not measured: {error.message}")
        advance()
    return metrics, notes


async def _start(
    name: str, folder: Path, model: ModelFolder, root: Path, files: dict[str, str], rng: Random
) -> float:
    variant = _VARIANTS[name]
    scratch, logs = root / "scratch" / name, root / "logs"
    for one in (scratch, logs):
        one.mkdir(parents=True, exist_ok=True)
    options = {
        "model": str(model.path),
        "weights": files,
        "scratch": str(scratch),
        "variants": [variant],
        "threads": num_cores(),
        "num_tokens": _NUM_TOKENS,
        "max_num_seqs": 1,
    }
    prompt = [rng.randrange(model.vocab // 10, model.vocab) for _ in range(32)]
    python, env = environment.python_of(folder), environment.clean_env()
    started = time.perf_counter()
    async with Contestant.start(
        ROSTER[name].name, python, env, options, logs / f"{name}-start.log"
    ) as contestant:
        await contestant.prefill(variant, prompt)
        return time.perf_counter() - started
