"""The side that has the bytes: answers what peers ask over their connections, one thread to each.

Bodies of frames, little-endian:
- READ: number of pieces u32, remaining ms u32, then per piece region, generation, offset, length (u64 each). Answered
  by CHUNKs (length u32, XXH3-64 of the bytes u64; then the bytes), WAITINGs while a region is still filling, and DONE
  once every piece is sent and every region has still the generation asked for; or, anywhere, FAULT (fault NUL message).
- MAP: region u64, schemes of backends the reader has, comma-separated. Answered by MAPPED: bytes u64, still filling u8,
  and the way: "", "file" (the descriptor comes with the frame), or scheme NUL handle.
- CHECK: as READ; answered by WAITINGs and DONE or FAULT once all those bytes have been there in that generation.

It must not know how a connection was made, nor which link it belongs to.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Iterator, Sequence
from typing import Final

import xxhash

from shared.distflow.backend import Backend
from shared.distflow.channel import Channel, Kind, Remaining, within
from shared.distflow.egress import Egress
from shared.distflow.faults import Fault, TransferError
from shared.distflow.memory import Memory
from shared.distflow.region import Entry, Table

CHUNK_BYTES: Final = 512 << 10  # stays in the processor's cache between checksum and copy
COUNT: Final = struct.Struct("<II")
PIECE: Final = struct.Struct("<QQQQ")
CHUNK: Final = struct.Struct("<IQ")
MAP: Final = struct.Struct("<Q")
MAPPED: Final = struct.Struct("<QB")
WAY_FILE: Final = b"file"
_WAITING_S: Final = 0.1  # how often a waiting reader is told that its source is alive
_ANSWER_S: Final = 5.0  # for a small frame to get into the socket


class Holder:
    """Serves one connection until it ends."""

    def __init__(
        self, channel: Channel, table: Table, backends: Sequence[Backend], egress: Egress
    ) -> None:
        self._channel = channel
        self._table = table
        self._backends = backends
        self._egress = egress
        self._staging: dict[int, memoryview] = {}

    def serve(self) -> None:
        """Answer until the peer goes. Raises TransferError when it did, or says what it may not."""
        while True:
            kind, body, fd = self._channel.receive(None)
            if fd is not None:
                os.close(fd)
                raise TransferError(Fault.TAMPERED, "a reader has no descriptors to give")
            if kind == Kind.READ:
                self._answer_read(body)
            elif kind == Kind.CHECK:
                self._answer_check(body)
            elif kind == Kind.MAP:
                self._answer_map(body)
            else:
                raise TransferError(Fault.TAMPERED, f"a reader does not send {kind.name}")

    def _answer_read(self, body: memoryview) -> None:
        pieces, remaining = _asked(body)
        try:
            for region, generation, offset, length in pieces:
                self._table.check(region, generation, offset, length)
            for region, generation, offset, length in pieces:
                for start in range(offset, offset + length, CHUNK_BYTES):
                    size = min(CHUNK_BYTES, offset + length - start)
                    self._wait(region, generation, start, size, remaining)
                    if self._table.get(region).bulk:
                        self._wait_turn(size, remaining)
                    self._send_chunk(region, start, size, remaining)
            for region, generation, offset, length in pieces:
                self._table.check(region, generation, offset, length)
            self._channel.send(Kind.DONE, b"", remaining)
        except TransferError as error:
            self._say(error)

    def _answer_check(self, body: memoryview) -> None:
        pieces, remaining = _asked(body)
        try:
            for region, generation, offset, length in pieces:
                self._wait(region, generation, offset, length, remaining)
            self._channel.send(Kind.DONE, b"", remaining)
        except TransferError as error:
            self._say(error)

    def _answer_map(self, body: memoryview) -> None:
        (region,) = MAP.unpack_from(body)
        schemes = bytes(body[MAP.size :]).decode().split(",")
        try:
            entry = self._table.get(region)
            fd = self._table.descriptor(region) if self._channel.passes_files else None
        except TransferError as error:
            self._say(error)
            return
        size = MAPPED.pack(entry.num_bytes, entry.filling)
        if fd is not None:
            try:
                self._channel.send(Kind.MAPPED, size + WAY_FILE, within(_ANSWER_S), fd=fd)
            finally:
                os.close(fd)
            return
        for backend in self._backends:
            handle = backend.export(entry.memory) if backend.scheme in schemes else None
            if handle is not None:
                way = backend.scheme.encode() + b"\0" + handle
                self._channel.send(Kind.MAPPED, size + way, within(_ANSWER_S))
                return
        self._channel.send(Kind.MAPPED, size, within(_ANSWER_S))

    def _wait(
        self, region: int, generation: int, offset: int, length: int, remaining: Remaining
    ) -> None:
        """Until these bytes are there, telling the reader now and then. Raises TransferError."""
        while True:
            wait_s = min(remaining(), _WAITING_S)
            if self._table.wait(region, generation, offset, length, wait_s) is not None:
                return
            self._channel.send(Kind.WAITING, b"", remaining)

    def _wait_turn(self, size: int, remaining: Remaining) -> None:
        """Until this chunk may go, telling the reader now and then. Raises TransferError."""
        wait_s = self._egress.book(size)
        while wait_s > 0:
            nap_s = min(wait_s, _WAITING_S, remaining())
            time.sleep(nap_s)
            wait_s -= nap_s
            if wait_s > 0:
                self._channel.send(Kind.WAITING, b"", remaining)

    def _send_chunk(self, region: int, start: int, size: int, remaining: Remaining) -> None:
        entry = self._table.get(region)
        view = entry.view
        chunk = (
            self._load(region, entry, start, size) if view is None else view[start : start + size]
        )
        body = CHUNK.pack(size, xxhash.xxh3_64_intdigest(chunk))
        self._channel.send(Kind.CHUNK, body, remaining, payload=chunk)

    def _load(self, region: int, entry: Entry, start: int, size: int) -> memoryview:
        memory = entry.memory
        assert isinstance(memory, Memory)
        try:
            with self._table.loading(region):
                staging = self._staging.get(region)
                if staging is None:
                    staging = memoryview(memory.staging(CHUNK_BYTES)).cast("B")
                    self._staging = {region: staging}  # of one device's memory at a time
                memory.load(start, staging[:size])
        except TransferError:
            raise
        except Exception as error:
            raise TransferError(Fault.FAILED, f"region {region} cannot be read") from error
        return staging[:size]

    def _say(self, error: TransferError) -> None:
        """Tell the reader why, unless that is in the middle of a frame. Raises TransferError then."""
        if not self._channel.in_step:
            raise error
        body = error.fault.encode() + b"\0" + error.message.encode()
        self._channel.send(Kind.FAULT, body, within(_ANSWER_S))


def _asked(body: memoryview) -> tuple[list[tuple[int, int, int, int]], Remaining]:
    """The pieces of a READ or CHECK and its deadline. Raises TransferError."""
    num_pieces, remaining_ms = COUNT.unpack_from(body)
    if len(body) != COUNT.size + num_pieces * PIECE.size:
        raise TransferError(Fault.TAMPERED, "a request is not as long as it says")
    return list(_pieces(body)), within(remaining_ms / 1000)


def _pieces(body: memoryview) -> Iterator[tuple[int, int, int, int]]:
    yield from PIECE.iter_unpack(body[COUNT.size :])
