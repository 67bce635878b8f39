"""Writing pages into segments: the one writer of a segment, which proves with a lock that it lives.

`WriteSegment` holds the file's exclusive flock for as long as it has the file mapped. Whoever finds the lock free knows
that no process can write there any more; whoever finds it taken must assume that one will, however long it was silent
(a stopped process goes on where it stood). So slots of a segment are only ever given to the holder of its lock.

A slot is written in the order header "writing", payload, header "committed": killed at any point, it is either not
committed or whole. This module must not know who decides which slot a page gets.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final, Self

import numpy as np

from shared.arena.segment import (
    SLOT_HEADER_BYTES,
    Buffer,
    Bytes,
    Layout,
    SegmentError,
    State,
    copy,
    generation_of,
    open_segment,
    pack_slot,
    try_lock,
)
from shared.rtc_messages import Slot

_LOCK_TRIES: Final = (
    50  # the cache service tries a lock for microseconds, to see whether it is free
)
_LOCK_RETRY_S: Final = 0.002


class WriteSegment:
    """A segment mapped for writing, and its lock. Safe to use from several threads; one writes at a time."""

    def __init__(self, name: str, fd: int, layout: Layout) -> None:
        self.name = name
        self.layout = layout
        # The mapping keeps a duplicate of the descriptor, so the lock goes when the mapping does, not before.
        self._map = mmap.mmap(fd, layout.num_bytes)
        self._bytes = np.frombuffer(self._map, np.uint8)
        self._payloads, self._stride = layout.payloads, layout.stride
        self._busy = threading.Lock()
        self._closed = False

    @classmethod
    def open(cls, directory: Path, name: str) -> Self:
        """Locks and maps a segment. Raises SegmentError if it is gone or not whole, or if another process has it."""
        fd, layout = open_segment(directory, name, writable=True)
        try:
            for attempt in range(_LOCK_TRIES):
                if try_lock(fd):
                    break
                if attempt + 1 < _LOCK_TRIES:
                    time.sleep(_LOCK_RETRY_S)
            else:
                raise SegmentError(f"{name}: another process writes to it")
            if not os.fstat(fd).st_nlink:
                raise SegmentError(f"{name}: unlinked")
            return cls(name, fd, layout)
        finally:
            os.close(fd)

    def write(self, slot: Slot, page_hash: bytes, data: Buffer) -> bool:
        """Puts a page into a slot and commits it. False if the slot has been given to a later generation meanwhile, or
        if the segment is closed. Raises ValueError for a page that is empty or too long, IndexError for no slot."""
        source = np.frombuffer(data, np.uint8)
        if not 0 < len(source) <= self.layout.kind.slot_bytes:
            raise ValueError(f"{len(source)} bytes in a slot of {self.layout.kind.slot_bytes}")
        head = self.layout.header(slot.index)
        start = self._payloads + slot.index * self._stride
        with self._busy:
            if self._closed or self._generation(head) >= slot.generation:
                return False
            self._put(head, pack_slot(State.WRITING, slot.generation, page_hash))
            check = self._copy(source, start, slot.generation)
            self._put(
                head, pack_slot(State.COMMITTED, slot.generation, page_hash, len(source), check)
            )
        return True

    def close(self) -> None:
        """Unmaps the segment, after a write that is under way, and gives up its lock."""
        with self._busy:
            if not self._closed:
                self._closed = True
                del self._bytes
                self._map.close()

    def _generation(self, head: int) -> int:
        return generation_of(self._map[head : head + SLOT_HEADER_BYTES])

    def _put(self, head: int, raw: bytes) -> None:
        self._map[head : head + SLOT_HEADER_BYTES] = raw

    def _copy(self, source: Bytes, start: int, generation: int) -> int:
        """Copies the page; its checksum: of the source, so that a source that changes meanwhile shows."""
        return copy(source, self._bytes[start : start + len(source)], source, generation)


class Writer:
    """The segments that this process writes to. Safe to use from several threads."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._segments: dict[str, WriteSegment] = {}

    @property
    def held(self) -> list[str]:
        """Names of the segments that this process has locked: `Copy.held`."""
        return list(self._segments)

    def lock(self, names: Iterable[str]) -> list[str]:
        """Opens the segments named (`Copied.granted`); those that cannot be had are given back, and not written to."""
        failed = []
        for name in names:
            if name in self._segments:
                continue
            try:
                self._segments[name] = WriteSegment.open(self._directory, name)
            except (SegmentError, OSError):
                failed.append(name)
        return failed

    def write(self, slot: Slot, page_hash: bytes, data: Buffer) -> bool:
        """Puts a page into a slot and commits it there. False if this process does not have the slot (any more): then
        it belongs into `Commit.dropped`. Raises as `WriteSegment.write` does."""
        segment = self._segments.get(slot.segment)
        return segment is not None and segment.write(slot, page_hash, data)

    def give_back(self, names: Iterable[str]) -> list[str]:
        """Closes those of the segments named (`Copied.wanted`) that are held; their names, for `Commit.returned`."""
        returned = []
        for name in names:
            segment = self._segments.pop(name, None)
            if segment is not None:
                segment.close()
                returned.append(name)
        return returned

    def close(self) -> list[str]:
        """Gives all of them back."""
        return self.give_back(self.held)
