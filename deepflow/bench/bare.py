"""The bare engine, both ends: FlowServe as a library in a process of its own, told over a pipe what to generate.

This is what the platform is compared with: the same model, settings, threads and prompts, from text to text, with no
bus, no HTTP and nobody else in the process. It must not know what is compared.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deepflow.bench.child import Child, conversation
from services.worker.settings import WorkerSettings, compute_env


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """What engine and platform have in common."""

    dtype: str
    threads: int
    kv_tokens: int
    max_num_seqs: int
    max_batched_tokens: int

    @classmethod
    def default(cls, *, kv_tokens: int) -> EngineSettings:
        """What a worker would use on this machine, but for the size of the cache."""
        worker = WorkerSettings.load({})
        return cls(
            dtype=worker.dtype,
            threads=worker.threads,
            kv_tokens=kv_tokens,
            max_num_seqs=worker.max_num_seqs,
            max_batched_tokens=worker.max_batched_tokens,
        )

    def variables(self) -> dict[str, str]:
        """The same for the platform."""
        return {
            "DEEPFLOW_DTYPE": self.dtype,
            "DEEPFLOW_THREADS": str(self.threads),
            "DEEPFLOW_KV_TOKENS": str(self.kv_tokens),
            "DEEPFLOW_MAX_NUM_SEQS": str(self.max_num_seqs),
            "DEEPFLOW_MAX_BATCHED_TOKENS": str(self.max_batched_tokens),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a batch of prompts took, from the first text handed in to the last text out."""

    seconds: float
    output_tokens: int
    texts: list[str]

    @property
    def tokens_per_s(self) -> float:
        """Output tokens over all of the time."""
        return self.output_tokens / self.seconds


class BareEngine:
    """The parent's end; make it with `start`."""

    def __init__(self, child: Child) -> None:
        self._child = child

    @classmethod
    @contextlib.asynccontextmanager
    async def start(cls, folder: Path, settings: EngineSettings) -> AsyncIterator[BareEngine]:
        """An engine with the model in `folder` loaded, for as long as the block runs. Raises Unavailable."""
        env = compute_env(settings.threads)
        async with Child.start(__name__, "the bare engine", env) as child:
            await child.ask({"model": str(folder), **asdict(settings)})
            yield cls(child)

    async def generate(self, prompts: Sequence[str], output_len: int) -> Run:
        """All prompts at once, greedily, `output_len` tokens each."""
        return Run(**await self._child.ask({"prompts": list(prompts), "max_tokens": output_len}))

    async def ttft_s(self, prompt: str) -> float:
        """Seconds from text in to the text of the first token out."""
        return float((await self._child.ask({"first": prompt}))["seconds"])


# ----------------------------------------------------------------------------------------------------- the child's end


def main() -> None:
    """Load what the first question says, then answer the others."""
    from services.worker.flowserve.llm import FlowServe

    with conversation() as (questions, answer):
        settings = next(questions)
        engine = FlowServe(Path(settings.pop("model")), **settings)
        list(engine.stream("Warm up.", max_tokens=3, temperature=0.0, ignore_eos=True))
        answer({})
        for question in questions:
            if "first" in question:
                answer(_first(engine, question["first"]))
            else:
                answer(_generate(engine, question["prompts"], question["max_tokens"]))


def _generate(engine: Any, prompts: list[str], max_tokens: int) -> dict[str, Any]:
    started = time.perf_counter()
    outputs = engine.generate(
        prompts, max_tokens=max_tokens, temperature=0.0, ignore_eos=True, seed=0
    )
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "output_tokens": sum(len(output.ids) for output in outputs),
        "texts": [output.text for output in outputs],
    }


def _first(engine: Any, prompt: str) -> dict[str, Any]:
    started = time.perf_counter()
    stream = engine.stream(prompt, max_tokens=2, temperature=0.0, ignore_eos=True, seed=0)
    while not next(stream).text:
        pass  # the first token may be half a character
    seconds = time.perf_counter() - started
    stream.close()
    return {"seconds": seconds}


if __name__ == "__main__":
    main()
