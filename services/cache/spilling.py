"""Which pages are to be copied to the SSD before they are evicted. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Final

from services.cache.extent import Extent
from shared.arena.segment import PageKind
from shared.rtc_messages import Slot

_MAX_SCAN: Final = 128  # of a segment: what two batches may evict until it is looked at again


@dataclass(frozen=True, slots=True)
class Victim:
    """A page that will be evicted before others and is worth a copy on the SSD."""

    kind: PageKind
    page_hash: bytes
    slot: Slot


def victims(extents: Iterable[Extent], limit: int, *, every: bool) -> list[Victim]:
    """Up to `limit` of the coldest pages that were used again since they were stored (or `every` one), and of which no
    copy is known to be on the SSD. In each segment the coldest are looked at, as each holder evicts from its own."""
    found: list[Victim] = []
    for extent in sorted(extents, key=Extent.age):
        for index, num_uses, spilled in islice(extent.by_age(), _MAX_SCAN):
            if len(found) >= limit:
                return found
            if not spilled and (every or num_uses):
                found.append(Victim(extent.kind, extent.hashes[index], extent.slot(index)))
    return found
