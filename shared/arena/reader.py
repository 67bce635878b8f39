"""Reading pages out of segments that other processes write to, and believing none of them.

What is copied out counts only if the slot's header was whole, committed, of the generation and page asked for, if the
bytes that arrived have its checksum, and if the header is still the same afterwards. Everything else is a miss, which
costs a recomputation: a slot given to another page, a writer killed in mid-write, a damaged or vanished file.

This module must not know how a slot was found.
"""

from __future__ import annotations

import mmap
import os
import threading
from pathlib import Path

import numpy as np

from shared.arena.segment import (
    SLOT_HEADER_BYTES,
    Buffer,
    SegmentError,
    SlotHeader,
    committed,
    copy,
    open_segment,
    path_of,
)
from shared.rtc_messages import Slot


class ReadSegment:
    """A segment mapped for reading; unmapped when the last reference goes. Raises SegmentError if it is not whole."""

    def __init__(self, directory: Path, name: str) -> None:
        self.name = name
        fd, self.layout = open_segment(directory, name)
        try:
            self._map = mmap.mmap(fd, self.layout.num_bytes, prot=mmap.PROT_READ)
        except (OSError, ValueError) as error:
            raise SegmentError(f"{name}: {error}") from error
        finally:
            os.close(fd)
        self._bytes = np.frombuffer(self._map, np.uint8)
        # Of the layout, once: a page takes little longer to copy than these to compute.
        self._num_bytes = self.layout.num_bytes
        self._payloads, self._stride = self.layout.payloads, self.layout.stride
        self._path = str(path_of(directory, name))

    @property
    def buffer(self) -> memoryview:
        """The whole file, read-only. Nothing in it is checked: `Layout.payload` says where a slot's bytes are."""
        return memoryview(self._map)

    def header(self, index: int) -> SlotHeader | None:
        """What slot `index` says of itself; None for one that is not whole. Raises IndexError for no slot."""
        return SlotHeader.unpack(self._raw_header(index))

    def read(self, slot: Slot, page_hash: bytes, out: Buffer) -> bool:
        """Copies a page into `out`, which has exactly its length. False (and anything in `out`) if it is not there."""
        if not 0 <= slot.index < self.layout.num_slots:
            return False
        target = np.frombuffer(out, np.uint8)
        if len(target) > self.layout.kind.slot_bytes:
            return False
        raw = self._raw_header(slot.index)
        checksum = committed(raw, slot.generation, page_hash, len(target))
        if checksum is None:
            return False
        start = self._payloads + slot.index * self._stride
        source = self._bytes[start : start + len(target)]
        found = copy(source, target, target, slot.generation)
        return found == checksum and self._raw_header(slot.index) == raw

    def gone(self) -> bool:
        """Whether the file has been unlinked (the mapping holds its memory until it goes), or was tampered with."""
        try:
            return os.stat(self._path, follow_symlinks=False).st_size < self._num_bytes
        except OSError:
            return True

    def _raw_header(self, index: int) -> bytes:
        head = self.layout.header(index)
        return self._map[head : head + SLOT_HEADER_BYTES]


class Reader:
    """All segments of an arena, mapped when they are first read. Safe to use from several threads."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._segments: dict[str, ReadSegment] = {}
        self._lock = threading.Lock()

    def read(self, slot: Slot, page_hash: bytes, out: Buffer) -> bool:
        """Copies the page in a slot into `out`, which has exactly its length and is writable. False if it is not (or
        no longer) there, whatever the reason; then `out` may hold anything."""
        segment = self.segment(slot.segment)
        return segment is not None and segment.read(slot, page_hash, out)

    def segment(self, name: str) -> ReadSegment | None:
        """A segment of the arena, mapped; None if there is no such, or not any more."""
        with self._lock:
            segment = self._segments.get(name)
            if segment is not None and segment.gone():
                del self._segments[name]
                return None
            if segment is None:
                try:
                    segment = ReadSegment(self._directory, name)
                except SegmentError:
                    return None
                self._segments[name] = segment
            return segment

    def sweep(self) -> None:
        """Lets go of segments whose files are gone: until then their memory is not free. Call it now and then."""
        with self._lock:
            for name in [name for name, segment in self._segments.items() if segment.gone()]:
                del self._segments[name]

    def close(self) -> None:
        """Lets go of all of them."""
        with self._lock:
            self._segments.clear()
