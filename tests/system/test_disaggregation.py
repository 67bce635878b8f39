"""Prefill on one TE, decode on another: the same tokens as in one place, whatever is cancelled or killed on the way."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from deepflow import LLM
from tests.system.stack import Stack, Stream, body, stream
from tests.worker.tiny import make_tiny

pytestmark = [pytest.mark.system, pytest.mark.apart, pytest.mark.timeout(300)]
MODEL = "tiny"
NUM_REQUESTS = 500
NUM_AT_ONCE = 12
KILLED = (
    "prefill",
    "decode",
    "prefill",
    "decode",
    "both",
)  # in the middle of each part of the requests
KV_TOKENS = 2048  # a few of the longest requests fill a pool
VOCAB = 250  # token ids that every tiny vocabulary has


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where stack and library find the model."""
    folder = tmp_path_factory.mktemp("disaggregation")
    make_tiny(folder / "cache" / "models" / MODEL, layers=4, name=MODEL)
    return folder


@pytest.fixture(scope="module")
def stack(folder: Path) -> Iterator[Stack]:
    """A prefill TE and a decode TE with small pools; prompts of 64 tokens are split."""
    instance = Stack(folder / "home", folder / "cache", models=[MODEL], pd="1p1d")
    instance.env |= {
        "DEEPFLOW_PD_MIN_TOKENS": "64",
        "DEEPFLOW_KV_TOKENS": str(KV_TOKENS),
        "DEEPFLOW_ARENA_BYTES": str(16 << 20),
        "DEEPFLOW_SEGMENT_BYTES": str(1 << 20),
        "DEEPFLOW_THREADS": "1",
    }
    try:
        instance.start()
        yield instance
    finally:
        if instance.process is not None:
            instance.stop()


def make_requests(rng: random.Random) -> list[dict[str, Any]]:
    """Prompts of 8 to 400 tokens, some with a common beginning; greedy and sampled; outputs of 1 to 24 tokens."""
    trunks = [[rng.randrange(3, VOCAB) for _ in range(200)] for _ in range(4)]
    requests = []
    for number in range(NUM_REQUESTS):
        prompt = [rng.randrange(3, VOCAB) for _ in range(rng.randint(8, 200))]
        if rng.random() < 0.5:
            prompt = rng.choice(trunks)[: rng.randint(16, 200)] + prompt
        more = {"temperature": 1.0, "seed": number} if number % 2 else {"temperature": 0}
        requests.append({**body(MODEL, "", rng.randint(1, 24), **more), "prompt": prompt})
    return requests


def expected_texts(folder: Path, requests: list[dict[str, Any]]) -> list[str]:
    """What one engine in one place makes of them."""
    llm = LLM(folder / "cache" / "models" / MODEL, cache_dir=folder / "cache", threads=1)
    texts = []
    for request in requests:
        (output,) = llm.generate(
            [request["prompt"]],
            max_tokens=request["max_tokens"],
            temperature=float(request["temperature"]),
            seed=request.get("seed", 0),
            ignore_eos=True,
        )
        texts.append(output.text)
    return texts


async def test_split_requests_give_the_same_tokens(stack: Stack, folder: Path) -> None:
    """500 random requests, some cancelled in mid-stream, over TEs that are killed: every answer is that of one engine,
    and afterwards nobody holds a block."""
    rng = random.Random(5)
    requests = make_requests(rng)
    expected = expected_texts(folder, requests)
    cancelled = set(rng.sample(range(NUM_REQUESTS), NUM_REQUESTS // 10))
    seen: dict[int, Stream] = {}
    num_handed = 0

    async def client(session: aiohttp.ClientSession, numbers: Iterator[int], blow: int) -> None:
        nonlocal num_handed
        for number in numbers:
            if number == blow:
                role = KILLED[number * len(KILLED) // NUM_REQUESTS]
                num_handed += await asyncio.to_thread(kill, stack, role)
            if number in cancelled:
                await leave_early(session, stack.url, requests[number])
            else:
                seen[number] = await stream(session, stack.url, requests[number])

    size = NUM_REQUESTS // len(KILLED)
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        for first in range(0, NUM_REQUESTS, size):
            await asyncio.to_thread(stack.wait_tes)
            numbers = iter(range(first, first + size))
            async with asyncio.TaskGroup() as clients:
                for _ in range(NUM_AT_ONCE):
                    clients.create_task(client(session, numbers, first + size // 2))

    assert len(seen) == NUM_REQUESTS - len(cancelled)
    assert {n: s.error for n, s in seen.items() if s.error} == {}, stack.logs()
    assert {n: s.text for n, s in seen.items()} == {n: expected[n] for n in seen}
    assert all(s.done and s.finish == {0: "length"} for s in seen.values())
    assert num_handed > NUM_REQUESTS // 20, "too few were ever split"
    await asyncio.to_thread(stack.wait_tes)
    stack.wait_idle(within_s=40.0)  # longer than a lease lives whose reader was killed


def kill(stack: Stack, role: str) -> int:
    """kill -9 of the TE of a role, or both; how many requests they had handed over."""
    num_handed = 0
    for te in stack.tes():
        num_handed += int(te["counters"].get("requests_handed", 0))
        if role in (te["role"], "both"):
            os.kill(te["pid"], signal.SIGKILL)
    return num_handed


async def leave_early(session: aiohttp.ClientSession, url: str, request: dict[str, Any]) -> None:
    """Hang up after a moment: before the first token, or after some."""
    try:
        async with asyncio.timeout(random.Random(len(request["prompt"])).uniform(0.002, 0.05)):
            await stream(session, url, request)
    except TimeoutError:
        pass
