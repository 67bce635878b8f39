"""A child process that answers questions: one line of JSON in, one line of JSON out, both ends.

What is measured runs alone in such a process, with an environment of its own, and keeps the clock itself. This module
must not know what is asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from asyncio import subprocess
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any, Final, TypeAlias

import orjson

from shared.errors import Unavailable

Answer: TypeAlias = dict[str, Any]

_LINE_BYTES: Final = 1 << 26
_STOP_S: Final = 5.0


class Child:
    """The parent's end; make it with `start`."""

    def __init__(self, process: subprocess.Process, name: str) -> None:
        self._process = process
        self._name = name

    @classmethod
    @contextlib.asynccontextmanager
    async def start(cls, module: str, name: str, env: Mapping[str, str]) -> AsyncIterator[Child]:
        """`python -m module`, with `env` over our own environment, for as long as the block runs.

        `name` is what a person calls it ("the bare engine").
        """
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", module),
            env=os.environ | env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            limit=_LINE_BYTES,
            start_new_session=True,
        )
        child = cls(process, name)
        try:
            yield child
        finally:
            await child._stop()

    async def ask(self, question: Mapping[str, Any]) -> Answer:
        """The answer to a question. Raises Unavailable if the child ends instead."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(orjson.dumps(question) + b"\n")
            await self._process.stdin.drain()
            line = await self._process.stdout.readline()
        except ConnectionError:
            line = b""
        if not line:
            raise Unavailable(f"{self._name} ended; its last words are above")
        answer: Answer = orjson.loads(line)
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


@contextlib.contextmanager
def conversation() -> Iterator[tuple[Iterator[Answer], Callable[[Answer], None]]]:
    """The child's end: the questions, until the parent has no more, and what sends an answer."""
    # Whatever a library prints is not an answer.
    with os.fdopen(os.dup(sys.stdout.fileno()), "wb") as answers:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

        def answer(value: Answer) -> None:
            answers.write(orjson.dumps(value) + b"\n")
            answers.flush()

        yield (orjson.loads(line) for line in sys.stdin.buffer), answer
