"""KV between the devices of TEs: what others read here, under a lease, and what is read of theirs, over DistFlow.

Control goes over the bus, `link.<te>` (`linking`): a lease on pages, its release. The bytes go from device to
device's host. A read counts only if its lease is proven to have held until the last byte was there: pages that were
given up in the middle are another sequence's by then. This module must not know what the pages are wanted for.
"""

from __future__ import annotations

import asyncio
import contextlib
from functools import partial
from itertools import count, takewhile
from typing import TYPE_CHECKING, Final

import numpy as np

from shared.borrower import Borrower, Pages
from shared.errors import InvalidRequest, NotFound, Overloaded
from shared.rtc_messages import (
    Leased,
    LeaseRelease,
    LeaseReleased,
    LeaseRequest,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from services.worker.flowserve.decoder import View
    from services.worker.flowserve.engine import Engine
    from services.worker.linking import Linking
    from services.worker.loop import EngineLoop
    from shared.bus import Bus
    from shared.distflow.region import Region

LEASE_S: Final = 5.0  # how long a peer may take to read one chunk
_CHUNK_BYTES: Final = 64 << 20  # of pages that are read at once, and then given to the device
_NUM_READS: Final = (
    2  # chunks on the way at a time: that times the above is what they take of the host
)
_NUM_STAGED: Final = 4  # copies of chunks for others to read


class Peers:
    """Both ends of the exchange between this TE and the others of its model."""

    def __init__(
        self, bus: Bus, loop: EngineLoop, linking: Linking, *, model: str, recipe: str
    ) -> None:
        self._loop = loop
        self._linking = linking
        self._flow = linking.flow
        self._te = linking.te
        self._model = model
        self._recipe = recipe
        self._page_bytes = 0
        self._region: Region | None = None  # None: the host cannot address the device's memory
        self._staged: dict[str, Region] = {}  # copies of pages of such a device, by lease
        self._num_staged = 0  # of these, with those that are being made
        self._numbers = count(1)
        self._borrower = Borrower(bus, linking.flow, linking.te)
        self._reads = asyncio.Semaphore(_NUM_READS)
        self.num_leases = 0  # reads granted so far

    def serve(self, engine: Engine) -> None:
        """Let others read what this engine's device holds."""
        self._page_bytes = engine.page_bytes
        memory = engine.memory()
        if memory is not None:
            self._region = self._flow.register(memory.data)
        self._linking.answer(LeaseRequest, self._lend)
        self._linking.answer(LeaseRelease, self._take_back)

    # ----------------------------------------------------------------------------------------------- what others read

    async def _lend(self, asked: LeaseRequest) -> Leased:
        """A lease on those of the pages that are here: the one that is named, a hand-over's, while it holds (without
        pages that is all that is asked), else one of the reader's own."""
        if (asked.model, asked.recipe) != (self._model, self._recipe):
            raise InvalidRequest("this TE computes other pages", param="recipe")
        if self._region is None:
            lease, region, places = await self._stage(asked.hashes)
        else:
            region = self._region
            lease, places = await self._loop.do(partial(_hold, asked))
        self.num_leases += bool(asked.hashes)
        return Leased(
            lease=lease,
            region=region.id,
            generation=region.generation,
            page_bytes=self._page_bytes,
            offsets=[place * self._page_bytes for place in places],
            ttl_ms=round(LEASE_S * 1000),
        )

    async def _take_back(self, asked: LeaseRelease) -> LeaseReleased:
        lease = asked.lease
        if lease in self._staged:
            self._unstage(lease)
            return LeaseReleased(valid=True)
        return LeaseReleased(valid=await self._loop.do(lambda engine: engine.release(lease)))

    async def _stage(self, hashes: list[bytes]) -> tuple[str, Region, list[int]]:
        """Of a device that the host cannot address, peers read a copy, which is kept for them as long as a lease."""
        if self._num_staged >= _NUM_STAGED:
            raise Overloaded("too many read from here already", retry_after_s=LEASE_S)
        done: asyncio.Future[Pages] = asyncio.get_running_loop().create_future()

        def save(pages: list[tuple[bytes, View]]) -> list[bytes]:
            views, found = dict(pages), []
            for page_hash in hashes:
                if page_hash not in views:  # gone, or just being copied to the arena
                    break
                found.append(views[page_hash])
            copy = np.concatenate(found) if found else np.empty(0, np.uint8)
            self._loop.call(_resolve, done, copy)
            return []

        self._num_staged += 1
        try:
            hashes = hashes[: max(1, _CHUNK_BYTES // self._page_bytes)]
            self._loop.post(lambda engine, _: engine.copy_out(hashes, save))
            pages = await done
        finally:
            self._num_staged -= 1
        if not len(pages):
            raise NotFound("none of these pages is here and at rest")
        lease = f"staged-{next(self._numbers)}"
        region = self._staged[lease] = self._flow.register(pages.data)
        self._num_staged += 1
        asyncio.get_running_loop().call_later(LEASE_S, self._unstage, lease)
        return lease, region, list(range(len(pages) // self._page_bytes))

    def _unstage(self, lease: str) -> None:
        region = self._staged.pop(lease, None)
        if region is not None:
            self._num_staged -= 1
            self._flow.unregister(region)

    # --------------------------------------------------------------------------------------------- what is read there

    @contextlib.asynccontextmanager
    async def read(
        self, peer: str, hashes: list[bytes], timeout_s: float, lease: str = ""
    ) -> AsyncIterator[Pages]:
        """The leading ones of these consecutive pages that `peer` has, as many as a chunk holds, proven to be whole:
        an array [pages, bytes]. Leave the block once they are where they belong: they take this host's memory.
        `lease`: one that holds them there already, which this does not end.

        Raises as `Borrower.read`.
        """
        async with self._reads:
            num_pages = max(1, _CHUNK_BYTES // self._page_bytes)
            ask = LeaseRequest(
                by=self._te,
                model=self._model,
                recipe=self._recipe,
                hashes=hashes[:num_pages],
                lease=lease,
            )
            yield (await self._borrower.read(peer, ask, self._page_bytes, timeout_s)).pages

    async def release(self, peer: str, lease: str) -> None:
        """Tell `peer` that what it leased is not wanted any more."""
        await self._borrower.give_back(peer, lease)


def _hold(asked: LeaseRequest, engine: Engine) -> tuple[str, list[int]]:
    """Of the engine's pages those that are asked for, held: the lease, and their blocks. Raises NotFound."""
    named = engine.leased(asked.lease) if asked.lease else None
    if named is not None:
        places = dict(zip(named.hashes, named.blocks, strict=True))
        blocks = [places[h] for h in takewhile(places.__contains__, asked.hashes)]
        if blocks or not asked.hashes:
            return named.id, blocks
    lease = engine.lease(asked.hashes, asked.by, LEASE_S) if asked.hashes else None
    if lease is None:
        raise NotFound("none of these pages is here, or too much is leased already")
    return lease.id, lease.blocks


def _resolve(done: asyncio.Future[Pages], pages: Pages) -> None:
    if not done.done():
        done.set_result(pages)
