"""A TE is scaled down while it streams: what still runs goes on elsewhere, with its pages, brought out first."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from shared.messages import Registration
from shared.scaling_messages import Scaled, ScaleOrder, Target
from tests.nats_server import NatsServer
from tests.worker.host import LONG, PAGE, Host, counter, settled
from tests.worker.peers import MODEL, Peer, tokens

pytestmark = pytest.mark.service
NUM_TOKENS = 1500
PROMPT = LONG[:1001]


@pytest.fixture
async def host(nats: NatsServer, tmp_path: Path) -> AsyncIterator[Host]:
    """A host with a cache service, and no TE yet."""
    host = Host(nats, tmp_path)
    await host.cache.start()
    yield host
    host.stop()


async def scale(peer: Peer, te: str, num: int) -> None:
    """Order the pod host of `te` to have so many."""
    order = ScaleOrder(by="test", term=1, targets=[Target(model=MODEL, role="colocated", num=num)])
    pod = peer.beats[te].pod
    await peer.bus.request(peer.bus.subjects.scale(pod), order, Scaled, timeout_s=5)


async def test_a_stream_goes_on_elsewhere_with_the_same_tokens(host: Host) -> None:
    """Its TE is drained and its time is up: the client is told to come back at once, nothing is told twice, and the
    next TE finds all full pages in the arena, those of the output too."""
    host.worker("first", DEEPFLOW_MIGRATE_AFTER_S="0.1")
    async with Peer.on(host.server.url) as peer:
        te = await peer.ready()
        await peer.until(lambda: peer.beats[te].host)
        host.worker("second")
        other = await peer.ready(but=te)
        await peer.until(lambda: peer.beats[other].host)

        request = peer.request("a", prompt=PROMPT, max_tokens=NUM_TOKENS)
        await peer.send(te, request)
        await peer.until(lambda: len(peer.deltas("a")) >= 200)
        await scale(peer, te, 0)
        deltas = await peer.end("a")
        failure = deltas[-1].failure
        assert deltas[-1].finish == "failed"
        assert failure is not None
        assert (failure.code, failure.retry_after_s) == ("unavailable", 0.0)
        have = tokens(deltas)
        assert 200 <= len(have) < NUM_TOKENS

        again = peer.request("a", attempt=1, prompt=PROMPT, max_tokens=NUM_TOKENS, output=[have])
        await peer.send(other, again)
        rest = await peer.end("a", attempt=1)
        assert rest[0].index == len(have)
        num_full = (len(PROMPT) + len(have) - 1) // PAGE
        assert await counter(peer, other, "fetched_arena") == num_full

        whole = peer.request("b", prompt=PROMPT, max_tokens=NUM_TOKENS)
        await peer.send(other, whole)
        assert have + tokens(rest) == tokens(await peer.end("b"))
        await settled(peer, other)


async def test_a_short_request_comes_to_its_end_where_it_is(host: Host) -> None:
    """A TE that is drained lets what ends in time end, and takes nothing new."""
    host.worker("first", DEEPFLOW_MIGRATE_AFTER_S="15")
    async with Peer.on(host.server.url) as peer:
        te = await peer.ready()
        await peer.send(te, peer.request("a", prompt=PROMPT, max_tokens=400))
        await scale(peer, te, 0)
        deltas = await peer.end("a")
        assert (deltas[-1].finish, len(tokens(deltas))) == ("length", 400)
        table = await peer.bus.table("registrations")
        async with asyncio.timeout(10):
            while await table.get(te, Registration) is not None:
                await asyncio.sleep(0.05)
