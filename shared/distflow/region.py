"""Regions: the memory an instance lets its peers read, named by number and generation, never by address.

A region may still be filling (a relay's): its readers are served as the bytes come. It must not know how a reader got
here.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from shared.distflow.faults import Fault, TransferError
from shared.distflow.memory import Destination, Memory, Source, num_bytes_of, readable
from shared.distflow.shm import reopen_read_only


@dataclass(frozen=True, slots=True)
class Region:
    """What a peer is told: which, as of which generation, and how large. A number is never used twice."""

    id: int
    generation: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Piece:
    """One run of bytes to be read: `length` bytes at `offset` of a peer's region, and the place they go to, which is
    exactly as long."""

    region: int
    generation: int
    offset: int
    length: int
    into: Destination = field(repr=False)


@dataclass(slots=True, eq=False)
class Entry:
    """A region at its holder. `available` is how many of its first bytes are there yet."""

    memory: Source
    view: memoryview | None  # None: not host memory
    fd: int | None
    num_bytes: int
    available: int
    bulk: bool = False  # it can wait: `Egress` bounds it
    generation: int = 1
    num_loads: int = 0
    failed: bool = False

    @property
    def filling(self) -> bool:
        """Whether bytes are still to come."""
        return self.available < self.num_bytes

    def close(self) -> None:
        """Give back the descriptor."""
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None


class Table:
    """All regions of one instance; any thread."""

    def __init__(self) -> None:
        self._changed: Final = threading.Condition()
        self._entries: dict[int, Entry] = {}
        self._last_id = 0

    def register(
        self, memory: Source, fd: int | None, *, filling: bool = False, bulk: bool = False
    ) -> Region:
        """A new region. `filling`: none of its bytes are there yet."""
        view = None if isinstance(memory, Memory) else readable(memory)
        num_bytes = num_bytes_of(memory)
        if not num_bytes:
            raise ValueError("a region of no bytes")
        with self._changed:
            self._last_id += 1
            available = 0 if filling else num_bytes
            if fd is not None:
                fd = reopen_read_only(
                    fd
                )  # whoever made the file may close his, and the number be another's
            self._entries[self._last_id] = Entry(memory, view, fd, num_bytes, available, bulk)
            return Region(self._last_id, 1, num_bytes)

    def renew(self, id: int) -> Region:
        """The next generation of it. Raises KeyError."""
        with self._changed:
            entry = self._entries[id]
            entry.generation += 1
            self._changed.notify_all()
            return Region(id, entry.generation, entry.num_bytes)

    def unregister(self, id: int) -> Entry | None:
        """Returns once nobody is reading from the device's memory any more."""
        with self._changed:
            entry = self._entries.pop(id, None)
            self._changed.notify_all()
            if entry is not None:
                entry.close()
                self._changed.wait_for(lambda: not entry.num_loads)
            return entry

    def advance(self, id: int, available: int) -> None:
        """So many bytes of a filling region are there now."""
        with self._changed:
            if id in self._entries:
                self._entries[id].available = available
                self._changed.notify_all()

    def fail(self, id: int) -> None:
        """The rest of a filling region will never come."""
        with self._changed:
            if id in self._entries:
                self._entries[id].failed = True
                self._changed.notify_all()

    def get(self, id: int) -> Entry:
        """Raises TransferError."""
        with self._changed:
            return self._get(id)

    def descriptor(self, id: int) -> int | None:
        """A read-only one of the region's file, which is the caller's to close. Raises TransferError."""
        with self._changed:
            fd = self._get(id).fd
            return None if fd is None else os.dup(fd)

    def check(self, id: int, generation: int, offset: int, length: int) -> Entry:
        """The region, if it has these bytes in this generation, now or soon. Raises TransferError."""
        with self._changed:
            return self._check(id, generation, offset, length)

    def wait(
        self, id: int, generation: int, offset: int, length: int, timeout_s: float
    ) -> Entry | None:
        """The region once it has these bytes; None if it has not after `timeout_s`. Raises TransferError."""
        with self._changed:
            entry = self._check(id, generation, offset, length)
            give_up = time.monotonic() + timeout_s
            while entry.available < offset + length:
                left_s = give_up - time.monotonic()
                if left_s <= 0:
                    return None
                self._changed.wait(left_s)
                entry = self._check(id, generation, offset, length)
            return entry

    @contextmanager
    def loading(self, id: int) -> Iterator[None]:
        """While a device's memory is being read: `unregister` waits for it. Raises TransferError."""
        with self._changed:
            entry = self._get(id)
            entry.num_loads += 1
        try:
            yield
        finally:
            with self._changed:
                entry.num_loads -= 1
                self._changed.notify_all()

    def clear(self) -> list[Entry]:
        """Forget all."""
        with self._changed:
            entries = list(self._entries.values())
            self._entries.clear()
            for entry in entries:
                entry.close()
            self._changed.notify_all()
            return entries

    def _get(self, id: int) -> Entry:
        entry = self._entries.get(id)
        if entry is None:
            raise TransferError(Fault.UNKNOWN_REGION, f"region {id} is not registered here")
        return entry

    def _check(self, id: int, generation: int, offset: int, length: int) -> Entry:
        entry = self._get(id)
        if entry.generation != generation:
            raise TransferError(
                Fault.STALE, f"region {id} has generation {entry.generation}, not {generation}"
            )
        if offset + length > entry.num_bytes:
            raise TransferError(
                Fault.OUT_OF_BOUNDS,
                f"region {id} has {entry.num_bytes} bytes, not {offset} + {length}",
            )
        if entry.failed and entry.available < offset + length:
            raise TransferError(Fault.FAILED, f"the rest of region {id} will not come")
        return entry
