"""The bare engine, both ends: FlowServe as a library in a process of its own, told over a pipe what to generate.

This is what the platform is compared with: the same model, settings, threads and prompts, from text to text, with no
bus, no HTTP and nobody else in the process. One line of JSON in, one line of JSON out; the clock is the child's own.
It must not know what is compared.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from asyncio import subprocess
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import orjson

from services.worker.settings import WorkerSettings, compute_env
from shared.errors import Unavailable

_LINE_BYTES: Final = 1 << 26
_STOP_S: Final = 5.0


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

    def __init__(self, process: subprocess.Process) -> None:
        self._process = process

    @classmethod
    @contextlib.asynccontextmanager
    async def start(cls, folder: Path, settings: EngineSettings) -> AsyncIterator[BareEngine]:
        """An engine with the model in `folder` loaded, for as long as the block runs. Raises Unavailable."""
        env = os.environ | compute_env(settings.threads)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", __name__),
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            limit=_LINE_BYTES,
            start_new_session=True,
        )
        engine = cls(process)
        try:
            await engine._ask({"model": str(folder), **asdict(settings)})
            yield engine
        finally:
            await engine._stop()

    async def generate(self, prompts: Sequence[str], output_len: int) -> Run:
        """All prompts at once, greedily, `output_len` tokens each."""
        return Run(**await self._ask({"prompts": list(prompts), "max_tokens": output_len}))

    async def ttft_s(self, prompt: str) -> float:
        """Seconds from text in to the text of the first token out."""
        return float((await self._ask({"first": prompt}))["seconds"])

    async def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(orjson.dumps(question) + b"\n")
            await self._process.stdin.drain()
            line = await self._process.stdout.readline()
        except ConnectionError:
            line = b""
        if not line:
            raise Unavailable("the bare engine ended; its last words are above")
        answer: dict[str, Any] = orjson.loads(line)
        return answer

    async def _stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            async with asyncio.timeout(_STOP_S):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()


# ----------------------------------------------------------------------------------------------------- the child's end


def main() -> None:
    """Load what the first line says, then answer line by line until the end of standard input."""
    from services.worker.flowserve.llm import FlowServe

    # Whatever a library prints is not an answer.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    settings = orjson.loads(sys.stdin.buffer.readline())
    folder = Path(settings.pop("model"))
    _set_threads(settings.pop("threads"))
    engine = FlowServe(folder, **settings)
    list(engine.stream("Warm up.", max_tokens=3, temperature=0.0, ignore_eos=True))
    _answer(answers, {})
    for line in sys.stdin.buffer:
        question = orjson.loads(line)
        if "first" in question:
            _answer(answers, _first(engine, question["first"]))
        else:
            _answer(answers, _generate(engine, question["prompts"], question["max_tokens"]))


def _set_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


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


def _answer(answers: BinaryIO, answer: dict[str, Any]) -> None:
    answers.write(orjson.dumps(answer) + b"\n")
    answers.flush()


if __name__ == "__main__":
    main()
