"""A gateway with a tiny model, and the peers it needs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from shared import catalog, subjects
from shared.bus import Bus
from shared.messages import ModelEntry
from shared.text.tokenizer import Tokenizer
from tests.gateway.peers import MODEL, Peers, publish_model
from tests.gateway.running import RunningGateway
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
