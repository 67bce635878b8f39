"""A process that answers questions and may die of one: then that is the answer, and the next one gets a new process.

This module must not know what is asked.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, Final, Self

from deepflow.bench.child import Child
from services.worker.settings import compute_env
from shared.errors import Unavailable

_ANSWER_S: Final = 600.0  # the first operations of a device may be compiled


class Answerer:
    """A child process that answers questions, and a new one after each that died or hung."""

    def __init__(self, module: str, within_s: float = _ANSWER_S) -> None:
        self._module = module
        self._within_s = within_s
        self._open = contextlib.AsyncExitStack()
        self._child: Child | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._end()

    async def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """The answer; that there came none is one, too."""
        if self._child is None:
            # A thread each: many small models are computed, not one large one.
            env = compute_env(1) | {"DEEPFLOW_KERNELS": "auto"}
            start = Child.start(self._module, "the process that computes", env)
            self._child = await self._open.enter_async_context(start)
        try:
            async with asyncio.timeout(self._within_s):
                return await self._child.ask(question)
        except TimeoutError:
            reason = f"no answer within {self._within_s:.0f} s"
        except Unavailable as error:
            reason = error.message
        await self._end()
        return {"state": "failed", "reason": reason}

    async def _end(self) -> None:
        self._child = None
        await self._open.aclose()
