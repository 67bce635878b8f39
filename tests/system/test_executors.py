"""A model over two processes loses one of them in the middle of streams; the streams go on with identical text."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from tests.system.stack import Stack, body, stream_all
from tests.worker.tiny import make_tiny

pytestmark = [pytest.mark.system, pytest.mark.apart, pytest.mark.timeout(150)]
MODEL = "tiny"
NUM_TOKENS = 400
KILL_AT = 20  # tokens a stream has when the blow falls


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """One TE whose model is cut into two slices."""
    folder = tmp_path_factory.mktemp("executors")
    make_tiny(folder / "cache" / "models" / MODEL, layers=4, name=MODEL)
    instance = Stack(folder / "home", folder / "cache", models=[MODEL])
    instance.env |= {"DEEPFLOW_TP": "2", "DEEPFLOW_THREADS": "1"}
    try:
        instance.start()
        yield instance
    finally:
        if instance.process is not None:
            instance.stop()


def requests() -> list[dict[str, Any]]:
    """Half of them greedy, half sampled with a seed."""
    return [
        body(MODEL, f"Story {i}", NUM_TOKENS, **({"temperature": 1.0, "seed": i} if i % 2 else {}))
        for i in range(4)
    ]


@pytest.fixture(scope="module")
def expected(stack: Stack) -> list[str]:
    """The texts of a quiet run."""
    return [seen.text for seen in asyncio.run(stream_all(stack.url, requests()))]


def executor(stack: Stack) -> tuple[int, psutil.Process]:
    """The TE's process id, and the process of its model's second rank."""
    (te,) = stack.wait_tes()
    for child in psutil.Process(te["pid"]).children():
        # Beside it there may be the process that it was forked off.
        if "spmd.executor" in " ".join(child.cmdline()):
            return te["pid"], child
    raise AssertionError(f"{te['id']} has no second rank")


def logged(stack: Stack, event: str) -> list[dict[str, Any]]:
    """The worker's log lines of one kind."""
    lines = (stack.home / "logs" / "worker.log").read_text(errors="replace").splitlines()
    events = [json.loads(line) for line in lines if line.startswith("{")]
    return [one for one in events if one["event"] == event]


# A killed rank is noticed sooner than a stopped one, and by a simpler way, which tests/worker/test_spmd.py takes too.
BLOWS = [signal.SIGSTOP, *([signal.SIGKILL] if os.environ.get("DEEPFLOW_SOAK") else [])]


@pytest.mark.parametrize("blow", BLOWS, ids=lambda blow: blow.name)
async def test_streams_survive_the_loss_of_a_rank(
    stack: Stack, expected: list[str], blow: signal.Signals
) -> None:
    """The TE ends within seconds and says which rank it lost and why; its requests go on where it is started anew."""
    te, child = await asyncio.to_thread(executor, stack)
    struck_at = 0.0

    def watch(seen: Any) -> None:
        nonlocal struck_at
        if seen.num_chunks >= KILL_AT and not struck_at:
            struck_at = time.monotonic()
            os.kill(child.pid, blow)

    async def wait_end() -> float:
        while not struck_at or psutil.pid_exists(te):
            await asyncio.sleep(0.02)
        return time.monotonic() - struck_at

    async with asyncio.TaskGroup() as group:
        ended = group.create_task(wait_end())
        streams = group.create_task(stream_all(stack.url, requests(), watch))
    seen = streams.result()

    assert ended.result() < 5.0, stack.logs()
    assert [s.error for s in seen] == [None] * len(seen), stack.logs()
    assert [s.text for s in seen] == expected
    assert all(s.done and s.finish == {0: "length"} for s in seen)
    lost = logged(stack, "rank_lost")[-1]
    why = {"SIGKILL": "was killed by SIGKILL", "SIGSTOP": "gave no sign of life for 2 s"}
    assert (lost["rank"], lost["pid"], lost["reason"]) == (1, child.pid, why[blow.name])
    assert "lost a rank of its model" in logged(stack, "te_died")[-1]["reason"]
    assert not child.is_running()
    stack.wait_tes()
    stack.wait_idle()
