"""An engine in a process of its own, both ends: it says how it started, then runs what it is told to.

Alone in the process, so that start-up, memory and time are the engine's and nobody else's. It must not know why a
batch is run, or what is compared.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepflow.bench.child import Child, conversation
from deepflow.bench.engine.memory import memory_bytes
from services.worker.settings import compute_env

if TYPE_CHECKING:
    from deepflow.bench.engine.drive import DecodeRun, Driver, PrefillRun


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerSettings:
    """How an engine is built. `kv_tokens` 0 is the platform's default; `speculation` drafts per step, 0 is off."""

    dtype: str
    device: str  # auto, cpu, cuda or npu
    threads: int
    kernels: str  # auto, native or torch
    asynchronous: bool
    speculation: int
    max_num_seqs: int
    max_batched_tokens: int
    kv_tokens: int
    tp: int = 1
    pp: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """How an engine came up.

    `exec_s` is from the start of the process to its first token, `start_s` from the beginning of the engine's
    construction (the process exists, its imports are done), `load_s` the construction alone.
    """

    exec_s: float
    start_s: float
    load_s: float
    description: str
    imported_torch: bool


class Runner:
    """The parent's end; make it with `start`. `started` is how it came up."""

    def __init__(self, child: Child, started: Started) -> None:
        self._child = child
        self.started = started

    @classmethod
    @contextlib.asynccontextmanager
    async def start(
        cls, folder: Path, cache_dir: Path, settings: RunnerSettings, prompt: Sequence[int]
    ) -> AsyncIterator[Runner]:
        """An engine over the model in `folder` that has answered `prompt` with a token. Raises Unavailable."""
        question = {
            "folder": str(folder),
            "cache_dir": str(cache_dir),
            "settings": asdict(settings),
            "prompt": list(prompt),
        }
        env = compute_env(settings.threads)
        began = time.monotonic()
        async with Child.start(__name__, "the engine under measurement", env) as child:
            answer = await child.ask(question)
            # One clock for all processes of a machine.
            exec_s = answer.pop("first_token_at") - began
            yield cls(child, Started(exec_s=exec_s, **answer))

    async def prefill(self, prompt: Sequence[int]) -> PrefillRun:
        """A prompt alone, up to its first token."""
        from deepflow.bench.engine.drive import PrefillRun

        return PrefillRun(**await self._child.ask({"prefill": list(prompt)}))

    async def decode(
        self, prompts: Sequence[Sequence[int]], output_len: int, max_tokens: int
    ) -> DecodeRun:
        """A batch that decodes."""
        from deepflow.bench.engine.drive import DecodeRun

        question = {
            "decode": [list(prompt) for prompt in prompts],
            "output_len": output_len,
            "max_tokens": max_tokens,
        }
        return DecodeRun(**await self._child.ask(question))

    async def memory(self) -> dict[str, int]:
        """Bytes in use by the process (see `memory_bytes`)."""
        return await self._child.ask({"memory": True})


# ----------------------------------------------------------------------------------------------------- the child's end


def main() -> None:
    """Build the engine that the first question describes, then run what the others ask."""
    # All that is imported before the clock starts: torch is not, unless the engine itself imports it.
    from deepflow.bench.engine.drive import Driver
    from deepflow.bench.engine.profile import Clocks
    from services.worker.flowserve.engine import Engine

    with conversation() as (questions, answer):
        first = next(questions)
        settings = RunnerSettings(**first["settings"])
        began = time.monotonic()
        engine = Engine.from_folder(
            Path(first["folder"]),
            cache_dir=Path(first["cache_dir"]),
            dtype=settings.dtype,
            device=settings.device,
            tp=settings.tp,
            pp=settings.pp,
            threads=settings.threads,
            kernels=settings.kernels,
            kv_tokens=settings.kv_tokens or None,
            max_num_seqs=settings.max_num_seqs,
            max_batched_tokens=settings.max_batched_tokens,
            asynchronous=settings.asynchronous,
            speculation=settings.speculation,
        )
        loaded = time.monotonic()
        driver = Driver(engine, Clocks(engine))
        run = driver.prefill(first["prompt"])
        ended = time.monotonic()
        assert run.num_tokens == len(first["prompt"])
        answer(
            {
                "first_token_at": ended,
                "start_s": ended - began,
                "load_s": loaded - began,
                "description": engine.decoder.description,
                "imported_torch": "torch" in sys.modules,
            }
        )
        for question in questions:
            answer(_answer(driver, question))
        engine.close()


def _answer(driver: Driver, question: dict[str, Any]) -> dict[str, Any]:
    if "prefill" in question:
        return asdict(driver.prefill(question["prefill"]))
    if "decode" in question:
        return asdict(
            driver.decode(question["decode"], question["output_len"], question["max_tokens"])
        )
    return memory_bytes()


if __name__ == "__main__":
    main()
