"""The entries that a worker keeps in the bus's tables, on a real bus."""

from __future__ import annotations

import asyncio

from services.worker.registrar import Registrar
from shared import log
from shared.bus import Bus
from shared.messages import Registration


def entry(name: str) -> Registration:
    return Registration(kind="te", id=name, host="here", pid=1)


async def test_what_is_removed_while_entries_are_written_stays_removed(bus: Bus) -> None:
    """A removal in the middle of a round of writing is not undone by the rest of that round."""
    registrar = Registrar(bus, log.get())
    table = await bus.table("registrations")
    for name in ("first", "second", "gone"):
        registrar.put("registrations", name, entry(name))
    keeping = asyncio.create_task(registrar.keep())
    await asyncio.sleep(0)  # its round has begun
    await registrar.remove("registrations", "gone")
    async with asyncio.timeout(10):
        while (left := set(await table.all(Registration))) < {"first", "second"}:
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.1)
    left = set(await table.all(Registration))
    keeping.cancel()
    assert left == {"first", "second"}
