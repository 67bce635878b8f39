"""The broker by itself: tiers in memory, and another host that does as it is told."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

from services.cache.directory import Directory
from services.cache.exchange import Batch
from services.cache.host import Page
from services.cache.populate import Broker
from shared.arena.segment import PageKind
from shared.errors import NotFound
from shared.rtc_messages import BlockEvents, Populate, Populated, QueryPopulate, Slot
from tests.cache.hosts import RECIPE, pages
from tests.scheduler.players import MODEL

SLOT_BYTES = 64
FAR = "cache-far"


@dataclass
class Memory:
    """Tiers with room for so many pages."""

    room: int = 1000
    name: str = "here"
    held: dict[bytes, int] = field(default_factory=dict)

    async def find(self, kind: PageKind, hashes: Sequence[bytes]) -> list[Slot]:
        """The longest prefix."""
        slots: list[Slot] = []
        for page in hashes:
            if page not in self.held:
                break
            slots.append(Slot(segment="s", index=self.held[page], generation=1))
        return slots

    async def write(self, kind: PageKind, pages: Sequence[Page]) -> list[bytes]:
        """As many as there is room for."""
        stored = [page for page, _ in pages][: self.room - len(self.held)]
        self.held.update((page, len(self.held) + n) for n, page in enumerate(stored))
        return stored

    async def read_ssd(self, kind: PageKind, hashes: Sequence[bytes]) -> list[Page]:
        """There is none."""
        return []


@dataclass
class Far:
    """Another host's arena that has everything, once `before` has returned."""

    before: Callable[[], Awaitable[object]]
    num_reads: int = 0

    async def read(
        self, cache: str, kind: PageKind, hashes: list[bytes], timeout_s: float
    ) -> Batch:
        """All of it at once."""
        self.num_reads += 1
        await self.before()
        return Batch([(page, np.zeros(SLOT_BYTES, np.uint8)) for page in hashes], start_s=0.0)

    async def forget(self, cache: str) -> None:
        """Nothing is kept."""


def broker(memory: Memory, far: Far, tasks: asyncio.TaskGroup, chain: list[bytes]) -> Broker:
    """A broker that knows of the far host's pages."""
    directory = Directory(max_bytes=1 << 20)
    directory.owns(FAR, "there")
    directory.apply(BlockEvents(te=FAR, model=MODEL, seq=1, stored=chain, tier="host"))
    return Broker(
        name="cache-near",
        host=memory,
        remote=far,
        directory=directory,
        tasks=tasks,
        max_bytes=1 << 20,
    )


def ask(chain: list[bytes]) -> Populate:
    """For all of it, at once."""
    return Populate(
        te="te-1",
        model=MODEL,
        recipe=RECIPE,
        slot_bytes=SLOT_BYTES,
        hashes=chain,
        page_us=1_000_000,
        load_us=1,
    )


async def answer(broker: Broker, chain: list[bytes]) -> Populated:
    """The answer once nothing more will come."""
    found = await broker.populate(ask(chain))
    if found.ticket:
        found = await broker.query(QueryPopulate(ticket=found.ticket, wait_ms=10_000))
    assert not found.ticket
    assert (broker.num_bytes, broker.num_moving, broker.num_tickets) == (0, 0, 0)
    return found


async def nothing() -> None:
    """At once."""


async def test_a_fetch_from_a_holder_that_dies_ends_at_once() -> None:
    """Who is declared dead in the middle is waited for no longer, whatever it was asked."""
    chain = pages("a", 3)
    reading = asyncio.Event()

    async def never() -> None:
        reading.set()
        await asyncio.Event().wait()

    async with asyncio.TaskGroup() as tasks:
        near = broker(Memory(), Far(never), tasks, chain)
        answering = tasks.create_task(answer(near, chain))
        await reading.wait()
        await near.gone(FAR)
        async with asyncio.timeout(1):  # the fetch's own limit is three seconds and more
            assert (await answering).slots == []
    assert near.outcomes == {"failed": 1}


async def test_a_mistake_of_ours_costs_a_fetch_and_no_more(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Whatever a fetch raises is its end, and is told; what is here is served as before."""
    chain = pages("a", 3)

    async def fail() -> None:
        raise ZeroDivisionError

    async with asyncio.TaskGroup() as tasks:
        memory = Memory(held={chain[0]: 7})
        near = broker(memory, Far(fail), tasks, chain)
        assert len((await answer(near, chain)).slots) == 1
        assert len((await answer(near, chain[:1])).slots) == 1
    assert "ZeroDivisionError" in "".join(capfd.readouterr())


async def test_nothing_is_fetched_for_which_there_was_no_room() -> None:
    """After a fetch that did not fit, the next questions are answered with what is here, and nothing travels."""
    chain = pages("a", 6)
    async with asyncio.TaskGroup() as tasks:
        far = Far(nothing)
        near = broker(Memory(room=4), far, tasks, chain)
        for _ in range(3):
            assert len((await answer(near, chain)).slots) == 4
        assert far.num_reads == 1


async def test_a_waiter_that_leaves_takes_nothing_with_it() -> None:
    """Of two who wait for one fetch one is cancelled: the other has its pages, and a ticket is good but once."""
    chain = pages("a", 3)
    go = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        far = Far(go.wait)
        near = broker(Memory(), far, tasks, chain)
        first, second = [await near.populate(ask(chain)) for _ in range(2)]
        assert first.ticket
        assert second.ticket not in ("", first.ticket)
        waiting = [
            asyncio.ensure_future(near.query(QueryPopulate(ticket=found.ticket, wait_ms=10_000)))
            for found in (first, second)
        ]
        await asyncio.sleep(0)
        waiting[0].cancel()
        await asyncio.wait(waiting[:1])
        go.set()
        assert len((await waiting[1]).slots) == 3
        assert far.num_reads == 1
        with pytest.raises(NotFound):
            await near.query(QueryPopulate(ticket=second.ticket))
        found = await near.query(QueryPopulate(ticket=first.ticket))  # asked again after all
        assert (len(found.slots), found.ticket) == (3, "")
        assert near.num_tickets == 0
    assert near.outcomes == {"fetched": 2}
