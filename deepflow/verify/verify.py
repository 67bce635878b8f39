"""The verification from start to end: which checks, in which order, each in a process that may die, and the report.

This process loads no torch. A check that crashes or hangs is a failed check, and the next one starts afresh.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from rich.progress import Progress

from deepflow.bench import machine
from deepflow.bench.engine.bench import bench_engine
from deepflow.bench.engine.plan import Plan
from deepflow.bench.engine.runner import RunnerSettings
from deepflow.bench.progress import step
from deepflow.doctor.doctor import examine, here
from deepflow.verify import models
from deepflow.verify.answerer import Answerer
from deepflow.verify.report import Outcome, Verification
from services.worker.settings import num_cores
from shared.catalog import ModelFolder
from shared.errors import DeepFlowError

_CHECKS: Final = "deepflow.verify.checks"
_EXCHANGE: Final = "deepflow.verify.exchange"
_DTYPES: Final = {
    "cpu": ("fp32", "bf16", "w8a8"),
    "cuda": ("fp32", "bf16", "w8a8"),
    "npu": ("bf16", "w8a8"),
}
_BENCHED: Final = {"cpu": "w8a8", "cuda": "bf16", "npu": "bf16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """How much: of which families the small models are, and what the bench runs over."""

    families: tuple[str, ...] = tuple(models.FAMILIES)
    bench: Mapping[str, Any]
    plan: Plan


FULL: Final = Scope(bench=models.BENCH, plan=Plan(batches=(1, 8), num_rounds=1, num_starts=1))
QUICK: Final = Scope(
    families=("llama", "qwen3_moe"),
    bench=models.describe("llama"),
    plan=Plan(batches=(1, 2), prompt_len=16, output_len=8, num_rounds=1, num_starts=1),
)


async def verify(device: str, scope: Scope, cache_dir: Path, progress: Progress) -> Verification:
    """Run every check on `device`: cpu, cuda or npu."""
    started = datetime.now(UTC).isoformat(timespec="seconds")
    described = machine.describe("deepflow", "torch", "torch-npu", "numpy")
    findings = [asdict(finding) for finding in examine(here(), cache_dir, device).findings]
    with tempfile.TemporaryDirectory(prefix="deepflow-verify-") as folder:
        outcomes = await _Run(device, scope, Path(folder), progress).all()
    return Verification(
        device=device,
        started=started,
        machine=described,
        findings=findings,
        outcomes=outcomes,
    )


class _Run:
    """One verification. Models, prepared weights and all else lie in `folder`."""

    def __init__(self, device: str, scope: Scope, folder: Path, progress: Progress) -> None:
        self._device = device
        self._scope = scope
        self._folder = folder
        self._progress = progress
        self._outcomes: list[Outcome] = []
        self._checks = Answerer(_CHECKS)

    async def all(self) -> list[Outcome]:
        """Every check's outcome, in order."""
        async with self._checks:
            there = await self._ask("devices", {})
            if there.state != "passed":
                return self._outcomes
            num_devices = there.details["num_devices"]
            questions = list(self._questions(num_devices, there.details["has_graphs"]))
            with step(self._progress, "checks", len(questions)) as advance:
                for name, question in questions:
                    await self._ask(name, question)
                    advance()
        if not there.details["has_graphs"]:
            self._skip("graphs", f"{self._device} has none")
        for name, stages in (("collectives", False), ("send and receive", True)):
            if self._device == "cpu" or num_devices > 1:
                await self._exchange(name, stages=stages)
            else:
                self._skip(name, "there is one device only")
        await self._bench()
        return self._outcomes

    def _questions(
        self, num_devices: int, has_graphs: bool
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """The checks of models, with the parameters of each. Two ranks want two devices; the CPU shares itself out."""
        for family in self._scope.families:
            folder = models.write(self._folder / family, models.describe(family))
            common = {"folder": str(folder), "cache_dir": str(self._folder / "cache")}
            for dtype in _DTYPES[self._device]:
                yield f"parity {family} {dtype}", {"check": "parity", "dtype": dtype, **common}
            floats = _DTYPES[self._device][0]
            for ranks in ("tp", "pp") if self._device == "cpu" or num_devices > 1 else ():
                question = {"check": "parity", "dtype": floats, ranks: 2, **common}
                yield f"parity {family} {floats} {ranks}2", question
            for dtype in _DTYPES[self._device] if has_graphs else ():
                yield f"graphs {family} {dtype}", {"check": "graphs", "dtype": dtype, **common}
            yield f"blocks {family} {floats}", {"check": "blocks", "dtype": floats, **common}

    async def _ask(self, name: str, question: dict[str, Any]) -> Outcome:
        async with self._timed(name) as found:
            asked = {"check": name, **question, "device": self._device}
            found |= await self._checks.ask(asked)
        return self._outcomes[-1]

    async def _exchange(self, name: str, *, stages: bool) -> None:
        """Two processes that exchange tensors: within a stage, or from stage to stage."""
        async with self._timed(name) as found:
            store = self._folder / f"store-{name}"
            store.touch()
            found |= await self._ranks(stages=stages, store=store)

    def _skip(self, name: str, reason: str) -> None:
        self._outcomes.append(Outcome(check=name, state="skipped", seconds=0.0, reason=reason))

    async def _ranks(self, *, stages: bool, store: Path) -> dict[str, Any]:
        """What the ranks found: the first failure, else what the last one says."""
        async with Answerer(_EXCHANGE) as first, Answerer(_EXCHANGE) as second:
            question = {"device": self._device, "stages": stages, "store": str(store)}
            async with asyncio.TaskGroup() as tasks:
                waiting = {
                    tasks.create_task(rank.ask({**question, "rank": number}))
                    for number, rank in enumerate((first, second))
                }
                answer: dict[str, Any] = {}
                while waiting and answer.get("state") != "failed":
                    done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                    answer = done.pop().result()
                for other in waiting:  # one that waits for the failed one
                    other.cancel()
        return answer

    async def _bench(self) -> None:
        """`bench engine` in short, over random weights: nothing is to be pulled for it."""
        async with self._timed("bench engine") as found:
            config = dict(self._scope.bench)
            folder = models.write(self._folder / "bench", config)
            settings = RunnerSettings(
                dtype=_BENCHED[self._device],
                device=self._device,
                threads=num_cores(),
                kernels="auto",
                asynchronous=False,
                speculation=0,
                max_num_seqs=64,
                max_batched_tokens=256,
                kv_tokens=0,
            )
            served: ModelFolder = models.as_served(folder, config)
            try:
                report = await bench_engine(
                    served, self._folder / "cache", settings, self._scope.plan, 0, self._progress
                )
            except* DeepFlowError as group:
                found |= {"state": "failed", "reason": "; ".join(map(str, group.exceptions))}
            else:
                metrics = {name: round(value, 4) for name, value in report.metrics.items()}
                found |= {"state": "passed", "dtype": settings.dtype, **metrics}

    @contextlib.asynccontextmanager
    async def _timed(self, name: str) -> AsyncIterator[dict[str, Any]]:
        """What the block finds becomes the check's outcome, with the time that it took."""
        began = time.perf_counter()
        found: dict[str, Any] = {}
        yield found
        outcome = Outcome(
            check=name,
            state=found.pop("state"),
            reason=found.pop("reason", ""),
            seconds=round(time.perf_counter() - began, 3),
            details=found,
        )
        self._outcomes.append(outcome)


def resolve(device: str, cache_dir: Path) -> str:
    """What auto comes to here."""
    if device != "auto":
        return device
    return examine(here(), cache_dir, "auto").device
