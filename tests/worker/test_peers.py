"""Leases and reads between two engines: real ones over a tiny model, a real bus, and DistFlow over loopback."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from services.worker.flowserve.decoder import Movable
from services.worker.flowserve.engine import Engine
from services.worker.linking import Linking
from services.worker.loading import make_engine
from services.worker.loop import EngineLoop, Report
from services.worker.peers import LEASE_S, Peers
from services.worker.pulse import Pulse
from services.worker.settings import TeSettings
from shared import blockhash
from shared.bus import Bus
from shared.catalog import open_model
from shared.config import BusSettings
from shared.distflow.flow import DistFlow
from shared.errors import DeepFlowError, InvalidRequest, NotFound, Unavailable
from shared.messages import Request, Sampling
from shared.rtc_messages import Leased, LeaseRelease, LeaseReleased, LeaseRequest
from tests.nats_server import NatsServer
from tests.worker.peers import MODEL, make_model

PAGE = 16
ROOT = b"root"
PROMPT = [3 + (5 * i) % 400 for i in range(40 * PAGE + 5)]
HASHES = blockhash.chain(ROOT, PROMPT, PAGE)
RECIPE = "recipe-0"


class Side:
    """One TE without its shell: an engine, its thread, its end of DistFlow, and its peers."""

    def __init__(self, name: str, bus: Bus, cache: Path, dtype: str) -> None:
        env = {
            "DEEPFLOW_HOME": str(cache),
            "DEEPFLOW_CACHE": str(cache),
            "DEEPFLOW_TE_MODEL": MODEL,
            "DEEPFLOW_TE_POD": "pod-1",
            "DEEPFLOW_DTYPE": dtype,
            "DEEPFLOW_KV_TOKENS": "2048",
            "DEEPFLOW_THREADS": "1",
        }
        folder, settings = open_model(cache, MODEL), TeSettings.load(env)
        self.name = name
        self.bus = bus
        self.reports: list[Report] = []
        self.news = asyncio.Event()
        self.loop = EngineLoop(
            lambda wake: make_engine(folder, settings, wake), self._deliver, Pulse()
        )
        self.linking = Linking(bus, name, fabric="127.0.0.1", directory=cache / "arena")
        self.peers = Peers(bus, self.loop, self.linking, model=MODEL, recipe=RECIPE)
        self.engine: Engine | None = None

    async def open(self) -> None:
        await self.linking.open()
        self.loop.start()
        self.engine = await self.loop.ready
        self.peers.serve(self.engine)
        await self.bus.flush()  # the other side asks over a connection of its own

    async def close(self) -> None:
        await self.loop.stop()
        await self.linking.close()
        assert self.engine is not None
        self.engine.check()

    def _deliver(self, report: Report) -> None:
        self.reports.append(report)
        self.news.set()

    async def compute(self, name: str, prompt: list[int]) -> None:
        """Have the pages of a prompt computed."""
        request = Request(
            request=name,
            attempt=0,
            client="gateway-1",
            model=MODEL,
            tenant="t",
            prompt=prompt,
            root=ROOT,
            hashes=[],
            sampling=Sampling(max_tokens=1, seed=0, temperature=0.0, ignore_eos=True),
            deadline_ms=60_000,
            park_ms=0,
        )

        def submit(engine: Engine, _: Report) -> None:
            engine.submit(request)
            for want in engine.take_wants():  # there is nobody to ask here
                engine.ready(want.request, want.attempt)

        self.loop.post(submit)
        async with asyncio.timeout(20):
            while not any(e.request == name for report in self.reports for e in report.ended):
                self.news.clear()
                await self.news.wait()

    def pages(self) -> np.ndarray:
        """The bytes of the pages of PROMPT, [pages, bytes], taken while they are leased."""
        assert self.engine is not None
        decoder = self.engine.decoder
        assert isinstance(decoder, Movable)
        lease = self.engine.lease(HASHES, "test", 5.0)  # nothing else runs: any thread will do
        assert lease is not None
        pages = decoder.read_blocks(lease.blocks)
        assert self.engine.release(lease.id)
        return pages

    async def leased(self) -> int:
        """Blocks that are held for others."""
        ledger = await self.loop.ask(lambda engine, _: engine.ledger())
        number = ledger["leased"]
        assert isinstance(number, int)
        return number


@pytest.fixture(params=["w8a8", "fp32"], ids=["addressable", "staged"])
async def sides(
    nats: NatsServer, tmp_path: Path, request: pytest.FixtureRequest
) -> AsyncIterator[tuple[Side, Side]]:
    """A TE that has the pages of PROMPT, and another one; at the end nothing is held, and both ledgers balance.

    Native kernels work on memory that peers read as it is, those of torch on memory of which they get copies."""
    make_model(tmp_path)
    buses = [
        await Bus.connect(BusSettings(url=nats.url, grace_s=1), name=name)
        for name in ("one", "two")
    ]
    one, two = (Side(bus._inbox, bus, tmp_path, request.param) for bus in buses)
    await one.open()
    await two.open()
    await one.compute("a", PROMPT)
    yield one, two
    assert await one.leased() == 0
    await one.close()
    await two.close()
    for bus in buses:
        await bus.close()


async def test_what_is_read_is_what_the_peer_holds(sides: tuple[Side, Side]) -> None:
    """Pages that a peer has come over byte for byte, as far as it has them, and its lease is over afterwards."""
    one, two = sides
    hashes = [*HASHES, *blockhash.chain(HASHES[-1], [7] * 64, PAGE)]  # four of which nobody has
    async with two.peers.read("one", hashes, 5.0) as pages:
        np.testing.assert_array_equal(pages, one.pages())
    assert one.peers.num_leases == 1
    async with two.peers.read("one", HASHES[10:12], 5.0) as pages:
        np.testing.assert_array_equal(pages, one.pages()[10:12])


@pytest.mark.parametrize("sides", ["w8a8"], indirect=True, ids=["addressable"])
async def test_a_lease_that_exists_is_read_under_while_it_holds(sides: tuple[Side, Side]) -> None:
    """Pages that are leased already are leased no second time, and reading them ends nothing; a lease that is over by
    then does no harm."""
    one, two = sides
    lease = await one.loop.do(lambda engine: engine.lease(HASHES, "two", 30.0))
    assert lease is not None
    async with two.peers.read("one", HASHES[7:], 5.0, lease.id) as pages:
        assert await one.leased() == len(HASHES)
        kept = pages.copy()
    assert await one.loop.do(lambda engine: engine.release(lease.id))
    np.testing.assert_array_equal(kept, one.pages()[7:])
    async with two.peers.read("one", HASHES[7:], 5.0, lease.id) as pages:
        np.testing.assert_array_equal(pages, kept)
    ended = LeaseRequest(by="two", model=MODEL, recipe=RECIPE, lease=lease.id)
    with pytest.raises(NotFound):
        await two.bus.request(two.bus.subjects.link("one"), ended, Leased, timeout_s=5)


async def test_a_peer_without_the_pages_says_so(sides: tuple[Side, Side]) -> None:
    """Pages that are not there, another recipe, a peer that is not there: a typed error, and nothing is held."""
    _, two = sides
    with pytest.raises(NotFound):
        async with two.peers.read("one", blockhash.chain(b"other", PROMPT, PAGE), 5.0):
            pass
    with pytest.raises(Unavailable):
        async with two.peers.read("three", HASHES, 5.0):
            pass
    foreign = LeaseRequest(by="two", model=MODEL, recipe="other", hashes=HASHES)
    with pytest.raises(InvalidRequest):
        await two.bus.request(two.bus.subjects.link("one"), foreign, Leased, timeout_s=5)


@pytest.mark.parametrize("sides", ["w8a8"], indirect=True, ids=["addressable"])
async def test_a_lease_that_was_given_up_is_not_valid(sides: tuple[Side, Side]) -> None:
    """Where the holder needed the room, the release says so: what was read under that lease does not count."""
    one, two = sides
    subject = two.bus.subjects.link("one")
    request = LeaseRequest(by="two", model=MODEL, recipe=RECIPE, hashes=HASHES)
    leased = await two.bus.request(subject, request, Leased, timeout_s=5)
    assert len(leased.offsets) == len(HASHES)
    assert await one.leased() == len(HASHES)
    await one.compute("b", [9] * 2000)  # takes nearly the whole pool
    answer = await two.bus.request(
        subject, LeaseRelease(lease=leased.lease), LeaseReleased, timeout_s=5
    )
    assert not answer.valid
    kept = await two.bus.request(
        subject, LeaseRelease(lease="never was"), LeaseReleased, timeout_s=5
    )
    assert not kept.valid


async def test_a_reader_that_leaves_in_the_middle_frees_the_lease(sides: tuple[Side, Side]) -> None:
    """Cancelled at any moment, a read leaves no lease that does not end soon, and the next one works."""
    one, two = sides

    async def read() -> None:
        async with two.peers.read("one", HASHES, 5.0):
            pass

    for number in range(12):
        with contextlib.suppress(
            TimeoutError, NotFound
        ):  # those before may still have their leases
            async with asyncio.timeout(0.001 * number):
                await read()
    async with asyncio.timeout(LEASE_S + 3):
        while await one.leased():
            await asyncio.sleep(0.02)
    async with two.peers.read("one", HASHES, 5.0) as pages:
        assert len(pages) == len(HASHES)


@pytest.mark.parametrize("sides", ["w8a8"], indirect=True, ids=["addressable"])
async def test_a_peer_that_restarted_is_linked_again(sides: tuple[Side, Side]) -> None:
    """A link whose other end has gone is replaced; the read in between fails, or finds the new end at once."""
    one, two = sides
    async with two.peers.read("one", HASHES, 5.0):
        pass
    await one.linking.close()
    one.linking.flow = one.peers._flow = DistFlow(name="one")
    one.linking.flow.start()
    assert one.engine is not None
    memory = one.engine.memory()
    assert memory is not None
    one.peers._region = one.linking.flow.register(memory.data)
    async with asyncio.timeout(5):
        while True:
            try:
                async with two.peers.read("one", HASHES, 1.0) as pages:
                    np.testing.assert_array_equal(pages, one.pages())
                    return
            except DeepFlowError:
                await asyncio.sleep(0.05)
