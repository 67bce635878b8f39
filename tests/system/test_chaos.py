"""Parts of the platform are killed in the middle of streams; the streams go on with identical text."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable

import aiohttp
import pytest

from tests.system.conftest import MODEL
from tests.system.stack import Stack, Stream, body, stream, stream_all

pytestmark = [pytest.mark.system, pytest.mark.smollm2, pytest.mark.timeout(150)]
NUM_TOKENS = 40
KILL_AT = 8  # tokens a stream has when the blow falls


def requests() -> list[dict[str, object]]:
    """Eight streams: half of them greedy, half sampled with a seed."""
    return [
        body(
            MODEL,
            f"Story number {i}: once upon a time in a land far away there lived",
            NUM_TOKENS,
            **({"temperature": 1.0, "seed": i} if i % 2 else {}),
        )
        for i in range(8)
    ]


@pytest.fixture(scope="module")
def expected(stack: Stack) -> list[str]:
    """The texts of a quiet run."""
    return [seen.text for seen in asyncio.run(stream_all(stack.url, requests()))]


def kill_te(stack: Stack) -> None:
    """kill -9 of the busiest TE."""
    os.kill(max(stack.wait_tes(), key=lambda te: te["running"])["pid"], signal.SIGKILL)


def stop_te(stack: Stack) -> None:
    """SIGSTOP of the busiest TE: a hang."""
    os.kill(max(stack.wait_tes(), key=lambda te: te["running"])["pid"], signal.SIGSTOP)


def kill_service(name: str) -> Callable[[Stack], None]:
    """kill -9 of a service."""

    def kill(stack: Stack) -> None:
        os.kill(stack.service_pid(name), signal.SIGKILL)

    return kill


BLOWS = {
    "te": kill_te,
    "te-stopped": stop_te,
    "scheduler": kill_service("scheduler"),
    "cache": kill_service("cache"),
    "nats": kill_service("nats"),
    "worker": kill_service("worker"),
}


@pytest.mark.parametrize("blow", BLOWS)
async def test_streams_survive_with_identical_text(
    stack: Stack,
    expected: list[str],
    blow: str,
    record_property: Callable[[str, object], None],
) -> None:
    """After the blow every stream finishes with the text of a quiet run, token for token."""
    stack.wait_tes()
    struck = asyncio.Event()

    def watch(seen: Stream) -> None:
        if seen.num_chunks >= KILL_AT:
            struck.set()

    async def strike() -> None:
        await struck.wait()
        await asyncio.to_thread(BLOWS[blow], stack)

    async with asyncio.TaskGroup() as group:
        group.create_task(strike())
        streams = group.create_task(stream_all(stack.url, requests(), watch))
    seen = streams.result()

    assert [s.error for s in seen] == [None] * len(seen), stack.logs()
    assert [s.text for s in seen] == expected
    assert all(s.done and s.finish == {0: "length"} for s in seen)
    assert all(s.usage["completion_tokens"] == NUM_TOKENS for s in seen)
    pause_s = sorted(max(s.gaps_s) for s in seen)[-1]
    record_property("pause_max_s", round(pause_s, 2))
    stack.wait_tes()
    stack.wait_idle()


async def test_a_killed_gateway_frees_its_work(stack: Stack) -> None:
    """kill -9 of the gateway resets its clients, and within 5 s no KV block or slot is held for them."""
    stack.wait_tes()
    begun = asyncio.Event()

    async def follow(request: dict[str, object]) -> None:
        async with aiohttp.ClientSession() as session:
            with pytest.raises(aiohttp.ClientError):
                await stream(session, stack.url, request, on_chunk=lambda seen: begun.set())

    async with asyncio.TaskGroup() as group:
        for i in range(4):
            group.create_task(follow(body(MODEL, f"Number {i} is", 1500)))
        await begun.wait()
        pid = await asyncio.to_thread(stack.service_pid, "gateway")
        os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    while stack.get("/ready")[0] != 200:
        assert time.monotonic() - killed < 30, stack.logs()
        await asyncio.sleep(0.02)
    stack.wait_idle(within_s=max(0.5, 5.0 - (time.monotonic() - killed)))


async def test_an_idempotent_retry_after_a_killed_gateway_repeats_its_tokens(stack: Stack) -> None:
    """The same Idempotency-Key gives the same sampled tokens from a restarted gateway."""
    stack.wait_tes()
    request = body(MODEL, "A random word:", 16, temperature=1.5)
    texts = []
    for attempt in range(2):
        async with aiohttp.ClientSession(headers={"Idempotency-Key": "k-1"}) as session:
            texts.append((await stream(session, stack.url, request)).text)
        if attempt == 0:
            os.kill(stack.service_pid("gateway"), signal.SIGKILL)
            give_up = time.monotonic() + 30
            while stack.get("/ready")[0] != 200:
                assert time.monotonic() < give_up, stack.logs()
                await asyncio.sleep(0.05)

    assert texts[0] == texts[1]
    assert texts[0]
