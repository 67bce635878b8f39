"""Pages from other hosts' arenas, bit for bit what their writers once committed: each has the checksum it was written
with. How they are had is `Borrower`'s; this module must not know where they go, nor whether fetching them is wise.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import xxhash

from services.cache.host import Page
from shared.arena.segment import PageKind
from shared.borrower import Borrowed, Borrower
from shared.errors import Internal, Unavailable
from shared.rtc_messages import LeaseRequest


@dataclass(frozen=True, slots=True)
class Batch:
    """Pages that came, and how long it took to agree on them before the first byte moved."""

    pages: list[Page]
    start_s: float


class Exchange:
    """What this cache service reads of the others."""

    def __init__(self, borrower: Borrower) -> None:
        self._borrower = borrower

    @property
    def num_links(self) -> int:
        """To other cache services."""
        return self._borrower.num_links

    async def read(
        self, cache: str, kind: PageKind, hashes: list[bytes], timeout_s: float
    ) -> Batch:
        """The leading ones of these pages that `cache` has in one place, at least one. Raises as `Borrower.read`."""
        ask = LeaseRequest(
            by=self._borrower.name,
            model=kind.model,
            recipe=kind.recipe,
            hashes=hashes,
            slot_bytes=kind.slot_bytes,
        )
        borrowed = await self._borrower.read(cache, ask, kind.slot_bytes, timeout_s)
        await asyncio.to_thread(_check, borrowed)
        return Batch(list(zip(hashes, borrowed.pages, strict=False)), borrowed.start_s)

    async def forget(self, cache: str) -> None:
        """It is gone: close the link to it."""
        await self._borrower.forget(cache)


def _check(borrowed: Borrowed) -> None:
    """Raises Unavailable unless every page has the checksum it was written with, Internal if none was told."""
    pages, leased = borrowed.pages, borrowed.leased
    if {len(leased.offsets), len(leased.seeds), len(leased.checksums)} != {len(pages)}:
        raise Internal("pages came with other checksums than theirs")
    if min(*leased.seeds, *leased.checksums) < 0:
        raise Internal("pages came with impossible checksums")
    for page, seed, checksum in zip(pages, leased.seeds, leased.checksums, strict=True):
        if xxhash.xxh3_64_intdigest(page.data, seed=seed) != checksum:
            raise Unavailable("a page was not what its writer had committed")
