"""The segments of an arena: opened, made within the byte budget, removed. This module must not know pages.

Memory is taken when a segment is made, so a tmpfs without room refuses then (and is asked again after SHORTAGE_S);
until then the arena makes do with what it has.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from heapq import heapify, heappush, heapreplace
from pathlib import Path
from typing import Final

from services.cache.extent import INDEX_BITS, NEVER, Extent
from shared.arena.segment import (
    Layout,
    PageKind,
    SegmentError,
    create_segment,
    leftovers,
    new_name,
    path_of,
    remove_unlocked,
    segment_names,
)
from shared.log import note

SHORTAGE_S: Final = 30.0
MAX_SEGMENTS: Final = (
    256  # each costs every process that reads it a descriptor; larger arenas have larger ones
)


class Coldest:
    """Some segments, the best one for a further page first: one with a free slot, else that with the coldest page.
    Right for as long as they only fill and get warmer: a heap, whose entries are corrected when they come up."""

    def __init__(self, extents: Iterable[Extent]) -> None:
        self._heap = [(_rank(extent), extent.number, extent) for extent in extents]
        heapify(self._heap)

    def add(self, extent: Extent) -> None:
        """One more."""
        heappush(self._heap, (_rank(extent), extent.number, extent))

    def first(self) -> Extent | None:
        """The best one; None if there are none."""
        while self._heap:
            rank, number, extent = self._heap[0]
            if rank == (now := _rank(extent)):
                return extent
            heapreplace(self._heap, (now, number, extent))
        return None

    def age(self) -> int:
        """When the coldest page of the best one was used last; NEVER if none may go."""
        extent = self.first()
        return NEVER if extent is None else extent.age()


def _rank(extent: Extent) -> int:
    return -1 if extent.num_free else extent.age()


class Extents:
    """All segments of one folder, of at most `max_bytes` together; made `segment_bytes` large or larger.

    `num_bytes` counts files in use that cannot be read too (another version's, whose writer lives).
    """

    def __init__(self, directory: Path, *, max_bytes: int, segment_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.segment_bytes = max(segment_bytes, max_bytes // MAX_SEGMENTS)
        self.num_bytes = 0
        self.num_shortages = 0
        self.by_number: dict[int, Extent] = {}
        self._directory = directory
        self._numbers: dict[str, int] = {}
        self._num_opened = 0
        self._short_until = 0.0
        self._foreign: dict[str, int] = {}  # name -> bytes

    def __iter__(self) -> Iterator[Extent]:
        return iter(list(self.by_number.values()))

    def named(self, name: str) -> Extent | None:
        """The segment of this name."""
        return self.by_number.get(self._numbers.get(name, -1))

    def at(self, place: int) -> tuple[Extent, int]:
        """The segment and slot of a place that exists."""
        return self.by_number[place >> INDEX_BITS], place & (1 << INDEX_BITS) - 1

    @property
    def full(self) -> bool:
        """Whether no further segment fits in the budget. The first one may be smaller than the others."""
        return bool(self.by_number) and self.num_bytes + self.segment_bytes > self.max_bytes

    @property
    def budget_bytes(self) -> int:
        """The budget; what there is while the file system has no room for more."""
        return self.num_bytes if self._short_until else self.max_bytes

    def load(self) -> Iterator[Extent]:
        """Opens the segments that the folder has; removes what is left of others that nobody uses."""
        for path in leftovers(self._directory):
            path.unlink(missing_ok=True)  # its maker was killed
        for name in segment_names(self._directory):
            try:
                yield self._open(name)
            except SegmentError as error:
                note("arena_segment_refused", segment=name, error=str(error))
                self._discard(name)

    def retry(self) -> None:
        """Removes files of others that nobody uses any more."""
        for name in list(self._foreign):
            self.num_bytes -= self._foreign.pop(name)
            self._discard(name)

    def fits(self, kind: PageKind) -> bool:
        """Whether a segment can hold a page of this kind at all."""
        return Layout.fit(kind, min(self.segment_bytes, self.max_bytes)) is not None

    def grow(self, kind: PageKind, now: float) -> Extent | None:
        """A new segment; None if the budget or the file system has no room for it."""
        if self.full or now < self._short_until:
            return None
        room = min(self.segment_bytes, self.max_bytes - self.num_bytes)
        layout = Layout.fit(kind, room)
        if layout is None:
            return None
        name = new_name()
        try:
            create_segment(self._directory, name, layout)
            extent = self._open(name)
        except (OSError, SegmentError, ValueError) as error:
            path_of(self._directory, name).unlink(missing_ok=True)  # made, but not to be opened
            self.num_shortages += 1
            self._short_until = now + SHORTAGE_S
            note("arena_short", error=str(error), bytes=self.num_bytes, budget=self.max_bytes)
            return None
        self._short_until = 0.0
        return extent

    def remove(self, extent: Extent) -> None:
        """Forgets a segment, which has no pages any more, and unlinks its file; who has it mapped has it still."""
        del self.by_number[extent.number], self._numbers[extent.name]
        self.num_bytes -= extent.layout.num_bytes
        self._short_until = 0.0  # there is room now
        extent.unlink(self._directory)
        extent.close()

    def close(self) -> None:
        """Closes the files; they stay."""
        for extent in self:
            extent.close()
        self.by_number.clear()
        self._numbers.clear()

    def ledger(self) -> dict[str, dict[str, int]]:
        """Slots by kind of page and use."""
        ledger: dict[str, dict[str, int]] = {}
        for extent in self:
            kind = extent.kind
            row = ledger.setdefault(
                f"{kind.model}/{kind.recipe}/{kind.slot_bytes}",
                dict.fromkeys(("total", "cached", "kept", "leased", "writing", "free"), 0),
            )
            kept, leased = len(extent.keeps), len(extent.leases.keys() - extent.keeps.keys())
            row["total"] += extent.num_slots
            row["cached"] += extent.num_cached - kept - leased
            row["kept"] += kept
            row["leased"] += leased
            row["writing"] += extent.num_writing
            row["free"] += extent.num_free
        return ledger

    def rows(self) -> list[dict[str, object]]:
        """Each segment, for people."""
        return [
            {
                "segment": extent.name,
                "model": extent.kind.model,
                "holder": extent.holder,
                "locked": extent.locked,
                "slots": extent.num_slots,
                "cached": extent.num_cached,
                "writing": extent.num_writing,
            }
            for extent in self
        ]

    def check(self) -> None:
        """Raises AssertionError if the account does not balance."""
        sizes = [extent.layout.num_bytes for extent in self]
        assert self.num_bytes == sum(sizes) + sum(self._foreign.values())
        assert self._numbers == {extent.name: extent.number for extent in self}

    def _open(self, name: str) -> Extent:
        self._num_opened += 1
        extent = Extent(self._directory, name, self._num_opened)
        self.by_number[extent.number] = extent
        self._numbers[name] = extent.number
        self.num_bytes += extent.layout.num_bytes
        return extent

    def _discard(self, name: str) -> None:
        """Removes a file that is no segment of this version, unless somebody has it locked: then its bytes count."""
        num_bytes = remove_unlocked(self._directory, name)
        if num_bytes:
            self._foreign[name] = num_bytes
            self.num_bytes += num_bytes
