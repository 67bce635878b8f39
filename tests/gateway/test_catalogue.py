"""The table of models as one gateway reads it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import nats as nats_py
import pytest
from nats.aio.msg import Msg

from services.gateway.catalogue import Catalogue
from shared import log
from shared.bus import Bus
from shared.errors import ModelNotFound
from shared.messages import ModelEntry
from tests.nats_server import NatsServer


async def test_many_misses_at_once_share_a_reading(
    nats: NatsServer, bus: Bus, cache: Path, entry: ModelEntry
) -> None:
    """A crowd that asks for unknown models does not queue for the table one by one."""
    await (await bus.table("models")).put(entry.name, entry)
    catalogue = Catalogue(bus, cache, log.get(), lambda folder, version: None)
    num_readings = 0

    async def count(message: Msg) -> None:
        nonlocal num_readings
        num_readings += 1

    spy = await nats_py.connect(nats.url)
    await spy.subscribe("$JS.API.CONSUMER.CREATE.>", cb=count)
    await spy.flush()

    async def miss(name: str) -> None:
        with pytest.raises(ModelNotFound):
            await catalogue.find(name)

    await asyncio.gather(*(miss(f"unknown-{index}") for index in range(50)))
    await spy.flush()
    assert 1 <= num_readings <= 2
    assert (await catalogue.find(entry.name)).entry == entry
    await spy.close()
