"""The cache service as the directory alone, a real process on a real bus; the test plays the TEs with block events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest
import pytest_asyncio

from shared.bus import Bus
from shared.errors import Unavailable
from shared.messages import Down
from shared.rtc_messages import Match, Matched
from tests.cache.hosts import pages
from tests.nats_server import NatsServer
from tests.scheduler.players import MODEL, Te, eventually, process, status, wait_ready

NO_ARENA = {"DEEPFLOW_ARENA_BYTES": "off"}
pytestmark = [pytest.mark.service, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cache(shared_nats: NatsServer, shared_bus: Bus) -> AsyncIterator[str]:
    """A running cache; its id. Every test has TEs and pages of its own."""
    async with process("cache", shared_nats, **NO_ARENA) as (_, name):
        await wait_ready(shared_bus, "cache", name)
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


async def test_match_follows_the_events(shared_bus: Bus, cache: str) -> None:
    """Stored pages are matched, longest prefix first, removed ones no more, and other models see none of it."""
    chain = pages("a", 8)
    async with Te(shared_bus, "te-a1") as a, Te(shared_bus, "te-a2") as b:
        await synced(shared_bus, cache, "te-a1", "te-a2")
        await a.change(chain[:3])
        await b.change(chain[:5])
        await answered(shared_bus, chain, {"te-a2": 5, "te-a1": 3})
        assert list(await match(shared_bus, chain)) == ["te-a2", "te-a1"]
        await b.change([], chain[1:2])
        await answered(shared_bus, chain, {"te-a1": 3, "te-a2": 1})
        assert await match(shared_bus, chain, model="other") == {}
        assert await match(shared_bus, chain[7:]) == {}


async def test_a_gap_is_mended_by_a_dump(shared_bus: Bus, cache: str) -> None:
    """After a lost event the cache asks the TE for its whole index, and is right again."""
    chain = pages("b", 8)
    async with Te(shared_bus, "te-b1") as te:
        await synced(shared_bus, cache, "te-b1")
        before, gaps = te.num_dumps, (await status(shared_bus, "cache", cache))["gaps"]
        await te.change(chain[:2])
        await te.change([], chain[:1], lost=True)
        await te.change(chain[:1] + chain[2:4])
        await answered(shared_bus, chain, {"te-b1": 4})
        assert te.num_dumps == before + 1
        body = await status(shared_bus, "cache", cache)
        assert (body["gaps"], body["tes"]["te-b1"]) == (gaps + 1, 4)


async def test_events_during_a_dump_are_not_lost(shared_bus: Bus, cache: str) -> None:
    """What a TE says while its dump is under way is applied after it."""
    chain = pages("c", 8)
    async with Te(shared_bus, "te-c1") as te:
        te.dump_hold = asyncio.Event()
        await eventually(lambda: te.num_dumps == 1)
        await te.change(chain[:1])
        await te.change(chain[1:2])
        await shared_bus.flush()
        te.dump_hold.set()
        await answered(shared_bus, chain, {"te-c1": 2})
        assert te.num_dumps == 1


async def test_the_dead_hold_nothing(shared_bus: Bus, cache: str) -> None:
    """A TE declared down is gone at once, a silent one after a while."""
    chain = pages("d", 8)
    async with Te(shared_bus, "te-d1") as a:
        async with Te(shared_bus, "te-d2") as b:
            await synced(shared_bus, cache, "te-d1", "te-d2")
            await a.change(chain[:2])
            await b.change(chain[:2])
            await answered(shared_bus, chain, {"te-d1": 2, "te-d2": 2})
        await answered(shared_bus, chain, {"te-d1": 2})
    await shared_bus.publish(
        shared_bus.subjects.down("te", "te-d1"), Down(kind="te", id="te-d1", reason="x")
    )
    await answered(shared_bus, chain, {})


async def test_two_replicas_hold_the_same(
    shared_nats: NatsServer, shared_bus: Bus, cache: str
) -> None:
    """Every replica hears everything: whichever answers, the answer is the same."""
    chain = pages("f", 8)
    async with (
        Te(shared_bus, "te-f1") as te,
        process("cache", shared_nats, **NO_ARENA) as (_, second),
    ):
        await wait_ready(shared_bus, "cache", second)
        await te.change(chain[:4])
        for name in (cache, second):
            await synced(shared_bus, name, "te-f1")
        await answered(shared_bus, chain, {"te-f1": 4})
        for name in (cache, second):
            assert (await status(shared_bus, "cache", name))["tes"]["te-f1"] == 4


async def test_the_bus_restarts(shared_nats: NatsServer, shared_bus: Bus, cache: str) -> None:
    """Events lost in a bus outage are made good by dumps, although no later event shows the gap."""
    chain = pages("g", 8)
    async with Te(shared_bus, "te-g1") as te:
        await synced(shared_bus, cache, "te-g1")
        await te.change(chain[:2])
        await answered(shared_bus, chain, {"te-g1": 2})
        await te.change(chain[2:3], lost=True)
        await asyncio.to_thread(shared_nats.restart)
        await eventually(lambda: shared_bus.connected)

        async def mended() -> bool:
            try:
                return await match(shared_bus, chain) == {"te-g1": 3}
            except Unavailable:
                return False  # the cache itself is not back yet

        await eventually(mended)
