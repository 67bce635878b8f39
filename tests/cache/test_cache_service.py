"""The cache service as the directory alone, a real process on a real bus; the test plays the TEs with block events."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Sequence

import pytest

from shared.bus import Bus
from shared.errors import Unavailable
from shared.messages import Down, Match, Matched
from tests.nats_server import NatsServer
from tests.scheduler.players import MODEL, Te, eventually, process, status, wait_ready

PAGES = [bytes([n]) * 16 for n in range(8)]
NO_ARENA = {"DEEPFLOW_ARENA_BYTES": "off"}


@pytest.fixture
async def cache(nats: NatsServer, bus: Bus) -> AsyncIterator[str]:
    """A running cache; its id."""
    async with process("cache", nats, **NO_ARENA) as (_, name):
        await wait_ready(bus, "cache", name)
        yield name


async def match(bus: Bus, pages: Sequence[bytes], model: str = MODEL) -> dict[str, int]:
    """Who holds how many of the first pages."""
    question = Match(model=model, hashes=list(pages))
    matched = await bus.request(bus.subjects.rtc("match"), question, Matched, timeout_s=5)
    return {holder.te: holder.num_pages for holder in matched.holders}


async def answered(bus: Bus, pages: Sequence[bytes], expected: dict[str, int]) -> None:
    """Waits until the cache gives this answer."""

    async def holds() -> bool:
        return await match(bus, pages) == expected

    await eventually(holds)


async def synced(bus: Bus, cache: str, *tes: str) -> None:
    """Waits until these TEs are in step with the cache."""

    async def holds() -> bool:
        body = await status(bus, "cache", cache)
        return set(tes) <= body["tes"].keys() and not body["unsynced"]

    await eventually(holds)


async def test_match_follows_the_events(bus: Bus, cache: str) -> None:
    """Stored pages are matched, longest prefix first, removed ones no more, and other models see none of it."""
    async with Te(bus, "te-a") as a, Te(bus, "te-b") as b:
        await synced(bus, cache, "te-a", "te-b")
        await a.change(PAGES[:3])
        await b.change(PAGES[:5])
        await answered(bus, PAGES, {"te-b": 5, "te-a": 3})
        assert list(await match(bus, PAGES)) == ["te-b", "te-a"]
        await b.change([], PAGES[1:2])
        await answered(bus, PAGES, {"te-a": 3, "te-b": 1})
        assert await match(bus, PAGES, model="other") == {}
        assert await match(bus, PAGES[7:]) == {}


async def test_a_gap_is_mended_by_a_dump(bus: Bus, cache: str) -> None:
    """After a lost event the cache asks the TE for its whole index, and is right again."""
    async with Te(bus, "te-a") as te:
        await synced(bus, cache, "te-a")
        before = te.num_dumps
        await te.change(PAGES[:2])
        await te.change([], PAGES[:1], lost=True)
        await te.change(PAGES[:1] + PAGES[2:4])
        await answered(bus, PAGES, {"te-a": 4})
        assert te.num_dumps == before + 1
        body = await status(bus, "cache", cache)
        assert (body["gaps"], body["pages"]) == (1, 4)


async def test_events_during_a_dump_are_not_lost(bus: Bus, cache: str) -> None:
    """What a TE says while its dump is under way is applied after it."""
    async with Te(bus, "te-a") as te:
        te.dump_hold = asyncio.Event()
        await eventually(lambda: te.num_dumps == 1)
        await te.change(PAGES[:1])
        await te.change(PAGES[1:2])
        await bus.flush()
        te.dump_hold.set()
        await answered(bus, PAGES, {"te-a": 2})
        assert te.num_dumps == 1


async def test_the_dead_hold_nothing(bus: Bus, cache: str) -> None:
    """A TE declared down is gone at once, a silent one after a while."""
    async with Te(bus, "te-a") as a:
        async with Te(bus, "te-b") as b:
            await synced(bus, cache, "te-a", "te-b")
            await a.change(PAGES[:2])
            await b.change(PAGES[:2])
            await answered(bus, PAGES, {"te-a": 2, "te-b": 2})
        await answered(bus, PAGES, {"te-a": 2})
    await bus.publish(bus.subjects.down("te", "te-a"), Down(kind="te", id="te-a", reason="x"))
    await answered(bus, PAGES, {})


async def test_a_restarted_cache_rebuilds_from_dumps(nats: NatsServer, bus: Bus) -> None:
    """A cache that starts when TEs have pages already answers rightly from its first answer on; SIGTERM ends it."""
    async with Te(bus, "te-a") as te:
        for _ in range(2):
            async with process("cache", nats, **NO_ARENA) as (child, name):
                await wait_ready(bus, "cache", name)
                assert await match(bus, PAGES) == ({"te-a": te.seq} if te.seq else {})
                await te.change([PAGES[te.seq]])
                await te.change([PAGES[te.seq]])
                await answered(bus, PAGES, {"te-a": te.seq})
                if te.seq == 2:
                    child.kill()
                else:
                    child.send_signal(signal.SIGTERM)
                    assert await asyncio.wait_for(child.wait(), 10) == 0
    with pytest.raises(Unavailable):
        await match(bus, PAGES)


async def test_two_replicas_hold_the_same(nats: NatsServer, bus: Bus, cache: str) -> None:
    """Every replica hears everything: whichever answers, the answer is the same."""
    async with Te(bus, "te-a") as te, process("cache", nats, **NO_ARENA) as (_, second):
        await wait_ready(bus, "cache", second)
        await te.change(PAGES[:4])
        for name in (cache, second):
            await synced(bus, name, "te-a")
        await answered(bus, PAGES, {"te-a": 4})
        for name in (cache, second):
            assert (await status(bus, "cache", name))["tes"] == {"te-a": 4}


async def test_the_bus_restarts(nats: NatsServer, bus: Bus, cache: str) -> None:
    """Events lost in a bus outage are made good by dumps, although no later event shows the gap."""
    async with Te(bus, "te-a") as te:
        await synced(bus, cache, "te-a")
        await te.change(PAGES[:2])
        await answered(bus, PAGES, {"te-a": 2})
        await te.change(PAGES[2:3], lost=True)
        await asyncio.to_thread(nats.restart)
        await eventually(lambda: bus.connected)

        async def mended() -> bool:
            try:
                return await match(bus, PAGES) == {"te-a": 3}
            except Unavailable:
                return False  # the cache itself is not back yet

        await eventually(mended)
