"""Where the last stage lays a step's logits for rank 0: shared memory, anonymous, as large as it has ever had to be.

One writer, one reader, step after step in turn over a few slots, each a file of its own that grows with need. The
reader gets the memory itself, not a copy. An eventfd counts what is there; the turn itself keeps the writer off what
is being read, because no more steps are on their way than there are slots but one. This module must not know what the
numbers are.
"""

from __future__ import annotations

import mmap
import os
import select

import numpy as np

from services.worker.flowserve.decoder import Floats


class Board:
    """One end, made from the descriptors that `make_board` returned, in any process that inherited them."""

    def __init__(self, slots: tuple[int, ...], laid: int) -> None:
        self._slots = slots
        self._laid = laid
        self._memory: list[mmap.mmap | None] = [None] * len(slots)
        self._turn = 0

    def write(self, values: Floats) -> None:
        """Lay down the next [rows, columns]."""
        self._next(values.shape)[...] = values
        os.eventfd_write(self._laid, 1)

    def read(self, shape: tuple[int, int], *, timeout_s: float) -> Floats | None:
        """The next [rows, columns], once it is there; valid until the next but as many calls as there are slots but
        one. None if it does not come in time."""
        poll = select.poll()
        poll.register(self._laid, select.POLLIN)
        if not poll.poll(timeout_s * 1000):
            return None
        os.eventfd_read(self._laid)
        return self._next(shape)

    def _next(self, shape: tuple[int, ...]) -> Floats:
        index, size = self._turn, int(np.prod(shape)) * 4
        self._turn = (index + 1) % len(self._slots)
        if not size:
            return np.empty(shape, np.float32)
        memory, fd = self._memory[index], self._slots[index]
        if memory is None or len(memory) < size:
            if os.fstat(fd).st_size < size:
                os.ftruncate(fd, size)
            # The old mapping goes when the last array over it does.
            memory = self._memory[index] = mmap.mmap(fd, size)
        return np.frombuffer(memory, np.float32, count=size // 4).reshape(shape)


def make_board(num_slots: int) -> tuple[tuple[int, ...], int]:
    """The descriptors of a board: its slots, and the count of what was laid down."""
    slots = tuple(os.memfd_create("deepflow-logits") for _ in range(num_slots))
    return slots, os.eventfd(0, os.EFD_SEMAPHORE)
