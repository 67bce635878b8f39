"""Fetches from another host and from SSD under blows: hosts that die and hang, and the bus that restarts."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from shared.bus import Bus
from shared.errors import DeepFlowError
from tests.cache.hosts import (
    SEGMENT_BYTES,
    Host,
    Writing,
    acquainted,
    nothing_is_left,
    pages,
    running,
)
from tests.nats_server import NatsServer
from tests.scheduler.players import eventually

NUM = 40  # pages: more than a segment holds, so more than one lease
DELAYS_S = [0.02, *([n / 1000 for n in range(30)] if os.environ.get("DEEPFLOW_SOAK") else [])]


@contextlib.asynccontextmanager
async def two(nats: NatsServer, bus: Bus, folder: Path, **env: str) -> AsyncIterator[list[Host]]:
    """The near and the far host; the far one has the chain \"a\", and the near one knows."""
    async with contextlib.AsyncExitStack() as stack:
        near, far = await asyncio.gather(
            stack.enter_async_context(running(nats, bus, folder / "near", **env)),
            stack.enter_async_context(running(nats, bus, folder / "far")),
        )
        with Writing(far, "te-far") as te:
            await te.write(pages("a", NUM))
            await far.holds(pages("a", NUM), NUM)
            await acquainted(near, far)
            yield [near, far]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_host_that_dies_or_hangs_is_an_answer_in_time(
    nats: NatsServer, bus: Bus, tmp_path: Path, number: signal.Signals
) -> None:
    """A dead or stopped holder costs the asker a bounded wait, is left alone for a while, and strands nothing."""
    chain = pages("a", NUM)
    async with two(nats, bus, tmp_path) as (near, far):
        far.child.send_signal(number)
        async with asyncio.timeout(15):
            found = await near.fetched(chain)
        assert (found.slots, found.ticket) == ([], "")
        decision = (await near.status())["decisions"][0]
        assert decision["outcome"] in ("failed", "nothing")  # it may have been missed already
        await nothing_is_left(near)
        with Writing(near, "te-near") as te:
            await te.write(chain[:3])
            await near.holds(chain, 3)
        if number == signal.SIGSTOP:
            far.child.send_signal(signal.SIGCONT)

            # Its beats make it known again, and in time it is tried again.
            async def back() -> bool:
                return near.read((await near.fetched(chain)).slots, chain) == NUM

            await eventually(back, within_s=20)


async def test_a_service_killed_in_the_middle_of_a_fetch(
    nats: NatsServer, bus: Bus, tmp_path: Path
) -> None:
    """Its arena holds whole pages only, for whoever owns it next, and the other host gets its leases back."""
    chain = pages("a", NUM)
    async with running(nats, bus, tmp_path / "far") as far:
        with Writing(far, "te-far") as te:
            await te.write(chain)
            await far.holds(chain, NUM)
            for delay_s in DELAYS_S:
                async with running(nats, bus, tmp_path / "near") as near:
                    await acquainted(near, far)
                    asking = asyncio.ensure_future(near.populate(chain))
                    await asyncio.sleep(delay_s)
                    near.child.kill()
                    asking.cancel()
                    with contextlib.suppress(asyncio.CancelledError):
                        await asking
                await nothing_is_left(far)
                async with running(nats, bus, tmp_path / "near") as near:
                    here = await near.populate(chain, page_us=2)
                    assert near.read(here.slots, chain) == len(here.slots)
                    await nothing_is_left(near)
                    await acquainted(near, far)
                    found = await near.fetched(chain)
                    assert near.read(found.slots, chain) == NUM
                shutil.rmtree(tmp_path / "near")


async def test_the_bus_restarts(nats: NatsServer, bus: Bus, tmp_path: Path) -> None:
    """After an outage of the bus the hosts know of each other's pages again, and fetch."""
    chain = pages("a", NUM)
    async with two(nats, bus, tmp_path) as (near, far):
        await asyncio.to_thread(nats.restart)
        await eventually(lambda: bus.connected)

        async def back() -> bool:
            with contextlib.suppress(DeepFlowError):
                return near.read((await near.fetched(chain)).slots, chain) == NUM
            return False

        await eventually(back, within_s=20)
        await nothing_is_left(near, far)


async def test_evicted_pages_come_back_from_ssd(nats: NatsServer, bus: Bus, tmp_path: Path) -> None:
    """Pages used more than once go to SSD before they are evicted, and from there back into the arena, also after a
    kill -9."""
    chain = pages("a", 6)
    env = {
        "DEEPFLOW_ARENA_BYTES": str(8 * SEGMENT_BYTES),
        "DEEPFLOW_SSD_BYTES": str(1 << 30),
        "DEEPFLOW_SSD_DIR": str(tmp_path / "ssd"),
    }
    async with running(nats, bus, tmp_path / "arena", **env) as host:
        with Writing(host, "te-1") as te:
            await te.write(chain)
            await host.holds(chain, 6)
            await host.fetched(chain)
            await host.fetched(chain)
            turn = 0

            async def spilled() -> bool:
                nonlocal turn
                turn += 1
                await te.write(pages(f"other{turn}", 16))
                await asyncio.sleep(0.2)
                return bool((await host.ledger())["ssd"]["pages"] >= 6)

            await eventually(spilled, within_s=20)
            for _ in range(16):  # now they can go, and do
                turn += 1
                await te.write(pages(f"other{turn}", 16))
            await host.holds(chain, 0)
            found = await host.fetched(chain)
            assert host.read(found.slots, chain) == 6
            decision = (await host.status())["decisions"][0]
            assert "ssd" in decision["why"]
            host.child.kill()
    shutil.rmtree(tmp_path / "arena")  # the machine was restarted
    async with running(nats, bus, tmp_path / "arena", **env) as host:
        found = await host.fetched(chain)
        assert host.read(found.slots, chain) == 6
