"""Fixtures every ring shares, and the rule that puts a test into its ring."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import structlog

# As a TE runs on two cores; read by the OpenMP runtime when torch is loaded, so it stands before the other imports.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from shared.bus import Bus
from shared.config import BusSettings
from tests.nats_server import NatsServer


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Rings: tests/system is `system`; a test with a bus or a server is `service`; the rest is `core`."""
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        marked = {mark.name for mark in item.iter_markers()}
        if marked & {"core", "service", "system"}:
            continue
        if "system" in Path(str(item.fspath)).parts:
            item.add_marker("system")
        elif fixtures & {"nats", "bus"}:
            item.add_marker("service")
        else:
            item.add_marker("core")


@pytest.fixture(autouse=True)
def _log_as_it_was() -> Iterator[None]:
    """A test that runs a command in this process has it log to a file that is closed afterwards."""
    yield
    structlog.reset_defaults()


@pytest.fixture
def nats(tmp_path: Path) -> Iterator[NatsServer]:
    """A fresh nats-server with JetStream."""
    server = NatsServer(tmp_path / "nats")
    server.start()
    yield server
    server.stop()


@pytest.fixture
async def bus(nats: NatsServer) -> AsyncIterator[Bus]:
    """A connection to the fresh server."""
    connection = await Bus.connect(BusSettings(url=nats.url, grace_s=5), name="test")
    yield connection
    await connection.close()


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of smollm2-135m, pulled once into the test cache."""
    from deepflow.models.pull import pull

    return pull("smollm2-135m", test_cache()).path


def test_cache() -> Path:
    """Where tests keep what is expensive to make again: `DEEPFLOW_CACHE`, or a folder of the checkout git ignores."""
    return Path(os.environ.get("DEEPFLOW_CACHE") or Path(__file__).parents[1] / ".cache")


test_cache.__test__ = False  # type: ignore[attr-defined]  # a name pytest would take for a test
