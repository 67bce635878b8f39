"""Round after round of unique prompts, of clients that leave, and of blows: nothing is lost and nothing grows.

Short by default; `make soak` runs the same code for hundreds of rounds.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
from typing import Any

import aiohttp
import psutil
import pytest

from tests.system.conftest import MODEL
from tests.system.stack import Stack, Stream, body, stream

LONG = bool(os.environ.get("DEEPFLOW_SOAK"))
NUM_ROUNDS = 400 if LONG else 4
BLOW_EVERY = 4  # rounds
NUM_CLIENTS = 12
GROWTH_BYTES = 64 * 2**20  # of any service over all rounds after the first quarter
VICTIMS = ("scheduler", "cache", "nats", "te")

pytestmark = [
    pytest.mark.system,
    pytest.mark.soak,
    pytest.mark.smollm2,
    pytest.mark.timeout(7200 if LONG else 150),
]


def memory(stack: Stack) -> dict[str, int]:
    """Resident bytes of the long-lived services that hold indexes and streams."""
    sizes = {}
    for process in stack.processes():
        command = " ".join(process.cmdline())
        for name in ("services.gateway", "services.scheduler", "services.cache", "nats-server"):
            if f"{name} " in command + " " and "tokenizing" not in command:
                sizes[name] = process.memory_info().rss
    return sizes


async def client(stack: Stack, request: dict[str, Any], leave_after: int | None) -> Stream | None:
    """One client; it leaves in the middle if told to."""

    class Left(Exception):
        pass

    def watch(seen: Stream) -> None:
        if leave_after is not None and seen.num_chunks >= leave_after:
            raise Left

    async with aiohttp.ClientSession() as session:
        with contextlib.suppress(Left):
            return await stream(session, stack.url, request, on_chunk=watch)
    return None


def strike(stack: Stack, victim: str) -> None:
    """kill -9."""
    with contextlib.suppress(ProcessLookupError, StopIteration, psutil.Error):
        pid = stack.wait_tes()[0]["pid"] if victim == "te" else stack.service_pid(victim)
        os.kill(pid, signal.SIGKILL)


async def test_nothing_is_lost_and_nothing_grows(stack: Stack) -> None:
    """Every client that stays gets its whole text; ledgers balance after each round; memory stays flat."""
    chance = random.Random(7)
    stack.wait_tes()
    early: dict[str, int] = {}
    for number in range(NUM_ROUNDS):
        requests = [
            (
                body(MODEL, f"{chance.random()} is the number {number}, {i}: " * 4, 8, seed=i),
                chance.choice([None, None, 3]),
            )
            for i in range(NUM_CLIENTS)
        ]
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(client(stack, *request)) for request in requests]
            if number % BLOW_EVERY == BLOW_EVERY - 1:
                await asyncio.sleep(0.3)
                await asyncio.to_thread(strike, stack, VICTIMS[number // BLOW_EVERY % len(VICTIMS)])
        for (_, leave_after), task in zip(requests, tasks, strict=True):
            seen = task.result()
            if leave_after is None:
                assert seen is not None
                assert seen.error is None, (seen.error, stack.logs())
                assert seen.finish == {0: "length"}
                assert seen.usage["completion_tokens"] == 8
        await asyncio.to_thread(stack.wait_tes)
        await asyncio.to_thread(stack.wait_idle)
        if number == NUM_ROUNDS // 4:
            early = memory(stack)

    async with asyncio.timeout(
        20
    ):  # the last blow's victim may wait for its turn to be started again
        while (late := memory(stack)).keys() != early.keys():
            await asyncio.sleep(0.1)
    grown = {name: late[name] - size for name, size in early.items() if name in late}
    assert len(grown) == 4
    assert all(size < GROWTH_BYTES for size in grown.values()), grown
