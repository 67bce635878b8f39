"""What a cache service does with messages that nobody should send."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from shared.bus import Bus
from shared.distflow.flow import DistFlow
from shared.errors import InvalidRequest, NotFound, Overloaded
from shared.messages import Beat, Down, Keep, TeBeat
from shared.rtc_messages import (
    BlocksDump,
    BlocksQuery,
    Commit,
    Leased,
    LeaseRelease,
    LeaseReleased,
    LeaseRequest,
    LinkOffer,
    LinkRequest,
    Match,
    Matched,
    Slot,
)
from tests.cache.hosts import RECIPE, SLOT_BYTES, Host, Writing, pages
from tests.scheduler.players import MODEL, eventually

HUGE = 2**63
pytestmark = [pytest.mark.service, pytest.mark.asyncio(loop_scope="module")]


async def test_messages_that_make_no_sense_do_no_harm(shared_bus: Bus, near: Host) -> None:
    """Absurd sizes, negative numbers, and names of nothing or of paths are refused or ignored; what was there stays."""
    bus, host = shared_bus, near
    chain = pages("a", 4)
    subjects = bus.subjects
    with Writing(host, "te-1") as te:
        await te.write(chain)
        await host.holds(chain, 4)
        for fields in (
            {"slot_bytes": 0},
            {"slot_bytes": -5},
            {"model": ""},
            {"model": "x" * 300},
        ):
            for ask in (
                host.copy("te-2", pages("b", 1), **fields),
                host.populate(chain, **fields),
            ):
                with pytest.raises(InvalidRequest):
                    await ask
        with pytest.raises(InvalidRequest):
            await host.copy("", pages("b", 1))
        for name in ("page_us", "load_us"):
            with pytest.raises(InvalidRequest):
                await host.populate(chain, **{name: -1})
        assert (await host.copy("te-2", chain, slot_bytes=HUGE)).slots == [None] * 4
        assert (await host.copy("te-2", [b"", b"x" * 99])).slots == [None] * 2
        kept = Keep(id="", ttl_ms=-HUGE)
        assert (await host.copy("te-2", chain, keep=kept)).slots == [None] * 4
        assert (await host.populate(chain, slot_bytes=HUGE)).slots == []
        with pytest.raises(NotFound):
            await host.query("../lock")

        (mine,) = te.writer.held
        bad = [
            Slot(segment=segment, index=index, generation=generation)
            for segment in (mine, "../lock", "")
            for index in (-1, 0, HUGE)
            for generation in (-1, 0, HUGE)
        ]
        for name in ("te-1", "te-2", ""):
            commit = Commit(te=name, written=bad, dropped=bad, returned=["../lock", "", mine])
            await bus.publish(subjects.rtc("commit", host.name), commit)
        for size, error in ((HUGE, Overloaded), (-1, InvalidRequest), (1, NotFound)):
            ask_lease = LeaseRequest(
                by="", model=MODEL, recipe=RECIPE, hashes=chain, slot_bytes=size
            )
            with pytest.raises(error):
                await bus.request(subjects.link(host.cache), ask_lease, Leased, timeout_s=5)
        for name in ("", "x" * 300):
            te_beat = TeBeat(id=name, model=MODEL, pod="", state="ready")
            await bus.publish(subjects.beat("te", "bad"), te_beat)
            beat = Beat(kind="cache", id=name, host="h", models=[MODEL])
            await bus.publish(subjects.beat("cache", "bad"), beat)
        down = Down(kind="cache", id=host.cache, reason="a mistake")
        await bus.publish(subjects.down("cache", host.cache), down)

        await asyncio.sleep(0.5)  # more than a tick
        await host.holds(chain, 4)
        (row,) = (await host.ledger())["arena"].values()
        assert (row["cached"], row["writing"]) == (4, 0)
        question = Match(model=MODEL, hashes=chain)
        matched = await bus.request(subjects.rtc("match"), question, Matched, timeout_s=5)
        assert [(h.te, h.num_pages, h.host) for h in matched.holders] == [
            (host.cache, 4, host.name)
        ]
        assert await te.write(pages("c", 2)) == 2
        await host.holds(pages("c", 2), 2)


@contextlib.asynccontextmanager
async def liar(bus: Bus, name: str, chain: Sequence[bytes], **lies: Any) -> AsyncIterator[None]:
    """Plays a cache service of another host, which says of its pages what is not so."""
    subjects = bus.subjects
    memory = bytearray(SLOT_BYTES * len(chain))

    def beat() -> Beat:
        return Beat(kind="cache", id=name, host=f"host of {name}", models=[MODEL])

    async def dump(query: BlocksQuery) -> BlocksDump:
        return BlocksDump(te=name, model=query.model, seq=1, hashes=list(chain), tier="host")

    with DistFlow(name=name) as flow:
        region = flow.register(memory)

        async def answer(
            ask: LinkRequest | LeaseRequest | LeaseRelease,
        ) -> LinkOffer | Leased | LeaseReleased:
            if isinstance(ask, LinkRequest):
                return flow.offer(ask.by)
            if isinstance(ask, LeaseRelease):
                return LeaseReleased(valid=True)
            said: dict[str, Any] = {
                "lease": "l",
                "region": region.id,
                "generation": region.generation,
                "page_bytes": SLOT_BYTES,
                "offsets": [n * SLOT_BYTES for n in range(len(chain))],
                "ttl_ms": 1000,
                "seeds": [1] * len(chain),
                "checksums": [1] * len(chain),
            }
            return Leased(**{**said, **lies})

        kinds: tuple[type[Any], ...] = (LinkRequest, LeaseRequest, LeaseRelease)
        served = [
            await bus.serve(subjects.blocks_dump(name), (BlocksQuery,), dump),
            await bus.serve(subjects.link(name), kinds, answer),
        ]

        async def beats() -> None:
            while True:
                await bus.publish(subjects.beat("cache", name), beat())
                await asyncio.sleep(0.1)

        beating = asyncio.create_task(beats())
        try:
            yield
        finally:
            beating.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await beating
            await bus.publish(subjects.down("cache", name), Down(kind="cache", id=name, reason=""))
            for subscription in served:
                await subscription.stop()


async def test_what_another_host_makes_up_is_not_believed(shared_bus: Bus, near: Host) -> None:
    """A holder whose lease is nonsense, or whose bytes are not what was once written, brings no page; we live on."""
    lies: list[dict[str, Any]] = [
        {},  # but the checksums are wrong
        {"seeds": [], "checksums": []},
        {"seeds": [1]},
        {"checksums": [-1] * 4},
        {"offsets": []},
        {"offsets": [0] * 99},
        {"offsets": [-SLOT_BYTES, 0, 0, 0]},
        {"offsets": [HUGE, 0, 0, 0]},
        {"region": -1},
        {"region": 99},
        {"generation": HUGE},
        {"page_bytes": 0},
    ]
    for number, lie in enumerate(lies):
        name, chain = f"cache-liar{number}", pages(f"lie{number}", 4)
        async with liar(shared_bus, name, chain, **lie):

            async def tried(name: str = name, chain: list[bytes] = chain) -> bool:
                assert (await near.fetched(chain)).slots == []
                return name in (await near.status())["decisions"][0]["why"]

            await eventually(tried)
            assert (await near.status())["decisions"][0]["outcome"] == "failed"
    body = await near.ledger()
    assert (body["moving_pages"], body["moving_bytes"], body["leased_bytes"]) == (0, 0, 0)
