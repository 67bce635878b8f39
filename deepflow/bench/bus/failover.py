"""kill -9 of a TE in the middle of streams: how long each of them pauses, and whether its text stays the same."""

from __future__ import annotations

import asyncio
import os
import signal
import statistics
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Final

from deepflow.bench import load
from deepflow.bench.bus.plan import Plan
from deepflow.bench.client import Client
from deepflow.bench.distribution import percentile
from deepflow.bench.sample import Sample
from deepflow.bench.stack import Stack
from shared.errors import Internal

MAX_TRIES: Final = 5


class Failover:
    """Kills on a platform with several TEs of one model, or with a single one, which must be started again."""

    def __init__(self, client: Client, stack: Stack, plan: Plan, prompts: Iterator[str]) -> None:
        self._client = client
        self._stack = stack
        self._plan = plan
        self._prompts = prompts

    async def measure(
        self, name: str, num_kills: int, num_tes: int, advance: Callable[[], None]
    ) -> dict[str, float]:
        """The longest gap of each stream under way at a kill, also of those on the other TEs.

        Raises Internal if a stream fails.
        """
        pauses_ms: list[float] = []
        num_same = 0
        for _ in range(num_kills):
            await self._stack.wait_ready(num_tes)
            await self._stack.wait_idle()
            prompts = list(islice(self._prompts, self._plan.num_kill_streams))
            # First undisturbed: the text that the streams must have.
            expected = {sample.text for sample in await self._send(prompts)}
            killed, samples = await self._interrupt(prompts)
            pauses_ms += [1000 * max(sample.itl_s, default=0.0) for sample in samples]
            num_same += sum(sample.text in expected for sample in samples)
            await self._stack.wait_ready(num_tes, avoid=frozenset({killed}))
            advance()
        return {
            f"{name}_pause_p50_ms": statistics.median(pauses_ms),
            f"{name}_pause_p99_ms": percentile(pauses_ms, 99),
            f"{name}_pause_max_ms": max(pauses_ms),
            f"{name}_same_text_share": num_same / len(pauses_ms),
        }

    async def _interrupt(self, prompts: list[str]) -> tuple[str, list[Sample]]:
        """Kill a TE under streams of `prompts`: its name, and the streams.

        Streams that were over before the TE was found are sent again: small models on busy machines are like that.
        """
        for _ in range(MAX_TRIES):
            begun = asyncio.Semaphore(0)
            async with asyncio.TaskGroup() as tasks:
                running = tasks.create_task(self._send(prompts, begun.release))
                for _ in prompts:
                    await begun.acquire()
                killed = await self._kill_busiest()
            if killed is not None:
                return killed, running.result()
        raise Internal(f"{MAX_TRIES} times, all streams were over before a TE could be killed")

    async def _send(
        self, prompts: list[str], started: Callable[[], None] | None = None
    ) -> list[Sample]:
        async def send(prompt: str) -> Sample:
            return await self._client.complete(prompt, self._plan.kill_output_len, started)

        samples = await load.closed(send, prompts, len(prompts))
        for sample in samples:
            if not sample.ok:
                raise Internal(f"a stream of the bench failed: {sample.status}, {sample.error!r}")
        return samples

    async def _kill_busiest(self) -> str | None:
        """Kill the TE that runs most of the streams, by its own word; its name. None if no TE runs any."""
        states = [(await self._stack.running(te), te) for te in self._stack.tes()]
        running, te, pid = max((count, te, pid) for (count, pid), te in states)
        if not running:
            return None
        os.kill(pid, signal.SIGKILL)
        return te
