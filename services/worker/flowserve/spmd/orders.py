"""What rank 0 tells the other executors, as records of the ring: make the cache, compute a step, end.

The first byte says which. This module must not know how records travel, nor how a step is encoded.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Final

_ALLOCATE: Final = struct.Struct("<BQI")


class Order(IntEnum):
    """The first byte of a record."""

    ALLOCATE = 1
    STEP = 2
    END = 3


def allocate(num_blocks: int, page: int) -> bytes:
    """The record that makes every rank's cache."""
    return _ALLOCATE.pack(Order.ALLOCATE, num_blocks, page)


def read_allocate(record: bytes) -> tuple[int, int]:
    """(num_blocks, page)."""
    _, num_blocks, page = _ALLOCATE.unpack(record)
    return num_blocks, page


def step(data: bytes) -> bytes:
    """The record of one encoded step."""
    return bytes((Order.STEP,)) + data


def end() -> bytes:
    """The record that lets every rank end."""
    return bytes((Order.END,))
