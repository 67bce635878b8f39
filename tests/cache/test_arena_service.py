"""The owner of a host's arena as a real process: its life from start to end, and what is left after a kill -9."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

from services.cache.arena import Arena
from shared.arena.place import Place
from shared.arena.segment import PageKind
from shared.bus import Bus
from shared.errors import NotFound, Unavailable
from shared.messages import Keep
from shared.rtc_messages import (
    Commit,
    Copied,
    Free,
    Leased,
    LeaseRelease,
    LeaseReleased,
    LeaseRequest,
    Match,
    Matched,
)
from tests.cache.hosts import RECIPE, SLOT_BYTES, Writing, content, pages, running
from tests.nats_server import NatsServer
from tests.scheduler.players import MODEL, Te, eventually, process, status, wait_ready


async def test_a_full_arena_forgets_the_coldest_but_not_what_is_kept(
    nats: NatsServer, bus: Bus, tmp_path: Path
) -> None:
    """Beyond the byte budget old pages go, those of an explicit cache stay until it is freed."""
    kept = pages("kept", 6)
    async with (
        running(nats, bus, tmp_path / "arena") as host,
        process("cache", nats, DEEPFLOW_ARENA_BYTES="off") as (_, other),
    ):
        await wait_ready(bus, "cache", other)
        with Writing(host, "te-1") as te:
            await te.write(kept, Keep(id="c1", ttl_ms=60_000))
            await host.holds(kept, 6)
            for turn in range(8):
                await te.write(pages(f"other{turn}", 16))
            await host.holds(pages("other7", 16), 16)
            await host.holds(kept, 6)
            row = next(iter((await host.ledger())["arena"].values()))
            assert row["kept"] == 6
            assert row["total"] * SLOT_BYTES <= (await host.status())["bytes"]

            async def told() -> bool:
                """What the events came to, in its own directory and in another's, is what it says it has."""
                pages_here = len((await host.dump()).hashes)
                seen = [(await status(bus, "cache", c))["tes"] for c in (host.cache, other)]
                return all(tes[host.cache] == pages_here for tes in seen)

            await eventually(told)
            await bus.publish(bus.subjects.rtc("free"), Free(keep="c1"))
            for turn in range(8):
                await te.write(pages(f"more{turn}", 16))
            await host.holds(kept, 0)


async def test_the_arena_survives_its_service(nats: NatsServer, bus: Bus, tmp_path: Path) -> None:
    """After a kill -9, also one in the middle of a copy, the next owner finds what was committed, and nothing else."""
    done, half = pages("done", 4), pages("half", 4)
    folder = tmp_path / "arena"
    async with running(nats, bus, folder) as host:
        name, cache = host.name, host.cache
        te = Writing(host, "te-1")
        await te.write(done)
        await host.holds(done, 4)
        copied = await host.copy("te-1", half, held=te.writer.held)
        te.writer.lock(copied.granted)
        host.child.kill()
        await host.child.wait()
        slots = [slot for slot in copied.slots if slot is not None]
        # It goes on writing while nobody is there to hear of it.
        for slot, page_hash in zip(slots[:2], half, strict=False):
            assert te.writer.write(slot, page_hash, content(page_hash))
    async with running(nats, bus, folder) as host:
        assert host.name == name
        assert host.cache != cache
        await host.holds(done, 4)
        await host.holds(half, 2)  # its own headers say that they are whole
        assert (await host.ledger())["arena"]
        host.child.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(host.child.wait(), 10) == 0
    te.writer.close()
    place = Place.own(folder)
    assert place is not None, "the folder is free for the next owner"
    arena = Arena(folder, max_bytes=1 << 30, segment_bytes=1 << 20, epoch=place.epoch)
    arena.rebuild(0.0)
    assert arena.holds(PageKind(MODEL, RECIPE, SLOT_BYTES), done) == 4
    arena.close()
    place.close()


async def test_one_owner_of_an_arena_and_another_when_it_dies(
    nats: NatsServer, bus: Bus, tmp_path: Path
) -> None:
    """A second service of the host is a replica of the directory, and takes the arena over when the owner is killed."""
    chain = pages("a", 3)
    folder = tmp_path / "arena"
    async with running(nats, bus, folder) as first, running(nats, bus, folder) as second:
        assert (await second.status()) is None
        with Writing(first, "te-1") as te:
            await te.write(chain)
            await first.holds(chain, 3)
            body = await status(bus, "cache", second.cache)
            assert set(body["tes"]) <= {first.cache}
            first.child.kill()

            async def taken() -> bool:
                return (await second.status()) is not None

            await eventually(taken)
            assert second.name == first.name
            await second.holds(chain, 3)
            assert await te.write(pages("b", 2)) == 2  # to the segment that it had
            await second.holds(pages("b", 2), 2)


async def test_a_host_without_an_arena_serves_the_directory(
    nats: NatsServer, bus: Bus, tmp_path: Path
) -> None:
    """With the arena off, or its folder unusable, the service is ready and matches; it says what is wrong."""
    bad = tmp_path / "open"
    bad.mkdir()
    bad.chmod(0o777)
    async with (
        process("cache", nats, DEEPFLOW_ARENA_BYTES="off") as (_, off),
        process("cache", nats, DEEPFLOW_ARENA_DIR=str(bad)) as (_, unfit),
    ):
        for name in (off, unfit):
            await wait_ready(bus, "cache", name)
            body = await status(bus, "cache", name)
            assert body["arena"] is None
            assert bool(body["arena_fault"]) == (name == unfit)
        question = Match(model=MODEL, hashes=pages("a", 1))
        matched = await bus.request(bus.subjects.rtc("match"), question, Matched, timeout_s=5)
        assert matched.holders == []
        with pytest.raises(Unavailable):
            await bus.request(
                bus.subjects.rtc("copy", "0" * 16),
                Commit(te="x"),
                Copied,
                timeout_s=5,
            )


async def test_a_fabric_that_is_not_ours_stops_the_service(
    nats: NatsServer, tmp_path: Path
) -> None:
    """An address that this machine does not have, or one of all, ends the process with the variable in its log."""

    async def ends(fabric: str) -> None:
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "services.cache"),
            env={
                **os.environ,
                "DEEPFLOW_NATS_URL": nats.url,
                "DEEPFLOW_ARENA_DIR": str(tmp_path / fabric),
                "DEEPFLOW_ARENA_BYTES": "1000000",
                "DEEPFLOW_FABRIC": fabric,
            },
            stderr=asyncio.subprocess.PIPE,
        )
        _, log = await asyncio.wait_for(child.communicate(), 20)
        assert child.returncode == 1
        assert b"DEEPFLOW_FABRIC" in log
        assert b"Traceback" not in log

    await asyncio.gather(ends("192.0.2.1"), ends("0.0.0.0"))


async def test_a_lease_holds_pages_against_eviction(
    nats: NatsServer, bus: Bus, tmp_path: Path
) -> None:
    """Pages under lease stay while the arena is overrun, and the release proves it; a lease ends but once."""
    chain = pages("a", 4)
    async with running(nats, bus, tmp_path / "arena") as host:
        link = bus.subjects.link(host.cache)
        ask = LeaseRequest(by="me", model=MODEL, recipe=RECIPE, hashes=chain, slot_bytes=SLOT_BYTES)
        with pytest.raises(NotFound):
            await bus.request(link, ask, Leased, timeout_s=5)
        with Writing(host, "te-1") as te:
            await te.write(chain)
            await host.holds(chain, 4)
            leased = await bus.request(link, ask, Leased, timeout_s=5)
            assert len(leased.offsets) == len(leased.checksums) == 4
            for turn in range(8):
                await te.write(pages(f"other{turn}", 16))
            await host.holds(chain, 4)
            body = await host.ledger()
            assert (body["leases"], body["leased_bytes"]) == (1, 4 * SLOT_BYTES)
            assert next(iter(body["arena"].values()))["leased"] == 4
            release = LeaseRelease(lease=leased.lease)
            for valid in (True, False):
                answer = await bus.request(link, release, LeaseReleased, timeout_s=5)
                assert answer.valid == valid
            body = await host.ledger()
            assert (body["leases"], body["leased_bytes"]) == (0, 0)


async def test_an_arena_whose_folder_is_removed_ends_its_service(
    nats: NatsServer, bus: Bus, tmp_path: Path
) -> None:
    """TEs would not find it any more: the service ends and says why, and the next one starts with an empty arena."""
    folder = tmp_path / "arena"
    async with running(nats, bus, folder) as host:
        with Writing(host, "te-1") as te:
            await te.write(pages("a", 3))
            await host.holds(pages("a", 3), 3)
        shutil.rmtree(folder)
        assert await asyncio.wait_for(host.child.wait(), 10) == 1
    async with running(nats, bus, folder) as host:
        with Writing(host, "te-1") as te:
            await te.write(pages("b", 3))
        await host.holds(pages("b", 3), 3)


async def test_a_restarted_cache_rebuilds_from_dumps(nats: NatsServer, bus: Bus) -> None:
    """A cache that starts when TEs have pages already answers rightly from its first answer on; SIGTERM ends it."""
    chain = pages("e", 8)

    async def match() -> dict[str, int]:
        question = Match(model=MODEL, hashes=chain)
        matched = await bus.request(bus.subjects.rtc("match"), question, Matched, timeout_s=5)
        return {holder.te: holder.num_pages for holder in matched.holders}

    async def answers(expected: dict[str, int]) -> bool:
        return await match() == expected

    async with Te(bus, "te-e1") as te:
        for _ in range(2):
            async with process("cache", nats, DEEPFLOW_ARENA_BYTES="off") as (child, name):
                await wait_ready(bus, "cache", name)
                assert await match() == ({"te-e1": te.seq} if te.seq else {})
                await te.change([chain[te.seq]])
                await te.change([chain[te.seq]])
                await eventually(lambda: answers({"te-e1": te.seq}))
                if te.seq == 2:
                    child.kill()
                else:
                    child.send_signal(signal.SIGTERM)
                    assert await asyncio.wait_for(child.wait(), 10) == 0
    with pytest.raises(Unavailable):
        await match()
