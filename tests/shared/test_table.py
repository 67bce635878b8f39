"""Tables: parts that do not mix, and changes that nobody loses."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import nats as nats_client

from shared.bus import Bus
from shared.messages import ContextCache
from shared.table import heed_cancellation
from tests.nats_server import NatsServer

ENTRY = ContextCache(id="", tenant="t", model="m", name="", num_tokens=1, created=0, expires=1)


async def test_parts_do_not_mix(bus: Bus) -> None:
    """A part has keys of its own, and neither it nor the whole shows the other's entries."""
    table = await bus.table("caches")
    part = table.part("contents")
    await table.put("a.b", replace(ENTRY, id="1"))
    await part.put("a.b", replace(ENTRY, id="2"))
    await part.put("c", replace(ENTRY, id="3"))

    assert {key: one.id for key, one in (await table.all(ContextCache)).items()} == {"a.b": "1"}
    assert {key: one.id for key, one in (await part.all(ContextCache)).items()} == {
        "a.b": "2",
        "c": "3",
    }
    await part.delete("a.b")
    assert await part.get("a.b", ContextCache) is None
    found = await table.get("a.b", ContextCache)
    assert found is not None
    assert found.id == "1"


async def test_changes_at_once_all_count(bus: Bus) -> None:
    """Changes of one entry at the same time are made one after another; a missing entry stays missing."""
    table = await bus.table("caches")
    await table.put("a", ENTRY)

    changes = (
        table.change("a", ContextCache, lambda one: replace(one, requests=one.requests + 1))
        for _ in range(8)
    )
    await asyncio.gather(*changes)

    found = await table.get("a", ContextCache)
    assert found is not None
    assert found.requests == 8
    assert await table.change("b", ContextCache, lambda one: one) is None
    assert await table.get("b", ContextCache) is None


async def test_an_entry_is_replaced_only_where_it_is_what_one_thinks(bus: Bus) -> None:
    """By its revision, which is 0 where there is none, also after it was removed; else nothing is written."""
    table = await bus.table("caches")
    first = await table.replace("a", ENTRY, 0)
    assert first is not None
    assert await table.replace("a", replace(ENTRY, requests=1), 0) is None
    assert await table.look("a", ContextCache) == (ENTRY, first)
    second = await table.replace("a", replace(ENTRY, requests=2), first)
    assert second is not None
    assert second > first
    assert await table.replace("a", ENTRY, first) is None
    await table.delete("a")
    assert await table.replace("a", ENTRY, second) is None
    assert await table.replace("a", ENTRY, 0) is not None


async def test_the_longest_unwritten_comes_first(bus: Bus) -> None:
    """`all` gives entries in the order in which they were last written."""
    table = await bus.table("caches")
    for key in ("b", "a", "c", "b"):
        await table.put(key, ENTRY)

    assert list(await table.all(ContextCache)) == ["a", "c", "b"]


async def test_a_removed_entry_leaves_nothing(bus: Bus, nats: NatsServer) -> None:
    """What is removed is gone from the server too, and with it nothing else; its key is as good as new."""
    table = await bus.table("caches")
    for _ in range(3):
        for key in ("a", "a.b", "*"):
            assert await table.create(key, ENTRY)
        await table.delete("*")
        assert set(await table.all(ContextCache)) == {"a", "a.b"}
        await table.delete("a")
        await table.delete("a")
        assert set(await table.all(ContextCache)) == {"a.b"}
        assert await table.change("a", ContextCache, lambda one: one) is None
        await table.delete("a.b")
    client = await nats_client.connect(nats.url)
    name = bus.subjects.table("caches")
    assert (await client.jetstream().stream_info(f"KV_{name}")).state.messages == 0
    await client.close()


async def test_a_table_is_read_whole_while_others_change_it(bus: Bus, nats: NatsServer) -> None:
    """However often and at whatever moment it is read, what stays is seen; the server keeps nothing of its readers."""
    table = await bus.table("caches")
    kept = {str(number) for number in range(10)}
    for key in kept:
        await table.put(key, ENTRY)

    async def churn() -> None:
        while True:
            await table.create("comes and goes", ENTRY)
            await table.delete("comes and goes")
            heed_cancellation()

    async with asyncio.TaskGroup() as tasks:
        churning = tasks.create_task(churn())
        for _ in range(200):
            assert set(await table.all(ContextCache)) >= kept
        churning.cancel()
    client = await nats_client.connect(nats.url)
    jetstream, stream = client.jetstream(), f"KV_{bus.subjects.table('caches')}"
    async with asyncio.timeout(10):
        while (await jetstream.stream_info(stream)).state.consumer_count:
            await asyncio.sleep(0.1)
    await client.close()
