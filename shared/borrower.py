"""The reading end of `link.<holder>`: links to other holders of pages, leases on pages there, and their bytes.

A read counts only if its lease is proven to have held until the last byte was there: pages that were given up in the
middle are others' by then. A holder that is dead, stopped or slow is an error within the time given. This module must
not know what pages are wanted for, nor where they go.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import OrderedDict
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, TypeVar

import numpy as np
import numpy.typing as npt

from shared.bus import Bus
from shared.distflow.flow import DistFlow
from shared.distflow.link import Link
from shared.distflow.region import Piece
from shared.errors import DeepFlowError, Internal, NotFound, Unavailable
from shared.rtc_messages import (
    Leased,
    LeaseRelease,
    LeaseReleased,
    LeaseRequest,
    LinkOffer,
    LinkRequest,
)

M = TypeVar("M", LinkOffer, Leased, LeaseReleased)
Pages = npt.NDArray[np.uint8]
MAX_LINKS: Final = 64  # kept open; the one unused for the longest is closed first


@dataclass(frozen=True, slots=True)
class Borrowed:
    """Pages [pages, bytes] that came, under which lease, and how long it took to agree on it before the first byte."""

    pages: Pages
    leased: Leased
    start_s: float


class Borrower:
    """One process's links to the holders it reads from. `name` is its own on the bus."""

    def __init__(self, bus: Bus, flow: DistFlow, name: str) -> None:
        self.name = name
        self._bus = bus
        self._flow = flow
        self._links: OrderedDict[str, Link] = OrderedDict()  # the longest unused first
        self._linking: dict[str, asyncio.Lock] = {}

    @property
    def num_links(self) -> int:
        """Those that are open."""
        return len(self._links)

    async def read(
        self, holder: str, ask: LeaseRequest, page_bytes: int, timeout_s: float
    ) -> Borrowed:
        """The leading ones of the pages in `ask` that `holder` has in one place, at least one.

        A lease that `ask` names holds them there already, and is not ended. Raises NotFound if the holder has none,
        Unavailable if it did not keep them long enough, Internal if it leased something else, LinkError, TransferError,
        and what the bus raises.
        """
        began = time.monotonic()
        give_up = began + timeout_s
        link = await self._link(holder, timeout_s)
        leased = await self._ask(holder, ask, Leased, give_up)
        started = time.monotonic()
        is_named = leased.lease == ask.lease
        try:
            pages = await self._transfer(link, leased, len(ask.hashes), page_bytes, give_up)
            if is_named:  # does it still hold? Raises NotFound
                await self._ask(holder, replace(ask, hashes=[]), Leased, give_up)
                is_valid = True
            else:
                release = LeaseRelease(lease=leased.lease)
                is_valid = (await self._ask(holder, release, LeaseReleased, give_up)).valid
        except BaseException:
            if not is_named:
                await self.give_back(holder, leased.lease)
            raise
        if not is_valid:
            raise Unavailable(f"{holder} did not hold the pages long enough")
        return Borrowed(pages, leased, started - began)

    async def give_back(self, holder: str, lease: str) -> None:
        """What was leased is not wanted any more. No answer is waited for: it would keep a cancelled reader alive, and
        a stopped holder gives none. If this is lost, the lease runs out."""
        with contextlib.suppress(DeepFlowError):
            await self._bus.publish(self._bus.subjects.link(holder), LeaseRelease(lease=lease))

    async def forget(self, holder: str) -> None:
        """It is gone, or unused for long: close the link to it."""
        link = self._links.pop(holder, None)
        lock = self._linking.get(holder)
        if lock is not None and not lock.locked():
            del self._linking[holder]
        if link is not None:
            await asyncio.to_thread(link.close)

    # ------------------------------------------------------------------------------------------------------- internals

    async def _transfer(
        self, link: Link, leased: Leased, most: int, page_bytes: int, give_up: float
    ) -> Pages:
        offsets = leased.offsets[:most]
        if not offsets:
            raise NotFound(f"{link.peer} has none of these pages")
        if (
            leased.page_bytes != page_bytes
            or min(leased.region, leased.generation, *leased.offsets) < 0
        ):
            raise Internal(f"{link.peer} leased something else")
        pages = np.empty((len(offsets), page_bytes), np.uint8)
        pieces = [
            Piece(leased.region, leased.generation, offset, page_bytes, into=page.data)
            for offset, page in zip(offsets, pages, strict=True)
        ]
        ticket = self._flow.transfer(link, pieces, timeout_s=_left_s(give_up))
        try:
            # Shielded: who is cancelled here must not end the future under the hands of those who fill it.
            await asyncio.shield(asyncio.wrap_future(ticket.future))
        finally:
            ticket.cancel()  # nothing, once it is done
        return pages

    async def _link(self, holder: str, timeout_s: float) -> Link:
        """The link to `holder`: the one there is, or a new one."""
        give_up = time.monotonic() + timeout_s
        async with self._linking.setdefault(holder, asyncio.Lock()):
            link = self._links.pop(holder, None)
            if link is not None and not link.alive:
                await asyncio.to_thread(link.close)
                link = None
            if link is None:
                try:
                    link = await self._open(holder, give_up)
                except BaseException:
                    self._linking.pop(holder, None)  # it may never be heard of again
                    raise
            self._links[holder] = link
        while len(self._links) > MAX_LINKS:
            await self.forget(next(iter(self._links)))
        return link

    async def _open(self, holder: str, give_up: float) -> Link:
        offer = await self._ask(holder, LinkRequest(by=self.name), LinkOffer, give_up)
        opening = asyncio.get_running_loop().run_in_executor(
            None, partial(self._flow.link, offer, timeout_s=_left_s(give_up))
        )
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(_close)
            raise

    async def _ask(
        self,
        holder: str,
        ask: LinkRequest | LeaseRequest | LeaseRelease,
        kind: type[M],
        give_up: float,
    ) -> M:
        subject = self._bus.subjects.link(holder)
        return await self._bus.request(subject, ask, kind, timeout_s=_left_s(give_up))


def _left_s(give_up: float) -> float:
    """What is left, and a moment at the least: who has no time left is told so by what takes too long."""
    return max(give_up - time.monotonic(), 0.001)


def _close(opening: asyncio.Future[Link]) -> None:
    """Nobody waited for this link any more."""
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()
