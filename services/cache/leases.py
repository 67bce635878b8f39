"""What others may read of this host's arena: links, and leases on pages, which pin them for a while.

Control goes over the bus (`link.<this service>`), the bytes over DistFlow straight out of the mapped segments. A lease
covers pages of one segment, for a region is one; who wants more asks again for the rest. This module must not know what
the pages are wanted for.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass
from typing import Final

from services.cache.host import Host, kind_of
from shared.arena.reader import ReadSegment
from shared.distflow.flow import DistFlow
from shared.distflow.region import Region
from shared.errors import NotFound, Overloaded
from shared.rtc_messages import (
    Leased,
    LeaseRelease,
    LeaseReleased,
    LeaseRequest,
    LinkOffer,
    LinkRequest,
)

Asked = LinkRequest | LeaseRequest | LeaseRelease

LEASE_S: Final = 10.0
MAX_LEASES: Final = 1024


@dataclass(frozen=True, slots=True)
class _Lease:
    by: str
    num_bytes: int
    until: float


class Leases:
    """The leases on one arena, at most `max_bytes` of it at a time."""

    def __init__(self, host: Host, flow: DistFlow, *, max_bytes: int) -> None:
        self._host = host
        self._flow = flow
        self._max_bytes = max_bytes
        self._leases: dict[str, _Lease] = {}
        self._num_bytes = 0
        self._regions: dict[str, tuple[ReadSegment, Region]] = {}  # by segment
        self.num_granted = 0
        self.num_refused = 0

    @property
    def num_leases(self) -> int:
        """Those that are held now."""
        return len(self._leases)

    @property
    def num_bytes(self) -> int:
        """What they pin, those that are being granted included."""
        return self._num_bytes

    async def answer(self, ask: Asked) -> LinkOffer | Leased | LeaseReleased:
        """Serves `link.<this service>`. Raises InvalidRequest, NotFound, Overloaded."""
        if isinstance(ask, LinkRequest):
            return self._flow.offer(ask.by)
        if isinstance(ask, LeaseRequest):
            return await self._lease(ask)
        return LeaseReleased(valid=await self._release(ask.lease))

    async def _lease(self, ask: LeaseRequest) -> Leased:
        kind = kind_of(ask)
        num_pages = min(len(ask.hashes), (self._max_bytes - self._num_bytes) // ask.slot_bytes)
        if len(self._leases) >= MAX_LEASES or (ask.hashes and num_pages <= 0):
            self.num_refused += 1
            raise Overloaded("others are reading as much as may be read at once", retry_after_s=1.0)
        # Taken before the wait, so that no number of requests at once passes the bound.
        name, until = secrets.token_hex(8), time.monotonic() + LEASE_S
        self._take(name, _Lease(ask.by, num_pages * ask.slot_bytes, until))
        held = []
        try:
            held = await self._host.lease(name, kind, ask.hashes[:num_pages], until)
            if not held:
                raise NotFound("none of these pages is here")
            segment, region = self._region(held[0][0].segment)
        except BaseException:
            self._drop(name)
            if held:
                await self._host.release(name)
            raise
        if not self._drop(name):  # its reader was declared dead meanwhile
            await self._host.release(name)
            raise NotFound("the lease is over already")
        self._take(name, _Lease(ask.by, len(held) * ask.slot_bytes, until))
        self.num_granted += 1
        return Leased(
            lease=name,
            region=region.id,
            generation=region.generation,
            page_bytes=ask.slot_bytes,
            offsets=[segment.layout.payload(slot.index) for slot, _ in held],
            ttl_ms=round(LEASE_S * 1000),
            seeds=[header.generation for _, header in held],
            checksums=[header.checksum for _, header in held],
        )

    def _region(self, name: str) -> tuple[ReadSegment, Region]:
        """A segment as a region that peers may read. Raises NotFound."""
        found = self._regions.get(name)
        if found is None:
            segment = self._host.segment(name)
            if segment is None:
                raise NotFound("the pages have just gone")
            found = self._regions[name] = (segment, self._flow.register(segment.buffer))
        return found

    # ------------------------------------------------------------------------------------------------------ their end

    async def _release(self, name: str) -> bool:
        known = self._drop(name)
        return await self._host.release(name) and known

    async def down(self, holder: str) -> None:
        """Whoever held leases is dead."""
        for name in [name for name, lease in self._leases.items() if lease.by == holder]:
            await self._release(name)

    async def sweep(self) -> None:
        """About once a second: what has run out ends, and what no file stands for any more is let go of."""
        now = time.monotonic()
        for name in [name for name, lease in self._leases.items() if lease.until <= now]:
            await self._release(name)
        for name, (segment, region) in list(self._regions.items()):
            if segment.gone():
                self._flow.unregister(region)
                del self._regions[name]

    def _take(self, name: str, lease: _Lease) -> None:
        self._leases[name] = lease
        self._num_bytes += lease.num_bytes

    def _drop(self, name: str) -> bool:
        lease = self._leases.pop(name, None)
        if lease is not None:
            self._num_bytes -= lease.num_bytes
        return lease is not None
