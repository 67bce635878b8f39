"""`bench rtc`: one part after another, into one report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Final

from rich.progress import Progress

from deepflow.bench import machine
from deepflow.bench.report import Report
from deepflow.bench.rtc import index, transport
from deepflow.bench.rtc.plan import BARS, Plan
from deepflow.bench.rtc.trace import Tiers, replay
from deepflow.sim.trace import BLOCK, Call, read

# Blocks of 512 tokens: of a small, a middling and a large TE, with a host tier eight times as large.
TIERS: Final = tuple(Tiers(device, 8 * device) for device in (250, 1000, 4000))


def bench_rtc(plan: Plan, seed: int, trace: Path | None, progress: Progress) -> Report:
    """Raises DeepFlowError."""
    calls = read(trace) if trace is not None else []  # what is wrong with it is told at once
    parts: dict[str, Callable[[], dict[str, float]]] = {
        "hash": lambda: index.hashing(plan.page, plan.num_rounds),
        "index": lambda: index.index(plan, seed),
        "memory": lambda: index.memory(plan, seed),
        "populate": lambda: transport.populate(plan),
        "distflow": lambda: transport.distflow(plan),
    }
    for tiers in TIERS if calls else ():
        parts[f"trace {tiers.device}"] = partial(_replay, calls, tiers)
    metrics: dict[str, float] = {}
    bar = progress.add_task("bench rtc", total=len(parts))
    for name, part in parts.items():
        progress.update(bar, description=name)
        metrics |= part()
        progress.advance(bar)
    notes = []
    if calls:
        notes.append(
            f"trace: {len(calls)} requests, blocks of {BLOCK} tokens; per size of the device's tier in blocks, the host"
            " tier eight times as large"
        )
    return Report(
        bench="rtc",
        metrics=metrics,
        machine=machine.describe("numpy", "xxhash"),
        settings=asdict(plan) | {"seed": seed, "trace": trace.name if trace else ""},
        bars=BARS,
        notes=notes,
    )


def _replay(calls: list[Call], tiers: Tiers) -> dict[str, float]:
    return replay(calls, tiers).metrics(f"{tiers.device}")
