"""An engine in a process of its own that stands still unless it is its turn. It must not know which engine it is.

Between turns the whole process group is stopped (SIGSTOP): some engines have threads that spin while they wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from asyncio import subprocess
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import orjson

from deepflow.bench.peers.environment import last_lines
from shared.errors import Unavailable

_DRIVERS: Final = Path(__file__).parent / "drivers"
_LINE_BYTES: Final = 1 << 26
_ANSWER_S: Final = 900.0  # loading and compiling included


class Contestant:
    """Make it with `start`. `described` is what it said of itself: versions and settings."""

    def __init__(self, name: str, process: subprocess.Process, log: Path) -> None:
        self.name = name
        self.described: dict[str, Any] = {}
        self._process = process
        self._log = log

    @classmethod
    @contextlib.asynccontextmanager
    async def start(
        cls,
        name: str,
        python: Path,
        env: dict[str, str],
        options: Mapping[str, Any],
        log: Path,
    ) -> AsyncIterator[Contestant]:
        """The driver of `name` under `python`, loaded and stopped, for as long as the block runs.

        Raises Unavailable if it does not come up; what it writes besides answers goes to `log`.
        """
        driver = (str(_DRIVERS / "runner.py"), str(_DRIVERS / f"{name}.py"))
        with log.open("wb") as sink:
            process = await asyncio.create_subprocess_exec(
                # -P: beside the drivers lie files with the names of the packages they import.
                *(str(python), "-P", *driver),
                env=env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=sink,
                limit=_LINE_BYTES,
                start_new_session=True,
            )
        contestant = cls(name, process, log)
        try:
            contestant.described = await contestant._turn(options)
            yield contestant
        finally:
            contestant._signal(signal.SIGKILL)
            await process.wait()

    async def prefill(self, variant: str, prompt: Sequence[int]) -> float:
        """Tokens/s of one prompt up to its first token."""
        answer = await self._turn({"do": "prefill", "variant": variant, "prompt": list(prompt)})
        return len(prompt) / float(answer["seconds"])

    async def open(self, variant: str, prompts: Sequence[Sequence[int]]) -> None:
        """Prefill prompts, to be decoded together from now on."""
        await self._turn({"do": "open", "variant": variant, "prompts": list(map(list, prompts))})

    async def decode(self, variant: str, num_tokens: int, limit_s: float) -> float:
        """Tokens/s of all of them together, over the next `num_tokens` or the steps begun within `limit_s`."""
        question = {"do": "decode", "variant": variant, "num_tokens": num_tokens}
        answer = await self._turn(question | {"limit_s": limit_s})
        return float(answer["num_tokens"] / answer["seconds"])

    async def close(self, variant: str) -> None:
        """Give them up."""
        await self._turn({"do": "close", "variant": variant})

    async def _turn(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """Wake up, answer, stand still again. Raises Unavailable if there is no answer, or an error for one."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._signal(signal.SIGCONT)
        try:
            self._process.stdin.write(orjson.dumps(question) + b"\n")
            await self._process.stdin.drain()
            async with asyncio.timeout(_ANSWER_S):
                line = await self._process.stdout.readline()
        except (ConnectionError, TimeoutError):
            line = b""
        if not line:
            raise Unavailable(
                f"{self.name} gave no answer; its last words:\n{last_lines(self._log)}"
            )
        self._signal(signal.SIGSTOP)
        answer: dict[str, Any] = orjson.loads(line)
        if "error" in answer:
            raise Unavailable(f"{self.name}: {answer['error']} ({self._log})")
        return answer

    def _signal(self, number: signal.Signals) -> None:
        """To the process and all it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)
