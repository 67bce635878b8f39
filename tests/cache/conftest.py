"""Two hosts that the tests of a module share, where none of them harms either: starting one takes a second."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio

from shared.bus import Bus
from shared.config import BusSettings
from tests.cache.hosts import SEGMENT_BYTES, Host, running
from tests.nats_server import NatsServer

ROOM = {"DEEPFLOW_ARENA_BYTES": str(48 * SEGMENT_BYTES)}


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
async def near(
    shared_nats: NatsServer, shared_bus: Bus, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Host]:
    """A host with room for the pages of every test."""
    async with running(shared_nats, shared_bus, tmp_path_factory.mktemp("near"), **ROOM) as host:
        yield host


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def far(
    shared_nats: NatsServer, shared_bus: Bus, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Host]:
    """Another one."""
    async with running(shared_nats, shared_bus, tmp_path_factory.mktemp("far"), **ROOM) as host:
        yield host
