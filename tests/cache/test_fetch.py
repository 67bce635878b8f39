"""Pages that are found in a host's own arena, brought from another host's over DistFlow, or left where they are."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from shared.bus import Bus
from shared.rtc_messages import Match, Matched
from tests.cache.hosts import (
    SEGMENT_BYTES,
    SLOT_BYTES,
    Host,
    Writing,
    acquainted,
    nothing_is_left,
    pages,
    running,
)
from tests.nats_server import NatsServer
from tests.scheduler.players import MODEL, Te, eventually, status

NUM = 40  # pages: more than a segment holds, so more than one lease
NUM_STOPS = 100 if os.environ.get("DEEPFLOW_SOAK") else 2
pytestmark = [pytest.mark.service, pytest.mark.asyncio(loop_scope="module")]


async def chain_at(far: Host, *askers: Host, name: str, num_pages: int = NUM) -> list[bytes]:
    """A chain that is in the far arena, and the askers know."""
    chain = pages(name, num_pages)
    with Writing(far, f"te-{name}") as te:
        await te.write(chain)
        await far.holds(chain, num_pages)
    for host in askers:
        await acquainted(host, far)
    return chain


async def test_what_a_te_writes_is_found_by_others(shared_bus: Bus, near: Host) -> None:
    """Pages that were written and committed are found, read back bit for bit, matched, and counted."""
    chain = pages("written", 5)
    before = await near.counter("deepflow_cache_pages_total", event="committed")
    with Writing(near, "te-1") as te:
        assert (await near.populate(chain)).slots == []
        assert await te.write(chain[:3]) == 3
        await near.holds(chain, 3)
        assert await te.write(chain) == 2  # the others are there
        await near.holds(chain, 5)
    question = Match(model=MODEL, hashes=chain)
    subject = shared_bus.subjects.rtc("match")
    matched = await shared_bus.request(subject, question, Matched, timeout_s=5)
    assert [(h.te, h.num_pages, h.tier, h.host) for h in matched.holders] == [
        (near.cache, 5, "host", near.name)
    ]
    dump = await near.dump()
    assert set(chain) <= set(dump.hashes)
    assert dump.tier == "host"
    (row,) = (await near.ledger())["arena"].values()
    assert (row["cached"], row["writing"]) == (len(dump.hashes), 0)
    slots = await near.counter("deepflow_cache_arena_slots", state="cached")
    assert slots == len(dump.hashes)
    assert await near.counter("deepflow_cache_pages_total", event="committed") == before + 5


async def test_what_is_computed_faster_is_not_loaded(near: Host) -> None:
    """A TE that computes a page faster than it loads one is told to, and why."""
    chain = pages("fast", 3)
    with Writing(near, "te-1") as te:
        await te.write(chain)
        await near.holds(chain, 3)
        found = await near.populate(chain, page_us=10, load_us=11)
        assert (found.slots, found.ticket) == ([], "")
        assert "compute" in found.why
        decisions = (await near.status())["decisions"]
        assert decisions[0]["why"] == found.why
        assert decisions[0]["outcome"] == "nothing"


async def test_pages_come_from_another_host(near: Host, far: Host) -> None:
    """What only another host has is brought into the arena, bit for bit, and found here from then on; but not if
    computing it is faster, and the answer says why."""
    chain = await chain_at(far, near, name="come")
    found = await near.populate(chain, page_us=50)
    assert (found.slots, found.ticket) == ([], "")
    assert f"compute; remote:{far.cache} {NUM} pages" in found.why
    found = await near.populate([*chain, *pages("nowhere", 2)])
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
    await acquainted(far, near)
    await nothing_is_left(near, far)


async def test_what_both_have_in_part_is_put_together(near: Host, far: Host) -> None:
    """Only what is missing here is fetched, from the middle of the chain on."""
    chain = await chain_at(far, near, name="part")
    with Writing(near, "te-near") as te:
        await te.write(chain[:10])
        await near.holds(chain, 10)
        found = await near.fetched(chain)
        assert near.read(found.slots, chain) == NUM
        assert (await near.status())["decisions"][0]["landed"] == NUM - 10
        await nothing_is_left(near, far)


async def test_identical_fetches_are_one(near: Host, far: Host) -> None:
    """Eight who ask at once for the same pages get them all, and they travel once."""
    chain = await chain_at(far, near, name="same")
    before = await near.counter("deepflow_cache_fetched_pages_total", source="remote")
    asked = [near.fetched(chain[: NUM - n], te=f"te-{n}") for n in range(8)]
    for n, found in enumerate(await asyncio.gather(*asked)):
        assert near.read(found.slots, chain) == NUM - n
    await nothing_is_left(near, far)
    landed = await near.counter("deepflow_cache_fetched_pages_total", source="remote")
    assert landed - before == NUM


async def test_bytes_on_their_way_are_bounded(
    shared_nats: NatsServer, shared_bus: Bus, tmp_path: Path, far: Host
) -> None:
    """No more is fetched at once than the budget allows: the first pages come, the rest is left to be computed."""
    budget = {"DEEPFLOW_FETCH_BYTES": str(4 * SLOT_BYTES)}
    async with running(shared_nats, shared_bus, tmp_path / "arena", **budget) as host:
        chain = await chain_at(far, host, name="bounded")
        found = await host.fetched(chain)
        assert host.read(found.slots, chain) == 4
        found = await host.fetched(chain)
        assert host.read(found.slots, chain) == 8
        await nothing_is_left(host, far)


async def test_a_small_arena_takes_what_fits_and_its_segments_go_round(
    shared_nats: NatsServer, shared_bus: Bus, tmp_path: Path, far: Host
) -> None:
    """A fetch ends when there is no more room, and what is said to be there is there. A TE gets room from the service,
    also if that has nothing more to write, and a fetch from a TE that has all of it."""
    small = {"DEEPFLOW_ARENA_BYTES": str(2 * SEGMENT_BYTES)}
    async with running(shared_nats, shared_bus, tmp_path / "arena", **small) as host:
        chain = await chain_at(far, host, name="small")
        found = await host.fetched(chain)
        assert 0 < host.read(found.slots, chain) == len(found.slots) < NUM
        await nothing_is_left(host, far)
        with Writing(host, "te-greedy") as te:

            async def has_room() -> bool:
                return await te.write(pages("greedy", 4)) > 0

            await eventually(has_room)
            turn = 0

            async def is_fetched() -> bool:
                nonlocal turn
                turn += 1
                await te.write(pages(f"greedy{turn}", 16))
                found = await host.fetched(chain)
                return len(found.slots) == host.read(found.slots, chain) > 0

            await eventually(is_fetched)
            await nothing_is_left(host, far)


async def test_a_device_that_has_the_pages_is_named(shared_bus: Bus, near: Host) -> None:
    """Pages that only another TE's device has are read there by the asker itself, behind what the arena has."""
    chain = pages("device", 6)
    async with Te(shared_bus, "te-a") as te:
        with Writing(near, "te-w") as writing:
            await writing.write(chain[:2])
            await near.holds(chain, 2)

        async def known() -> bool:
            return "te-a" in (await status(shared_bus, "cache", near.cache))["tes"]

        await eventually(known)
        await te.change(chain[:5])

        async def named() -> bool:
            found = await near.populate(chain)
            return (len(found.slots), found.peer, found.peer_pages) == (2, "te-a", 5)

        await eventually(named)
        found = await near.populate(chain, te="te-a")  # not to itself
        assert found.peer == ""
        te.load["counters"] = {"peer_bytes": 1e6, "peer_us": 10e6}

        async def measured() -> bool:
            speeds = (await near.status())["speeds"]
            return bool(speeds.get("peer", {}).get("mb_per_s", 99) < 1)

        await eventually(measured)
        found = await near.populate(chain, page_us=100_000)
        assert found.peer == ""  # as slow as that, computing is faster


async def test_a_host_stopped_in_the_middle_of_a_transfer(near: Host, far: Host) -> None:
    """Whenever the holder is stopped during a fetch, what has come is whole, and the rest is given up in time."""
    for turn in range(NUM_STOPS):
        chain = await chain_at(far, name=f"stop{turn}")

        async def offered(chain: list[bytes] = chain) -> bool:
            return far.cache in (await near.populate(chain, page_us=50)).why

        await eventually(offered)  # it is heard of again, and not avoided any more
        asking = asyncio.ensure_future(near.fetched(chain))
        await asyncio.sleep(0.002 + 0.004 * turn % 0.01)
        far.child.send_signal(signal.SIGSTOP)
        async with asyncio.timeout(15):
            found = await asking
        assert near.read(found.slots, chain) == len(found.slots)
        far.child.send_signal(signal.SIGCONT)
        await nothing_is_left(near)  # the far host has a lease whose grant was not heard, perhaps
