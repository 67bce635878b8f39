"""Two hosts that the peaceful tests of a module share: each started service costs a second."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio

from shared.bus import Bus
from shared.config import BusSettings
from tests.cache.hosts import SEGMENT_BYTES, Host, running
from tests.nats_server import NatsServer


@pytest.fixture(scope="module")
def shared_nats(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    """A nats-server for all tests of a module."""
    server = NatsServer(tmp_path_factory.mktemp("nats"))
    server.start()
    yield server
    server.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_bus(shared_nats: NatsServer) -> AsyncIterator[Bus]:
    """A connection to it."""
    connection = await Bus.connect(BusSettings(url=shared_nats.url, grace_s=5), name="test")
    yield connection
    await connection.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def hosts(
    shared_nats: NatsServer, shared_bus: Bus, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[Host, Host]]:
    """The near and the far host, with room for the pages of every test."""
    room = {"DEEPFLOW_ARENA_BYTES": str(48 * SEGMENT_BYTES)}
    async with contextlib.AsyncExitStack() as stack:
        starting = [
            stack.enter_async_context(
                running(shared_nats, shared_bus, tmp_path_factory.mktemp(name) / "arena", **room)
            )
            for name in ("near", "far")
        ]
        near, far = await asyncio.gather(*starting)
        yield near, far
