"""The work queue on a real nats-server: what is put in stays until somebody is done with it."""

from __future__ import annotations

import asyncio

import pytest

from shared import queue as queue_module
from shared.bus import Bus
from shared.config import BusSettings
from shared.errors import Overloaded
from shared.job_messages import JobCall
from tests.nats_server import NatsServer

LEASE_S = 0.5


async def test_an_entry_is_taken_once_and_leaves_when_it_is_done(bus: Bus) -> None:
    """Of two takers one gets the entry; done, it never comes again."""
    queue = await bus.work_queue(LEASE_S)
    other = await bus.work_queue(LEASE_S)
    await queue.put("batch", "j1", JobCall(id="j1"))

    taken = [await one.take("batch", JobCall, 0.2) for one in (queue, other)]

    [entry] = [one for one in taken if one is not None]
    assert entry.message == JobCall(id="j1")
    await entry.done()
    assert await other.take("batch", JobCall, 0.7) is None


async def test_an_entry_whose_taker_fell_silent_goes_to_the_next(bus: Bus) -> None:
    """Held it stays, beyond one lease; not held any more it is taken by another."""
    queue = await bus.work_queue(LEASE_S)
    other = await bus.work_queue(LEASE_S)
    await queue.put("batch", "j1", JobCall(id="j1"))
    entry = await queue.take("batch", JobCall, 1.0)
    assert entry is not None
    for _ in range(4):
        await entry.hold()
        assert await other.take("batch", JobCall, 0.2) is None

    again = await other.take("batch", JobCall, 3.0)

    assert again is not None
    await again.done()


async def test_a_released_entry_comes_back_when_it_is_wanted(bus: Bus) -> None:
    """Released for later, it is not there at first, and then is."""
    queue = await bus.work_queue(LEASE_S)
    await queue.put("batch", "j1", JobCall(id="j1"))
    entry = await queue.take("batch", JobCall, 1.0)
    assert entry is not None

    await entry.release(0.5)

    assert await queue.take("batch", JobCall, 0.2) is None
    assert await queue.take("batch", JobCall, 2.0) is not None


async def test_there_is_one_entry_of_an_id_until_it_is_done(bus: Bus) -> None:
    """Putting a job again adds nothing, also while somebody has it in hand; once it is done, it does."""
    queue = await bus.work_queue(LEASE_S)
    for _ in range(3):
        await queue.put("batch", "j1", JobCall(id="j1"))
    entry = await queue.take("batch", JobCall, 1.0)
    assert entry is not None
    await queue.put("batch", "j1", JobCall(id="j1"))
    await entry.done()
    assert await queue.take("batch", JobCall, 0.2) is None

    await queue.put("batch", "j1", JobCall(id="j1"))
    assert await queue.take("batch", JobCall, 1.0) is not None


async def test_kinds_do_not_mix(bus: Bus) -> None:
    """A taker of one kind never sees another's entries."""
    queue = await bus.work_queue(LEASE_S)
    await queue.put("batch", "b", JobCall(id="b"))
    await queue.put("predictor", "p", JobCall(id="p"))

    predictor = await queue.take("predictor", JobCall, 1.0)
    batch = await queue.take("batch", JobCall, 1.0)

    assert predictor is not None
    assert batch is not None
    assert (predictor.message.id, batch.message.id) == ("p", "b")
    assert await queue.take("predictor", JobCall, 0.2) is None


async def test_a_full_queue_says_so(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    """Past its bound the queue refuses, and loses nothing that is in it."""
    monkeypatch.setattr(queue_module, "MAX_ENTRIES", 2)
    queue = await bus.work_queue(LEASE_S)
    for id_ in ("a", "b"):
        await queue.put("batch", id_, JobCall(id=id_))

    with pytest.raises(Overloaded):
        await queue.put("batch", "c", JobCall(id="c"))

    found = [await queue.take("batch", JobCall, 1.0) for _ in range(2)]
    assert [one.message.id for one in found if one is not None] == ["a", "b"]


async def test_entries_survive_a_killed_server(nats: NatsServer) -> None:
    """kill -9 of nats-server loses no entry, and a taker on the same connection goes on."""
    bus = await Bus.connect(BusSettings(url=nats.url, grace_s=5), name="test")
    try:
        queue = await bus.work_queue(LEASE_S)
        await queue.put("batch", "j1", JobCall(id="j1"))
        assert await queue.take("batch", JobCall, 1.0) is not None
        lost = asyncio.Event()
        bus.on_disconnect(lost.set)
        back = asyncio.Event()
        bus.on_reconnect(back.set)
        await asyncio.to_thread(nats.kill)
        await lost.wait()
        await asyncio.to_thread(nats.start)
        await back.wait()

        entry = None
        while entry is None:
            entry = await queue.take("batch", JobCall, 1.0)

        assert entry.message.id == "j1"
        await entry.done()
    finally:
        await bus.close()
