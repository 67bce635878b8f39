"""A gateway with a tiny model, and the peers it needs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from shared import catalog, subjects
from shared.bus import Bus
from shared.messages import ModelEntry
from shared.text.tokenizer import Tokenizer
from tests.gateway.peers import MODEL, Peers, publish_model
from tests.gateway.running import RunningGateway
from tests.gateway.tenants import KEYS, Caller
from tests.nats_server import NatsServer


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model cache with one tiny model."""
    path = tmp_path_factory.mktemp("cache")
    publish_model(path)
    return path


@pytest.fixture(scope="session")
def entry(cache: Path) -> ModelEntry:
    """The tiny model's entry in the catalogue."""
    return publish_model(cache)


@pytest.fixture(scope="session")
def tokenizer(cache: Path) -> Tokenizer:
    """The tiny model's tokenizer."""
    return Tokenizer.load(catalog.models_dir(cache) / subjects.encode(MODEL))


@pytest.fixture
async def peers(bus: Bus, tokenizer: Tokenizer, entry: ModelEntry) -> AsyncIterator[Peers]:
    """A JE, a TE, and the model in the catalogue."""
    await (await bus.table("models")).put(entry.name, entry)
    played = Peers(bus, tokenizer)
    await played.start()
    yield played
    await played.stop()


@pytest.fixture
async def gateway(nats: NatsServer, cache: Path, peers: Peers) -> AsyncIterator[RunningGateway]:
    """A keyless gateway on loopback."""
    running = RunningGateway(nats.url, cache)
    await running.start()
    yield running
    assert await running.stop() == 0


@pytest.fixture
async def http(gateway: RunningGateway) -> AsyncIterator[aiohttp.ClientSession]:
    """An HTTP client at the gateway."""
    async with aiohttp.ClientSession(gateway.url) as session:
        yield session


@pytest.fixture
async def start(
    nats: NatsServer, cache: Path, peers: Peers
) -> AsyncIterator[Callable[..., Awaitable[RunningGateway]]]:
    """Starts gateways with three tenants."""
    running: list[RunningGateway] = []

    async def one(**settings: Any) -> RunningGateway:
        gateway = RunningGateway(nats.url, cache, api_keys=KEYS, **settings)
        await gateway.start()
        running.append(gateway)
        return gateway

    yield one
    for gateway in running:
        assert await gateway.stop() == 0


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    """An HTTP client."""
    async with aiohttp.ClientSession() as made:
        yield made


@pytest.fixture
async def callers(
    start: Callable[..., Awaitable[RunningGateway]], session: aiohttp.ClientSession
) -> tuple[Caller, Caller, Caller]:
    """Alice, Bob and the operator at one gateway."""
    gateway = await start()
    alice, bob, operator = (Caller(session, gateway, who) for who in ("alice", "bob", "operator"))
    return alice, bob, operator
