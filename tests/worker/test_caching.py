"""Context caching on a real bus: TEs of a tiny model, their host's cache service, and its arena in a real folder."""

from __future__ import annotations

import asyncio
import shutil
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from shared import blockhash
from shared.bus import Bus
from shared.errors import DeadlineExceeded, Unavailable
from shared.messages import Keep, TeBeat
from shared.rtc_messages import BlockEvents, Free
from tests.nats_server import NatsServer
from tests.worker.host import LONG, PAGE, CacheService, Host, counter, generate, pair, settled
from tests.worker.peers import Peer, tokens

pytestmark = pytest.mark.service
GHOST = "te-ghost"


@pytest.fixture
async def host(nats: NatsServer, tmp_path: Path) -> AsyncIterator[Host]:
    """A host with a cache service, and no TE yet."""
    host = Host(nats, tmp_path)
    await host.cache.start()
    yield host
    host.stop()


async def test_what_a_dead_te_computed_is_found_by_the_next_one(host: Host) -> None:
    """A TE is killed; another one of the host continues the conversation from the arena, with the same tokens."""
    worker = host.worker("worker")
    async with Peer.on(host.server.url) as peer:
        te = await peer.ready()
        first, cached = await generate(peer, te, "a", max_tokens=8)
        assert cached == 0
        await counter(peer, te, "copied_pages", 250)
        worker.tes()[0].kill()
        other = await peer.ready(but=te)
        again, cached = await generate(peer, other, "b", max_tokens=8)
        assert again == first
        assert cached == len(LONG) // PAGE * PAGE
        assert await counter(peer, other, "fetched_arena") == 250
        await settled(peer, other)


async def test_a_drained_te_leaves_its_pages_behind(host: Host) -> None:
    """A TE that is told to go copies what is indexed before it does."""
    worker = host.worker("worker")
    async with Peer.on(host.server.url) as peer:
        te = await peer.ready()
        first, _ = await generate(peer, te, "a", max_tokens=8)
        worker.stop()
        host.worker("next")  # the beats of the other one are heard no more
        other = await peer.ready(but=te)
        again, cached = await generate(peer, other, "b", max_tokens=8)
        assert (again, cached) == (first, len(LONG) // PAGE * PAGE)


async def test_without_a_cache_service_everything_is_computed(
    nats: NatsServer, tmp_path: Path
) -> None:
    """No arena and no cache service: requests run as ever, and nothing is asked of anybody."""
    host = Host(nats, tmp_path)
    worker = host.worker("worker")
    try:
        async with Peer.on(nats.url) as peer:
            te = await peer.ready()
            first, cached = await generate(peer, te, "a", max_tokens=4)
            assert cached == 0
            again, cached = await generate(peer, te, "b", max_tokens=4)
            assert (again, cached) == (first, len(LONG) // PAGE * PAGE)
            assert peer.beats[te].host == ""
            assert peer.beats[te].counters["fetches"] == 0
    finally:
        worker.stop()


async def test_a_cache_service_that_comes_and_goes_costs_no_request(host: Host) -> None:
    """Killed, gone with its folder, back: each request gets its tokens, a few lines are logged, and copying resumes."""
    worker = host.worker("worker")
    async with Peer.on(host.server.url) as peer:
        te = await peer.ready()
        await peer.until(lambda: peer.beats[te].host)
        old = peer.beats[te].host
        whole, _ = await generate(peer, te, "a", max_tokens=4)
        host.cache.end(signal.SIGKILL)
        for number in range(8):
            prompt = [5 + number, *LONG[1:400]]
            await generate(peer, te, f"killed-{number}", max_tokens=4, prompt=prompt)
        shutil.rmtree(host.arena)
        await peer.until(lambda: not peer.beats[te].host)
        await generate(peer, te, "gone", max_tokens=4, prompt=[9, *LONG[1:400]])
        before = peer.beats[te].counters["copied_pages"]
        await host.cache.start()
        await peer.until(lambda: peer.beats[te].host not in ("", old))
        await counter(
            peer, te, "copied_pages", before + 250
        )  # all that was indexed, into the new arena
        assert await generate(peer, te, "b", max_tokens=4) == (whole, len(LONG) // PAGE * PAGE)
        await settled(peer, te)
    log = worker.log.read_text()
    assert log.count("fetch_failed") <= 5
    assert log.count("copy_failed") <= 2


async def test_who_waits_for_its_pages_keeps_nobody_else_waiting(host: Host) -> None:
    """While the cache service is stopped a prompt waits for its answer, and others run; before long it goes on."""
    host.worker("worker", DEEPFLOW_FETCH_TIMEOUT_S="30")
    async with Peer.on(host.server.url) as peer:
        te = await peer.ready()
        await peer.until(lambda: peer.beats[te].host)
        first, _ = await generate(peer, te, "a", max_tokens=4)
        host.cache.send(signal.SIGSTOP)
        long = peer.request("long", max_tokens=4, prompt=[4, *LONG[1:], *LONG, *LONG])
        await peer.send(te, long)
        await generate(peer, te, "short", max_tokens=4, prompt=LONG[:9])
        assert not peer.deltas("long")
        await peer.end("long")
        assert peer.beats[te].counters["fetches"] >= 1
        host.cache.send(signal.SIGCONT)
        assert await generate(peer, te, "b", max_tokens=4) == (first, len(LONG) // PAGE * PAGE)
        await settled(peer, te)


async def test_equal_prompts_at_once_are_fetched_once(host: Host) -> None:
    """Requests that lack the same pages at the same time share what comes, and each has its own tokens."""
    worker = host.worker("worker")
    async with Peer.on(host.server.url) as peer:
        te = await peer.ready()
        first, _ = await generate(peer, te, "a", max_tokens=8)
        await counter(peer, te, "copied_pages", 250)
        worker.tes()[0].kill()
        other = await peer.ready(but=te)
        for number in range(5):
            await peer.send(other, peer.request(f"b{number}", prompt=LONG, max_tokens=8))
        for number in range(5):
            assert tokens(await peer.end(f"b{number}")) == first
        assert await counter(peer, other, "fetched_arena") == 250
        await settled(peer, other)


async def test_losing_the_bus_in_mid_fetch_costs_no_request(host: Host) -> None:
    """The bus is killed as requests wait for their pages, and comes back: each is computed, and nothing stays held."""
    host.worker("worker")
    async with Peer.on(host.server.url) as peer:
        te = await peer.ready()
        await peer.until(lambda: peer.beats[te].host)
        requests = [
            peer.request(f"r{number}", max_tokens=4, prompt=[5 + number, *LONG[1:800]])
            for number in range(4)
        ]
        for request in requests:
            await peer.send(te, request)
        host.server.restart()
        async with asyncio.timeout(20):
            while True:
                try:
                    await settled(peer, te)
                    break
                except (Unavailable, DeadlineExceeded):  # one of the two has not found it again yet
                    await asyncio.sleep(0.05)
        again = await generate(peer, te, "again", max_tokens=4)
        assert again[1] == 0


async def test_a_kept_prompt_is_pinned_in_the_arena(host: Host) -> None:
    """The pages of an explicit cache are copied with their pin, which the cache service's ledger shows, until freed."""
    host.worker("worker")
    async with Peer.on(host.server.url) as peer:
        te = await peer.ready()
        await peer.until(lambda: peer.beats[te].host)
        kept = Keep(id="cache-1", ttl_ms=60_000)
        await generate(peer, te, "a", max_tokens=1, kind="cache", keep=kept)
        await counter(peer, te, "copied_pages", 250)
        assert (await peer.freed(te))[
            "leased"
        ] > 0  # the share of them that is pinned on the device
        await peer.bus.publish(peer.bus.subjects.rtc("free"), Free(keep="cache-1"))
        await settled(peer, te)


async def test_a_full_arena_is_shared_out_between_those_who_write(
    nats: NatsServer, tmp_path: Path
) -> None:
    """One TE fills the arena; another one gets segments of it all the same, and no request fails."""
    host = Host(nats, tmp_path)
    sizes = {"DEEPFLOW_ARENA_BYTES": str(3 << 20), "DEEPFLOW_SEGMENT_BYTES": str(1 << 20)}
    host.cache = CacheService(nats.url, tmp_path, **sizes)
    await host.cache.start()
    try:
        async with pair(host) as (peer, one, other):
            await peer.until(lambda: peer.beats[one].host and peer.beats[other].host)
            for number in range(3):
                await generate(
                    peer, one, f"a{number}", prompt=[5 + number, *LONG[1:]], max_tokens=1
                )
            await counter(peer, one, "copied_pages", 300)
            await generate(peer, other, "b", prompt=[9, *LONG[1:]], max_tokens=1)
            await counter(peer, other, "copied_pages", 50)
    finally:
        host.stop()


async def test_a_peer_that_is_gone_is_asked_once(host: Host, bus: Bus) -> None:
    """The directory still names a TE that died a moment ago; who fetches finds nobody there, and the next best one."""
    host.worker("elsewhere", DEEPFLOW_ARENA_DIR=str(host.folder / "nowhere"))
    async with Peer.on(host.server.url) as peer, asyncio.TaskGroup() as tasks:
        one = await peer.ready()
        await generate(peer, one, "a", max_tokens=8)
        host.worker("worker")
        other = await peer.ready(but=one)
        longer = [*LONG, *([5] * PAGE)]  # a page more than anybody has
        model = peer.beats[one].model
        root = peer.request("any", prompt=LONG).root
        await announce(bus, model, blockhash.chain(root, longer, PAGE))
        ghost = tasks.create_task(haunt(bus, model))
        first, cached = await generate(peer, other, "b", prompt=longer, max_tokens=8)
        ghost.cancel()
        assert cached == len(LONG) // PAGE * PAGE
        assert await counter(peer, other, "fetched_peer") == 250
        assert (await generate(peer, one, "c", prompt=longer, max_tokens=8))[0] == first
        assert peer.beats[other].counters["fetch_failures"] == 1


async def announce(bus: Bus, model: str, hashes: list[bytes]) -> None:
    """Have the directory believe that the ghost holds these pages."""
    beat = TeBeat(id=GHOST, model=model, pod="pod", state="ready")
    await bus.publish(bus.subjects.beat("te", GHOST), beat)
    events = BlockEvents(te=GHOST, model=model, seq=1, stored=hashes)
    await bus.publish(bus.subjects.blocks(model, GHOST), events)


async def haunt(bus: Bus, model: str) -> None:
    """Beat as if the ghost lived."""
    while True:
        beat = TeBeat(id=GHOST, model=model, pod="pod", state="ready")
        await bus.publish(bus.subjects.beat("te", GHOST), beat)
        await asyncio.sleep(0.2)
