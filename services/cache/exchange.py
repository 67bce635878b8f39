"""Pages from other hosts' arenas: a link to each, a lease, the bytes over DistFlow, and the proof that they are right.

What is returned is what the other host's writer once committed, bit for bit: the lease was held until after the last
byte, and each page has the checksum it was written with. A peer that is dead, stopped or slow is an error within the
time given. This module must not know where the pages go, nor whether fetching them is wise.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Final, TypeVar

import numpy as np
import xxhash

from services.cache.host import Page
from shared.arena.segment import PageKind
from shared.bus import Bus
from shared.distflow.flow import DistFlow
from shared.distflow.link import Link
from shared.distflow.region import Piece
from shared.errors import DeepFlowError, Internal, Unavailable
from shared.rtc_messages import (
    Leased,
    LeaseRelease,
    LeaseReleased,
    LeaseRequest,
    LinkOffer,
    LinkRequest,
)

M = TypeVar("M", LinkOffer, Leased, LeaseReleased)

MAX_LINKS: Final = 64  # kept open; the one unused for the longest is closed first


@dataclass(frozen=True, slots=True)
class Batch:
    """Pages that came, and how long it took to agree on them before the first byte moved."""

    pages: list[Page]
    start_s: float


class Exchange:
    """This cache service's end of its links to the others."""

    def __init__(self, bus: Bus, flow: DistFlow, name: str) -> None:
        self._bus = bus
        self._flow = flow
        self._name = name
        self._links: OrderedDict[str, Link] = OrderedDict()  # the longest unused first
        self._linking: dict[str, asyncio.Lock] = {}

    @property
    def num_links(self) -> int:
        """Those that are open."""
        return len(self._links)

    async def read(
        self, cache: str, kind: PageKind, hashes: list[bytes], timeout_s: float
    ) -> Batch:
        """The leading ones of these pages that `cache` has in one place, at least one.

        Raises NotFound if it has none, LinkError, TransferError, and what the bus raises; TimeoutError never.
        """
        began = time.monotonic()
        give_up = began + timeout_s
        link = await self._link(cache, timeout_s)
        ask = LeaseRequest(
            by=self._name,
            model=kind.model,
            recipe=kind.recipe,
            hashes=hashes,
            slot_bytes=kind.slot_bytes,
        )
        leased = await self._ask(cache, ask, Leased, give_up - time.monotonic())
        started = time.monotonic()
        try:
            pages = await self._transfer(link, leased, kind, hashes, give_up - started)
            release = LeaseRelease(lease=leased.lease)
            released = await self._ask(cache, release, LeaseReleased, give_up - time.monotonic())
        except BaseException:
            await self._give_back(cache, leased.lease)
            raise
        if not released.valid:
            raise Unavailable(f"{cache} did not hold the pages long enough")
        return Batch(pages, start_s=started - began)

    async def _transfer(
        self, link: Link, leased: Leased, kind: PageKind, hashes: list[bytes], timeout_s: float
    ) -> list[Page]:
        number = len(leased.offsets)
        sums = leased.seeds, leased.checksums
        if (
            leased.page_bytes != kind.slot_bytes
            or not 0 < number <= len(hashes)
            or any(len(words) != number for words in sums)
            or min(leased.region, leased.generation, *leased.offsets, *chain(*sums)) < 0
        ):
            raise Internal(f"{link.peer} leased something else")
        memory = np.empty((number, kind.slot_bytes), np.uint8)
        pieces = [
            Piece(leased.region, leased.generation, offset, kind.slot_bytes, into=page.data)
            for offset, page in zip(leased.offsets, memory, strict=True)
        ]
        ticket = self._flow.transfer(link, pieces, timeout_s=max(timeout_s, 0.001))
        try:
            # Shielded: who is cancelled here must not end the future under the hands of those who fill it.
            await asyncio.shield(asyncio.wrap_future(ticket.future))
        finally:
            ticket.cancel()  # nothing, once it is done
        pages = list(zip(hashes, memory, strict=False))
        await asyncio.to_thread(_check, pages, leased)
        return pages

    # --------------------------------------------------------------------------------------------------------- links

    async def _link(self, cache: str, timeout_s: float) -> Link:
        """The link to `cache`: the one there is, or a new one."""
        async with self._linking.setdefault(cache, asyncio.Lock()):
            link = self._links.pop(cache, None)
            if link is not None and not link.alive:
                await asyncio.to_thread(link.close)
                link = None
            if link is None:
                offer = await self._ask(cache, LinkRequest(by=self._name), LinkOffer, timeout_s)
                link = await self._open(offer, timeout_s)
            self._links[cache] = link
        if len(self._links) > MAX_LINKS:
            await self.forget(next(iter(self._links)))
        return link

    async def _open(self, offer: LinkOffer, timeout_s: float) -> Link:
        opening = asyncio.get_running_loop().run_in_executor(
            None, partial(self._flow.link, offer, timeout_s=timeout_s)
        )
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(_close)
            raise

    async def forget(self, cache: str) -> None:
        """It is gone, or unused for long: close the link to it."""
        link = self._links.pop(cache, None)
        lock = self._linking.get(cache)
        if lock is not None and not lock.locked():
            del self._linking[cache]
        if link is not None:
            await asyncio.to_thread(link.close)

    async def _give_back(self, cache: str, lease: str) -> None:
        # No answer is waited for: it would keep a cancelled fetch alive, and a stopped peer gives none.
        with contextlib.suppress(DeepFlowError):
            await self._bus.publish(self._bus.subjects.link(cache), LeaseRelease(lease=lease))

    async def _ask(
        self,
        cache: str,
        ask: LinkRequest | LeaseRequest | LeaseRelease,
        kind: type[M],
        timeout_s: float,
    ) -> M:
        subject = self._bus.subjects.link(cache)
        return await self._bus.request(subject, ask, kind, timeout_s=max(timeout_s, 0.001))


def _check(pages: list[Page], leased: Leased) -> None:
    """Raises Unavailable unless every page has the checksum it was written with."""
    for (_, page), seed, checksum in zip(pages, leased.seeds, leased.checksums, strict=True):
        if xxhash.xxh3_64_intdigest(page.data, seed=seed) != checksum:
            raise Unavailable("a page was not what its writer had committed")


def _close(opening: asyncio.Future[Link]) -> None:
    """Nobody waited for this link any more."""
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()
