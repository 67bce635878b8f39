"""TEs come and go with demand: from zero and back, by order, under the blows that a scale-up can meet."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import aiohttp
import psutil
import pytest

from tests.system.stack import Stack, Stream, body, stream_all
from tests.worker.tiny import make_tiny

pytestmark = [pytest.mark.system, pytest.mark.apart, pytest.mark.timeout(300)]
FIRST, SECOND = "first", "second"
MOST = 6


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Two models that sleep, on one host."""
    folder = tmp_path_factory.mktemp("scaling")
    for name in (FIRST, SECOND):
        make_tiny(folder / "cache" / "models" / name, layers=4, name=name)
    instance = Stack(
        folder / "home", folder / "cache", models=[FIRST, SECOND], workers=f"0..{MOST}"
    )
    instance.env |= {
        "DEEPFLOW_KV_TOKENS": "2048",
        "DEEPFLOW_MAX_NUM_SEQS": "4",
        "DEEPFLOW_THREADS": "1",
        "DEEPFLOW_ARENA_BYTES": str(16 << 20),
        "DEEPFLOW_SEGMENT_BYTES": str(1 << 20),
        "DEEPFLOW_MIGRATE_AFTER_S": "0.5",
    }
    try:
        instance.start()
        yield instance
    finally:
        if instance.process is not None:
            instance.stop()


async def set_scaling(stack: Stack, model: str, **scaling: Any) -> None:
    """PATCH the model; again, while nobody is up who could see to it."""
    give_up = time.monotonic() + 20
    async with aiohttp.ClientSession() as session:
        while True:
            where = f"{stack.url}/v1/models/{model}"
            async with session.patch(where, json={"scaling": scaling}) as response:
                if response.status == 200:
                    return
                assert response.status == 503, await response.text()
                assert time.monotonic() < give_up, await response.text()
            await asyncio.sleep(0.2)


def prompts(model: str, num: int, num_tokens: int) -> list[dict[str, Any]]:
    """Streams of different texts."""
    return [
        {**body(model, "", num_tokens), "prompt": [3 + number, *range(10, 40)]}
        for number in range(num)
    ]


def whole(seen: list[Stream], num_tokens: int) -> bool:
    """Whether every stream came to its end, with all its tokens."""
    return all(
        one.error is None and one.done and one.usage["completion_tokens"] == num_tokens
        for one in seen
    )


async def test_a_model_wakes_answers_and_sleeps_again(stack: Stack) -> None:
    """A request for a sleeping model is told how far it is, and answered; afterwards no TE of it is left, and the model
    is still listed."""
    await set_scaling(stack, FIRST, min=0, max=MOST, keep_alive_s=1)
    await stack.settled(FIRST, 0)
    seen = await stream_all(stack.url, prompts(FIRST, 1, 8))
    assert whole(seen, 8), (seen, stack.logs())
    assert any(comment.startswith("queued") for comment in seen[0].comments), seen
    await stack.settled(FIRST, 0)
    assert stack.get(f"/v1/models/{FIRST}")[0] == 200
    starts = next(s for s in stack.status()["services"] if s["name"] == "worker")["starts"]
    steps = {"scaler_pre", "te_pre_load", "te_load", "te_post_load", "scaler_post"}
    assert steps == set(starts[-1]["steps"])


async def test_a_herd_wakes_its_model_and_nobody_is_lost(stack: Stack) -> None:
    """Far more requests than one TE takes, for both sleeping models at once, are all answered."""
    await stack.settled(FIRST, 0)
    herd = prompts(FIRST, 40, 24) + prompts(SECOND, 40, 24)
    seen = await stream_all(stack.url, herd)
    assert whole(seen, 24), (seen, stack.logs())


async def test_what_runs_goes_on_when_its_te_is_scaled_down(stack: Stack) -> None:
    """Streams that outlast the grace of a drained TE go on elsewhere, with the text of a quiet run."""
    await set_scaling(stack, FIRST, target=3)
    await stack.settled(FIRST, 3)
    long = prompts(FIRST, 9, 600)
    expected = [one.text for one in await stream_all(stack.url, long)]
    begun = asyncio.Event()
    streams = asyncio.create_task(stream_all(stack.url, long, lambda seen: begun.set()))
    await begun.wait()
    await set_scaling(stack, FIRST, target=1)
    seen = await streams
    assert whole(seen, 600), (seen, stack.logs())
    assert [one.text for one in seen] == expected
    await stack.settled(FIRST, 1)


def kill(name: str) -> Callable[[Stack], None]:
    """kill -9 of a service."""

    def blow(stack: Stack) -> None:
        os.kill(stack.service_pid(name), signal.SIGKILL)

    return blow


def kill_zygote(stack: Stack) -> None:
    """kill -9 of the process that TEs are forked from."""
    for process in stack.processes():
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            if "services.worker.zygote" in " ".join(process.cmdline()):
                process.kill()


@pytest.mark.parametrize(
    "blow",
    [kill("scheduler"), kill("worker"), kill("nats"), kill_zygote],
    ids=["cluster manager", "pod host", "bus", "zygote"],
)
async def test_a_fleet_converges_whatever_is_killed(
    stack: Stack, blow: Callable[[Stack], None]
) -> None:
    """In the middle of a scale-up under load: every stream ends with all its tokens, there are as many TEs as were
    asked for and no more, and no process is left of what was killed."""
    await set_scaling(stack, FIRST, target=1)
    await stack.settled(FIRST, 1)
    streams = asyncio.create_task(stream_all(stack.url, prompts(FIRST, 12, 400)))
    await asyncio.sleep(0.2)
    await set_scaling(stack, FIRST, target=MOST)
    await asyncio.sleep(0.05)
    await asyncio.to_thread(blow, stack)
    seen = await streams
    assert whole(seen, 400), ([one.error for one in seen], stack.logs())
    tes = await stack.settled(FIRST, MOST, within_s=60)
    assert len({te["id"] for te in tes}) == MOST
    pids = {process.pid for process in stack.processes()}
    assert {te["pid"] for te in tes} <= pids
    assert not orphans(stack, pids), stack.logs()


def orphans(stack: Stack, pids: set[int]) -> list[int]:
    """Processes of this instance's home that are nobody's children."""
    found = []
    for process in psutil.process_iter():
        try:
            mine = process.environ().get("DEEPFLOW_HOME") == str(stack.home)
        except psutil.Error:
            continue
        if mine and process.pid not in pids:
            found.append(process.pid)
    return found
