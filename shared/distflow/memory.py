"""What a region is made of and a piece is read into: host memory, or a device's memory staged through the host.

It must not know how bytes travel, nor any device: what implements `Memory` for one is handed in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeAlias, runtime_checkable

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer


@runtime_checkable
class Memory(Protocol):
    """Memory the host cannot address. Both calls block until the bytes are where they belong and may be made from
    any thread; what they raise fails the transfer."""

    @property
    def num_bytes(self) -> int:
        """How large it is."""

    def staging(self, num_bytes: int) -> WriteableBuffer:
        """Host memory that this device copies to and from at its best (pinned, say)."""

    def load(self, offset: int, into: memoryview) -> None:
        """Device -> host: fill `into` with the bytes from `offset` on."""

    def save(self, offset: int, data: memoryview) -> None:
        """Host -> device: write `data` at `offset`."""


Source: TypeAlias = "ReadableBuffer | Memory"
Destination: TypeAlias = "WriteableBuffer | Memory"


def readable(buffer: ReadableBuffer) -> memoryview:
    """Its bytes, flat. Raises TypeError for what is not contiguous."""
    return memoryview(buffer).cast("B")


def writable(buffer: WriteableBuffer) -> memoryview:
    """Its bytes, flat. Raises TypeError for what is not contiguous or may not be written to."""
    view = memoryview(buffer).cast("B")
    if view.readonly:
        raise TypeError("the destination of a transfer is read-only")
    return view


def num_bytes_of(memory: Destination | Source) -> int:
    """The size of either kind."""
    return memory.num_bytes if isinstance(memory, Memory) else memoryview(memory).nbytes
