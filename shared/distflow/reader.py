"""What one part of a transfer says and hears on a connection, and where it puts what comes.

Regions that are files of this host are mapped and copied, those that a common backend reaches are left to it, all
others come as chunks over the connection. It must not know how connections are made, or who else uses them.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import structlog
import xxhash

from shared.distflow.backend import Attached, Backend
from shared.distflow.channel import Channel, Kind, Remaining
from shared.distflow.faults import Fault, TransferError
from shared.distflow.holder import CHUNK, CHUNK_BYTES, COUNT, MAP, MAPPED, PIECE
from shared.distflow.memory import Memory, num_bytes_of, writable
from shared.distflow.region import Piece
from shared.distflow.shm import Mapped
from shared.distflow.ticket import Ticket

_COPY_BYTES: Final = 4 << 20  # between two looks at the deadline
_MIN_PART_BYTES: Final = 2 << 20  # less is not worth another thread
_MAX_PART_BYTES: Final = 1 << 30
_MAX_PART_PIECES: Final = 4096

_log = structlog.get_logger(__name__)


class Progress(Protocol):
    """Told how a transfer that is read in order gets on."""

    def landed(self, num_bytes: int) -> None:
        """So many bytes from the beginning are in their places."""

    def waiting(self) -> None:
        """The source is alive, but waits for them itself."""


@dataclass(frozen=True, slots=True)
class Run:
    """A piece or a part of one: `length` bytes at `offset` of the region go to `start` of `into`."""

    region: int
    generation: int
    offset: int
    length: int
    into: memoryview | Memory
    start: int = 0

    @property
    def view(self) -> memoryview:
        """The place, where that is host memory."""
        assert not isinstance(self.into, Memory)
        return self.into[self.start : self.start + self.length]


@dataclass(frozen=True, slots=True)
class Part:
    ticket: Ticket
    runs: Sequence[Run]
    progress: Progress | None


@dataclass(frozen=True, slots=True)
class Way:
    """How a region is reached: by the connection, unless one of the two is there."""

    num_bytes: int
    filling: bool = False
    mapped: Mapped | None = None
    attached: Attached | None = None


BY_CONNECTION: Final = Way(0)


class PartReader:
    """What one part of a transfer says and hears on a connection."""

    def __init__(self, channel: Channel, part: Part, remaining: Remaining) -> None:
        self._channel = channel
        self._progress = part.progress
        self._deadline = part.ticket.deadline
        self._remaining = remaining
        self._num_landed = self._num_unproven = 0
        self._staging: tuple[Memory, memoryview] | None = None
        self.answered = True  # nothing is on its way: another part may use the connection

    def map(self, region: int, backends: Mapping[str, Backend]) -> Way:
        """How the region can be reached without the connection, if it can. Raises TransferError."""
        self._ask(Kind.MAP, MAP.pack(region) + ",".join(backends).encode())
        body, fd = self._answer(Kind.MAPPED)
        self.answered = True
        if len(body) < MAPPED.size:
            if fd is not None:
                os.close(fd)
            raise TransferError(Fault.TAMPERED, "an answer is too short")
        num_bytes, filling = MAPPED.unpack_from(body)
        scheme, _, handle = bytes(body[MAPPED.size :]).partition(b"\0")
        if fd is not None:
            try:
                return Way(num_bytes, bool(filling), mapped=Mapped(fd, num_bytes))
            except (OSError, ValueError) as error:
                _log.warning("cannot map a peer's memory", error=str(error))
                return BY_CONNECTION
            finally:
                os.close(fd)
        backend = backends.get(scheme.decode())
        if backend is None:
            return BY_CONNECTION
        try:
            attached = backend.attach(handle, num_bytes, self._remaining())
        except TransferError as error:
            _log.warning("cannot attach a peer's memory", scheme=backend.scheme, error=str(error))
            return BY_CONNECTION
        return Way(num_bytes, bool(filling), attached=attached)

    def open_file(self, region: int) -> int | None:
        """The file that the region is, if this host has it: a descriptor for the caller to close. Raises
        TransferError."""
        self._ask(Kind.MAP, MAP.pack(region))
        _, fd = self._answer(Kind.MAPPED)
        self.answered = True
        return fd

    def copy(self, run: Run, way: Way) -> None:
        """Without the connection; `check` has to follow. Raises TransferError."""
        if run.offset + run.length > way.num_bytes:
            raise TransferError(
                Fault.OUT_OF_BOUNDS,
                f"region {run.region} has {way.num_bytes} bytes, not {run.offset} + {run.length}",
            )
        for done in range(0, run.length, _COPY_BYTES):
            size = min(_COPY_BYTES, run.length - done)
            part = Run(
                run.region, run.generation, run.offset + done, size, run.into, run.start + done
            )
            if way.filling or self._progress is not None:  # proves the part before, too
                self.check([part])
            if way.attached is not None:
                way.attached.read(part.offset, size, part.into, part.start, self._remaining())
            elif way.mapped is not None:
                self._remaining()
                _copy(way.mapped, part)
            self._landed(size)

    def receive(self, runs: Sequence[Run]) -> None:
        """Over the connection. Raises TransferError."""
        self._ask(Kind.READ, self._request(runs))
        for run in runs:
            done = 0
            while done < run.length:
                body, _ = self._answer(Kind.CHUNK)
                size, checksum = CHUNK.unpack(body)
                if not 0 < size <= min(CHUNK_BYTES, run.length - done):
                    raise TransferError(Fault.TAMPERED, "a chunk is larger than what was asked for")
                self._receive_chunk(run, done, size, checksum)
                done += size
                self._landed(size)
        self._answer(Kind.DONE)
        self.answered = True

    def check(self, runs: Sequence[Run]) -> None:
        """That all of it is there, in the generation asked for. Raises TransferError."""
        self._ask(Kind.CHECK, self._request(runs))
        self._answer(Kind.DONE)
        self.answered = True

    def _receive_chunk(self, run: Run, done: int, size: int, checksum: int) -> None:
        if isinstance(run.into, Memory):
            chunk = self._staging_of(run.into)[:size]
            self._receive_bytes(chunk, checksum)
            run.into.save(run.start + done, chunk)
        else:
            self._receive_bytes(run.view[done : done + size], checksum)

    def _receive_bytes(self, chunk: memoryview, checksum: int) -> None:
        self._channel.read_into(chunk, self._remaining)
        if xxhash.xxh3_64_intdigest(chunk) != checksum:
            raise TransferError(Fault.CORRUPT, "the bytes that came are not those that were sent")

    def _staging_of(self, memory: Memory) -> memoryview:
        """Of one device's memory at a time: pinning takes long."""
        if self._staging is None or self._staging[0] is not memory:
            self._staging = memory, memoryview(memory.staging(CHUNK_BYTES)).cast("B")
        return self._staging[1]

    def _landed(self, size: int) -> None:
        """They have come, but perhaps of another generation: it counts when the holder goes on after them."""
        self._num_unproven += size

    def _prove(self) -> None:
        if not self._num_unproven:
            return
        self._num_landed += self._num_unproven
        self._num_unproven = 0
        if self._progress is not None:
            self._progress.landed(self._num_landed)

    def _request(self, runs: Sequence[Run]) -> bytes:
        remaining_ms = max(1, int(1000 * (self._deadline - time.monotonic())))
        body = [COUNT.pack(len(runs), min(remaining_ms, 0xFFFFFFFF))]
        body += [PIECE.pack(run.region, run.generation, run.offset, run.length) for run in runs]
        return b"".join(body)

    def _ask(self, kind: Kind, body: bytes) -> None:
        self.answered = False
        self._channel.send(kind, body, self._remaining)

    def _answer(self, expected: Kind) -> tuple[memoryview, int | None]:
        """Its body and descriptor. Raises TransferError: among others, what the holder says instead."""
        while True:
            kind, body, fd = self._channel.receive(self._remaining)
            if (
                kind != Kind.FAULT
            ):  # before it sends anything else the holder looks at the generation
                self._prove()
            if kind == expected:
                return body, fd
            if fd is not None:
                os.close(fd)
            if kind == Kind.FAULT:
                self.answered = True
                fault, _, message = bytes(body).decode().partition("\0")
                raise TransferError(Fault(fault), message)
            if kind != Kind.WAITING:
                raise TransferError(Fault.TAMPERED, f"{kind.name} came, not {expected.name}")
            if self._progress is not None:
                self._progress.waiting()


def _copy(mapped: Mapped, run: Run) -> None:
    chunk = mapped.bytes[run.offset : run.offset + run.length]
    if isinstance(run.into, Memory):
        run.into.save(run.start, chunk.data)
    else:
        np.copyto(np.frombuffer(run.view, np.uint8), chunk)  # lets go of the interpreter meanwhile


def runs_of(pieces: Sequence[Piece]) -> list[Run]:
    """The work that a transfer is. Raises ValueError for what makes no sense whoever the peer is."""
    runs = []
    for piece in pieces:
        into = piece.into if isinstance(piece.into, Memory) else writable(piece.into)
        if piece.offset < 0 or piece.length <= 0 or num_bytes_of(into) != piece.length:
            raise ValueError(f"{piece} does not fit its place of {num_bytes_of(into)} bytes")
        runs.append(Run(piece.region, piece.generation, piece.offset, piece.length, into))
    return runs


def split(runs: Sequence[Run], num_streams: int) -> list[list[Run]]:
    """Parts of about equal size, one for each stream or more, in order."""
    total = sum(run.length for run in runs)
    goal = min(max(-(-total // num_streams), _MIN_PART_BYTES), _MAX_PART_BYTES)
    parts: list[list[Run]] = [[]]
    room = goal
    for run in itertools.chain.from_iterable(_cut(run, goal) for run in runs):
        if parts[-1] and (run.length > room or len(parts[-1]) >= _MAX_PART_PIECES):
            parts.append([])
            room = goal
        parts[-1].append(run)
        room -= run.length
    return parts


def _cut(run: Run, size: int) -> Iterator[Run]:
    for done in range(0, run.length, size):
        length = min(size, run.length - done)
        yield Run(run.region, run.generation, run.offset + done, length, run.into, run.start + done)
