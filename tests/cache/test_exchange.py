"""Two hosts: two cache services with an arena each, on one bus; pages go from one to the other over DistFlow."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from shared.bus import Bus
from shared.errors import DeepFlowError
from tests.cache.hosts import SEGMENT_BYTES, SLOT_BYTES, Host, Writing, acquainted, pages, running
from tests.nats_server import NatsServer
from tests.scheduler.players import Te, eventually, status

NUM = 40  # pages: more than a segment holds, so more than one lease


@contextlib.asynccontextmanager
async def two(nats: NatsServer, bus: Bus, folder: Path, **env: str) -> AsyncIterator[list[Host]]:
    """The near and the far host; the far one has the chain \"a\", and the near one knows."""
    async with (
        running(nats, bus, folder / "near", **env) as near,
        running(nats, bus, folder / "far") as far,
    ):
        with Writing(far, "te-far") as te:
            await te.write(pages("a", NUM))
            await far.holds(pages("a", NUM), NUM)
            await acquainted(near, far, pages("a", NUM))
            yield [near, far]


async def nothing_is_left(*hosts: Host) -> None:
    """Waits until no lease is held and nothing is on its way, and the slots balance."""
    for host in hosts:

        async def at_rest(host: Host = host) -> bool:
            body = await host.ledger()
            names = ("leases", "leased_bytes", "tickets", "moving_pages", "moving_bytes")
            writing = [row["writing"] for row in body["arena"].values()]
            return not any(body[name] for name in names) and not any(writing)

        await eventually(at_rest, within_s=15)


async def test_pages_come_from_another_host(nats: NatsServer, bus: Bus, tmp_path: Path) -> None:
    """What only another host has is brought into the arena, bit for bit, and found here from then on; but not if
    computing it is faster, and the answer says why."""
    chain = pages("a", NUM)
    async with two(nats, bus, tmp_path) as (near, far):
        found = await near.populate(chain, page_us=50)
        assert (found.slots, found.ticket) == ([], "")
        assert f"compute; remote:{far.cache} {NUM} pages" in found.why
        found = await near.populate([*chain, *pages("b", 2)])
        assert found.ticket
        assert far.cache in found.why
        found = await near.query(found.ticket)
        assert (found.ticket, len(found.slots)) == ("", NUM)
        assert near.read(found.slots, chain) == NUM
        body = await near.status()
        assert body["decisions"][0]["outcome"] == "fetched"
        assert body["decisions"][0]["landed"] == NUM
        assert body["speeds"][f"remote:{far.cache}"]["mb_per_s"] > 0
        again = await near.populate(chain)
        assert (len(again.slots), again.ticket) == (NUM, "")
        await acquainted(far, near, chain)
        await nothing_is_left(near, far)


async def test_what_both_have_in_part_is_put_together(
    nats: NatsServer, bus: Bus, tmp_path: Path
) -> None:
    """Only what is missing here is fetched, from the middle of the chain on."""
    chain = pages("a", NUM)
    async with two(nats, bus, tmp_path) as (near, far):
        with Writing(near, "te-near") as te:
            await te.write(chain[:10])
            await near.holds(chain, 10)
            found = await near.fetched(chain)
            assert near.read(found.slots, chain) == NUM
            assert (await near.status())["decisions"][0]["landed"] == NUM - 10
            await nothing_is_left(near, far)


async def test_identical_fetches_are_one(nats: NatsServer, bus: Bus, tmp_path: Path) -> None:
    """Eight who ask at once for the same pages get them all, and they travel once."""
    chain = pages("a", NUM)
    async with two(nats, bus, tmp_path) as (near, far):
        asked = [near.fetched(chain[: NUM - n], te=f"te-{n}") for n in range(8)]
        for n, found in enumerate(await asyncio.gather(*asked)):
            assert near.read(found.slots, chain) == NUM - n
        await nothing_is_left(near, far)
        landed = await near.counter("deepflow_cache_fetched_pages_total", source="remote")
        assert landed == NUM


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


async def test_a_host_stopped_in_the_middle_of_a_transfer(
    nats: NatsServer, bus: Bus, tmp_path: Path
) -> None:
    """Whenever the holder is stopped during a fetch, what has come is whole, and the rest is given up in time."""
    chain = pages("a", NUM)
    async with two(nats, bus, tmp_path) as (near, far):
        for delay_s in (0.001, 0.003, 0.006):
            asking = asyncio.ensure_future(near.fetched(chain))
            await asyncio.sleep(delay_s)
            far.child.send_signal(signal.SIGSTOP)
            async with asyncio.timeout(15):
                found = await asking
            assert near.read(found.slots, chain) == len(found.slots)
            far.child.send_signal(signal.SIGCONT)
            await nothing_is_left(near)


async def test_a_service_killed_in_the_middle_of_a_fetch(
    nats: NatsServer, bus: Bus, tmp_path: Path
) -> None:
    """Its arena holds whole pages only, for whoever owns it next, and the other host gets its leases back."""
    chain = pages("a", NUM)
    async with running(nats, bus, tmp_path / "far") as far:
        with Writing(far, "te-far") as te:
            await te.write(chain)
            await far.holds(chain, NUM)
            for delay_s in (0.005, 0.03):
                async with running(nats, bus, tmp_path / "near") as near:
                    await acquainted(near, far, chain)
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
                    await acquainted(near, far, chain)
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


async def test_bytes_on_their_way_are_bounded(nats: NatsServer, bus: Bus, tmp_path: Path) -> None:
    """No more is fetched at once than the budget allows: the first pages come, the rest is left to be computed."""
    budget = {"DEEPFLOW_FETCH_BYTES": str(4 * SLOT_BYTES)}
    chain = pages("a", NUM)
    async with two(nats, bus, tmp_path, **budget) as (near, far):
        found = await near.fetched(chain)
        assert near.read(found.slots, chain) == 4
        found = await near.fetched(chain)
        assert near.read(found.slots, chain) == 8
        await nothing_is_left(near, far)


async def test_a_small_arena_takes_what_fits(nats: NatsServer, bus: Bus, tmp_path: Path) -> None:
    """A fetch larger than the arena ends when there is no room; what is said to be there is there."""
    chain = pages("a", NUM)
    async with two(nats, bus, tmp_path, DEEPFLOW_ARENA_BYTES=str(SEGMENT_BYTES)) as (near, far):
        found = await near.fetched(chain)
        assert near.read(found.slots, chain) == len(found.slots) < NUM
        await nothing_is_left(near, far)


async def test_a_device_that_has_the_pages_is_named(
    nats: NatsServer, bus: Bus, tmp_path: Path
) -> None:
    """Pages that only another TE's device has are read there by the asker itself, behind what the arena has."""
    chain = pages("a", 6)
    async with (
        running(nats, bus, tmp_path / "arena") as host,
        Te(bus, "te-a") as te,
    ):
        with Writing(host, "te-w") as writing:
            await writing.write(chain[:2])
            await host.holds(chain, 2)

            async def known() -> bool:
                return "te-a" in (await status(bus, "cache", host.cache))["tes"]

            await eventually(known)
            await te.change(chain[:5])

            async def named() -> bool:
                found = await host.populate(chain)
                return (len(found.slots), found.peer, found.peer_pages) == (2, "te-a", 5)

            await eventually(named)
            found = await host.populate(chain, te="te-a")  # not to itself
            assert found.peer == ""
            te.load["counters"] = {"peer_bytes": 1e6, "peer_seconds": 10.0}

            async def measured() -> bool:
                speeds = (await host.status())["speeds"]
                return bool(speeds.get("peer", {}).get("mb_per_s", 99) < 1)

            await eventually(measured)
            found = await host.populate(chain, page_us=100_000)
            assert found.peer == ""  # as slow as that, computing is faster


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
