"""One segment of the arena as the store sees it: what each slot holds, which were used last, who may write there.

State per slot is a few machine words in arrays, for an arena of a million pages is ordinary; the order of use is a
doubly linked list in two of them. Pinned pages are not in that list, so the coldest page that may go is always at hand.
This module must not know which segment a page should go to.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path
from typing import Final

from shared.arena.segment import (
    SLOT_HEADER_BYTES,
    PageKind,
    SlotHeader,
    generation_of,
    open_segment,
    path_of,
    try_lock,
    unlock,
)
from shared.rtc_messages import Slot

INDEX_BITS: Final = (
    24  # a place in the arena is a segment's number and a slot's index, in one integer
)

NEVER: Final = 1 << 63  # beyond any stamp of use

_MAX_USES: Final = 127
_SPILLED: Final = 128  # bit beside the count of uses: a copy is on the SSD


class Use(IntEnum):
    """What a slot is used for: nothing, a page that somebody is to write, or a page that can be read."""

    FREE = 0
    WRITING = 1
    CACHED = 2


class Extent:
    """A segment: its file, its slots, its holder.

    `holder` is who was told to write here, or "" if that is not known. `locked` is whether the flock was taken when it
    was looked at last. Without a holder and without a lock it is an orphan: nobody can be writing. `granted_at` is when
    the holder was told; `wanted` whether it is to be given back.
    """

    def __init__(self, directory: Path, name: str, number: int) -> None:
        """Raises SegmentError if the file is not a whole one."""
        self.name = name
        self.number = number
        self._fd, self.layout = open_segment(directory, name)
        self.holder = ""
        self.locked = False
        self.granted_at = 0.0
        self.wanted = False
        num_slots = self.layout.num_slots
        self.uses = bytearray(num_slots)  # Use
        self.generations = array("Q", bytes(8 * num_slots))
        self.hashes: list[bytes] = [b""] * num_slots
        self.keeps: dict[int, int] = {}  # slot -> how many explicit caches hold it
        self.leases: dict[int, int] = {}  # slot -> how many readers elsewhere hold it
        self.num_cached = 0
        self.num_writing = 0
        self._free = list(range(num_slots - 1, -1, -1))
        self._listed = bytearray(
            b"\1" * num_slots
        )  # is in _free, though it may not be free any more
        self._stamps = array("Q", bytes(8 * num_slots))  # of the last use
        self._counts = bytearray(num_slots)  # uses, and _SPILLED
        self._next = array(
            "i", [num_slots] * (num_slots + 1)
        )  # order of use; the last entry is the ring's anchor
        self._prev = array("i", [num_slots] * (num_slots + 1))

    @property
    def kind(self) -> PageKind:
        """Of all pages in here."""
        return self.layout.kind

    @property
    def num_slots(self) -> int:
        """All slots."""
        return self.layout.num_slots

    @property
    def num_free(self) -> int:
        """Slots that hold nothing."""
        return self.num_slots - self.num_cached - self.num_writing

    @property
    def orphan(self) -> bool:
        """Nobody writes here, as far as is known."""
        return not self.holder and not self.locked

    # -------------------------------------------------------------------------------------------------------- the file

    def header(self, index: int) -> SlotHeader | None:
        """What the slot itself says; None if its header is not whole."""
        raw = os.pread(self._fd, SLOT_HEADER_BYTES, self.layout.header(index))
        return SlotHeader.unpack(raw) if len(raw) == SLOT_HEADER_BYTES else None

    def headers(self) -> Iterator[tuple[int, SlotHeader | None]]:
        """What all slots say, in the order in which they should be evicted if no use is known: as they were given out,
        but of those that were given out at once, which are a piece of a chain, the last one first."""
        batch: list[tuple[int, SlotHeader | None]] = []
        before = 0
        headers = [SlotHeader.unpack(raw) for raw in self._table()]
        generations = [header.generation if header else 0 for header in headers]
        for index in sorted(range(self.num_slots), key=generations.__getitem__):
            if generations[index] != before + 1:
                yield from reversed(batch)
                batch.clear()
            batch.append((index, headers[index]))
            before = generations[index]
        yield from reversed(batch)

    def last_written(self) -> int:
        """The latest generation of its slots, by their headers."""
        return max(map(generation_of, self._table()))

    def _table(self) -> list[bytes]:
        size = SLOT_HEADER_BYTES
        table = os.pread(self._fd, self.num_slots * size, self.layout.header(0))
        table = table.ljust(self.num_slots * size, b"\0")  # of a file that somebody has cut off
        return [table[start : start + size] for start in range(0, len(table), size)]

    def unlocked(self) -> bool:
        """Whether nobody can be writing: looks at the lock, taking it for a moment if it is free."""
        if try_lock(self._fd):
            unlock(self._fd)
            self.locked = False
            return True
        self.locked = True
        return False

    def gone(self) -> bool:
        """Whether the file was unlinked, or shortened, by somebody else."""
        info = os.fstat(self._fd)
        return info.st_nlink == 0 or info.st_size < self.layout.num_bytes

    def unlink(self, directory: Path) -> None:
        """Removes the file's name."""
        path_of(directory, self.name).unlink(missing_ok=True)

    def close(self) -> None:
        """Closes the file."""
        os.close(self._fd)

    # ------------------------------------------------------------------------------------------------------- the slots

    def slot(self, index: int) -> Slot:
        """What others are told of it."""
        return Slot(segment=self.name, index=index, generation=self.generations[index])

    def place(self, index: int) -> int:
        """The slot among those of all segments."""
        return self.number << INDEX_BITS | index

    def has(self, slot: Slot) -> bool:
        """Whether a page is here under these very words."""
        index = slot.index
        return (
            slot.segment == self.name
            and 0 <= index < self.num_slots
            and self.uses[index] == Use.CACHED
            and self.generations[index] == slot.generation
        )

    def pop_free(self) -> int:
        """A slot that is free, for the caller to use. There must be one."""
        while True:
            index = self._free.pop()
            self._listed[index] = 0
            if self.uses[index] == Use.FREE:
                return index

    def await_writing(self, index: int, generation: int, page_hash: bytes) -> None:
        """Somebody is to write, or is writing, this page to the slot, which was free."""
        self.uses[index] = Use.WRITING
        self.generations[index] = generation
        self.hashes[index] = page_hash
        self.num_writing += 1

    def store(self, index: int, generation: int, page_hash: bytes, stamp: int) -> None:
        """The slot holds this page. It held none before."""
        self.num_writing -= self.uses[index] == Use.WRITING
        self.num_cached += 1
        self.uses[index] = Use.CACHED
        self.generations[index] = generation
        self.hashes[index] = page_hash
        self._counts[index] = 0
        self._append(index, stamp)

    def clear(self, index: int) -> None:
        """The slot holds nothing (any more). Its generation stays, so that a late word about it is recognised."""
        if self.uses[index] == Use.CACHED:
            self.num_cached -= 1
            if not self.pinned(index):
                self._unlink(index)
            self.keeps.pop(index, None)
            self.leases.pop(index, None)
        self.num_writing -= self.uses[index] == Use.WRITING
        self.uses[index] = Use.FREE
        self.hashes[index] = b""
        if not self._listed[index]:
            self._listed[index] = 1
            self._free.append(index)

    def touch(self, index: int, stamp: int) -> None:
        """The page was used."""
        if not self.pinned(index):
            self._unlink(index)
            self._append(index, stamp)
        # Whatever copy there is may be gone before the page is cold again: then it is looked for anew.
        self._counts[index] = min((self._counts[index] & _MAX_USES) + 1, _MAX_USES)

    # ------------------------------------------------------------------------------------------------------------ pins

    def pinned(self, index: int) -> bool:
        """Whether the page must not be evicted."""
        return index in self.keeps or index in self.leases

    def pin(self, pins: dict[int, int], index: int) -> None:
        """One more reason, among `keeps` or `leases`, for the page to stay."""
        if not self.pinned(index):
            self._unlink(index)
        pins[index] = pins.get(index, 0) + 1

    def unpin(self, pins: dict[int, int], index: int, stamp: int) -> None:
        """One reason less."""
        pins[index] -= 1
        if not pins[index]:
            del pins[index]
            if not self.pinned(index):
                self._append(index, stamp)

    # ---------------------------------------------------------------------------------------------------- order of use

    def coldest(self) -> int | None:
        """The page that was not used for longest, of those that may go."""
        index = self._next[self.num_slots]
        return None if index == self.num_slots else index

    def age(self) -> int:
        """When the coldest page was used last; NEVER if none may go."""
        index = self._next[self.num_slots]
        return NEVER if index == self.num_slots else self._stamps[index]

    def last_use(self) -> int:
        """When any of the pages that may go was used last."""
        index = self._prev[self.num_slots]
        return 0 if index == self.num_slots else self._stamps[index]

    def by_age(self) -> Iterator[tuple[int, int, bool]]:
        """Pages that may go, coldest first: slot, uses since it was stored, and whether a copy is on the SSD."""
        index = self._next[self.num_slots]
        while index != self.num_slots:
            count = self._counts[index]
            yield index, count & _MAX_USES, bool(count & _SPILLED)
            index = self._next[index]

    def mark_spilled(self, index: int) -> None:
        """A copy of the page is on the SSD."""
        self._counts[index] |= _SPILLED

    def mark_useful(self, index: int) -> None:
        """The page counts as used again, whatever happens."""
        self._counts[index] = (
            max(self._counts[index] & _MAX_USES, 1) | self._counts[index] & _SPILLED
        )

    def check(self) -> None:
        """Raises AssertionError if the counts and lists do not agree with the slots."""
        uses = list(self.uses)
        assert self.num_cached == uses.count(Use.CACHED)
        assert self.num_writing == uses.count(Use.WRITING)
        ring = [index for index, _, _ in self.by_age()]
        assert len(ring) == len(set(ring))
        pinned = self.keeps.keys() | self.leases.keys()
        assert set(ring) == {i for i in range(self.num_slots) if uses[i] == Use.CACHED} - pinned
        assert all(uses[index] == Use.CACHED for index in pinned)
        assert set(self._free) == {i for i in range(self.num_slots) if self._listed[i]}
        assert all(self._listed[i] for i in range(self.num_slots) if uses[i] == Use.FREE)
        assert len(self._free) == len(set(self._free))

    def _append(self, index: int, stamp: int) -> None:
        anchor = self.num_slots
        last = self._prev[anchor]
        self._next[last] = self._prev[anchor] = index
        self._prev[index], self._next[index] = last, anchor
        self._stamps[index] = stamp

    def _unlink(self, index: int) -> None:
        before, after = self._prev[index], self._next[index]
        self._next[before], self._prev[after] = after, before
