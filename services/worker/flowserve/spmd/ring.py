"""A ring in shared memory: one writer, many readers, each of which gets every record, in order. Linux only.

The bytes lie in an anonymous file (memfd) and two eventfds for each reader count them: `filled`, up by what was
written, and `freed`, up by what was read. All of it is handed down by descriptor, so it has no name that could be left
behind, and vanishes with its last holder. A reader sleeps in the kernel until there is something: that costs some tens
of microseconds a step, against milliseconds that the step takes, and leaves the cores to those who compute, where
spinning would take one from each rank even while nothing is to do. The system calls also order the bytes before their
count on processors that reorder stores (aarch64), which a position in shared memory would not.

A record larger than the ring passes through it in parts. This module must not know what a record means.
"""

from __future__ import annotations

import mmap
import os
import select
import struct
import time
from typing import Final

CAPACITY: Final = 1 << 20
_LENGTH: Final = struct.Struct("<I")


class Stalled(Exception):
    """A reader is a whole ring behind and took nothing for as long as the writer would wait."""

    def __init__(self, reader: int) -> None:
        super().__init__(f"reader {reader} does not read")
        self.reader = reader


class RingWriter:
    """The writer's end, which makes the ring. For one thread."""

    def __init__(self, num_readers: int, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self._fd = os.memfd_create("deepflow-ring")
        os.ftruncate(self._fd, capacity)
        self._memory = mmap.mmap(self._fd, capacity)
        self._offset = 0
        self._filled = [os.eventfd(0) for _ in range(num_readers)]
        self._freed = [os.eventfd(0) for _ in range(num_readers)]
        self._room = [capacity] * num_readers  # as far as we have looked; there may be more

    def handles(self, reader: int) -> tuple[int, int, int]:
        """The descriptors that make a `RingReader` in the process that inherits them."""
        return self._fd, self._filled[reader], self._freed[reader]

    def write(self, record: bytes, *, timeout_s: float) -> None:
        """Give `record` to every reader. Raises Stalled if one of them makes no room within `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        left = memoryview(_LENGTH.pack(len(record)) + record)
        while left:
            for reader, room in enumerate(self._room):
                if room < len(left):
                    self._look(reader, deadline)
            size = min(len(left), *self._room)
            self._copy(left[:size])
            left = left[size:]
            for reader, filled in enumerate(self._filled):
                self._room[reader] -= size
                os.eventfd_write(filled, size)

    def close(self) -> None:
        """Let go of memory and descriptors."""
        self._memory.close()
        for fd in (self._fd, *self._filled, *self._freed):
            os.close(fd)

    def _look(self, reader: int, deadline: float) -> None:
        """Take note of what `reader` has freed; wait for it if there is no room at all."""
        poll = select.poll()
        poll.register(self._freed[reader], select.POLLIN)
        wait_s = max(0.0, deadline - time.monotonic()) if not self._room[reader] else 0.0
        if poll.poll(wait_s * 1000):
            self._room[reader] += os.eventfd_read(self._freed[reader])
        elif not self._room[reader]:
            raise Stalled(reader)

    def _copy(self, part: memoryview) -> None:
        head = min(len(part), self._capacity - self._offset)
        self._memory[self._offset : self._offset + head] = part[:head]
        self._memory[: len(part) - head] = part[head:]
        self._offset = (self._offset + len(part)) % self._capacity


class RingReader:
    """One reader's end, from the descriptors it inherited. For one thread."""

    def __init__(self, memory: int, filled: int, freed: int) -> None:
        self._capacity = os.fstat(memory).st_size
        self._memory = mmap.mmap(memory, self._capacity, prot=mmap.PROT_READ)
        self._filled = filled
        self._freed = freed
        self._offset = 0
        self._available = 0
        self._taken = 0  # read, but not given back yet

    def read(self) -> bytes:
        """The next record; waits for it."""
        (length,) = _LENGTH.unpack(self._take(_LENGTH.size))
        record = self._take(length)
        self._give_back()
        return record

    def _take(self, size: int) -> bytes:
        parts = []
        while size:
            if not self._available:
                self._give_back()  # the writer may need the room for what we wait for
                self._available = os.eventfd_read(self._filled)
            part = min(size, self._available, self._capacity - self._offset)
            parts.append(self._memory[self._offset : self._offset + part])
            self._offset = (self._offset + part) % self._capacity
            self._available -= part
            self._taken += part
            size -= part
        return b"".join(parts)

    def _give_back(self) -> None:
        if self._taken:
            os.eventfd_write(self._freed, self._taken)
            self._taken = 0
