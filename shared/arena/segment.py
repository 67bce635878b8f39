"""The format of a segment: a file of equal slots for KV pages of one kind, and the functions that find their way in it.

    header page    4,096 bytes   magic, version, JSON (model, recipe, slot_bytes, num_slots), checksum
    slot headers   64 bytes each, padded to 4,096: state, generation, page hash, length, checksum, check of itself
    payloads       num_slots times slot_bytes padded to 4,096

A file has its full size, with memory behind every page of it, before it gets its name; it is never shrunk, only
unlinked: to touch a mapping of it raises no SIGBUS. One process writes to it (`writer.py`), everybody reads
(`reader.py`) and believes nothing: a page counts only if the slot's header is whole, of the generation asked for, and
committed, and if the bytes *as copied out* have its checksum. That is xxh3-64 seeded with the generation, so that what
an earlier generation left behind passes for nothing. No memory order between processes is relied upon.

This module must not know who may write where, nor what a page is for.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import struct
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, Final, Self, TypeAlias

import numpy as np
import xxhash

from shared.arena.place import open_file
from shared.blockhash import DIGEST_BYTES

# Contiguous memory of a page; what it holds is nobody's business here.
Buffer: TypeAlias = bytes | bytearray | memoryview | np.ndarray[Any, np.dtype[Any]]

MAGIC: Final = b"DFARENA\n"
VERSION: Final = 1
ALIGNMENT: Final = 4096
SLOT_HEADER_BYTES: Final = 64
CHUNK_BYTES: Final = 512 * 1024  # copied and summed while it is in the core's cache
SUFFIX: Final = ".kv"
NEW_SUFFIX: Final = ".new"  # of a file that is being made

_NAME: Final = re.compile(r"[0-9a-f]{16}")
_HEADER: Final = struct.Struct(
    "<8sIIQ"
)  # magic, version, length of the JSON that follows, its check
# state, 0, generation, hash, length, checksum of the payload; its check follows
_SLOT: Final = struct.Struct(f"<IIQ{DIGEST_BYTES}sQQ")
_COMMITTED: Final = struct.Struct(
    f"<IIQ{DIGEST_BYTES}sQ"
)  # the part of it that a reader knows beforehand
_GENERATION: Final = struct.Struct("<Q")
_GENERATION_AT: Final = 8
_CHECK: Final = struct.Struct("<Q")
_CHECK_SEED: Final = 0x5107
_PADDING: Final = bytes(SLOT_HEADER_BYTES - _SLOT.size - _CHECK.size)


class SegmentError(Exception):
    """A segment cannot be used: it is gone, damaged, of another version, or another process writes to it."""


@dataclass(frozen=True, slots=True)
class PageKind:
    """What pages must have in common to share a segment: the model, its recipe digest, and the bytes of a page."""

    model: str
    recipe: str
    slot_bytes: int


class State(IntEnum):
    """Of a slot, by its header. A header of zeros is that of a fresh slot."""

    FREE = 0
    WRITING = 1
    COMMITTED = 2


@dataclass(frozen=True, slots=True)
class SlotHeader:
    """What a slot's header says; `length` and `checksum` are of its payload once it is committed."""

    state: State
    generation: int
    page_hash: bytes = bytes(DIGEST_BYTES)
    length: int = 0
    checksum: int = 0

    def pack(self) -> bytes:
        """Its 64 bytes."""
        return pack_slot(self.state, self.generation, self.page_hash, self.length, self.checksum)

    @classmethod
    def unpack(cls, raw: bytes) -> Self | None:
        """The header in these 64 bytes; None if they are not a whole one (perhaps one that is just being written)."""
        if raw == _BLANK:
            return cls(State.FREE, 0)
        if not _is_whole(raw):
            return None
        state, _, generation, page_hash, length, checksum = _SLOT.unpack_from(raw)
        if state not in (State.FREE, State.WRITING, State.COMMITTED):
            return None
        return cls(State(state), generation, page_hash, length, checksum)


def pack_slot(
    state: State, generation: int, page_hash: bytes, length: int = 0, checksum: int = 0
) -> bytes:
    """The 64 bytes of a slot's header."""
    raw = _SLOT.pack(state, 0, generation, page_hash, length, checksum)
    check = xxhash.xxh3_64_intdigest(raw, _CHECK_SEED)
    return raw + _CHECK.pack(check) + _PADDING


def generation_of(raw: bytes) -> int:
    """The generation in a slot's header; 0 if it is not whole."""
    return _GENERATION.unpack_from(raw, _GENERATION_AT)[0] if _is_whole(raw) else 0


def committed(raw: bytes, generation: int, page_hash: bytes, length: int) -> int | None:
    """The checksum of a payload, if a slot's header says that just this page is committed there; else None."""
    if not raw.startswith(_COMMITTED.pack(State.COMMITTED, 0, generation, page_hash, length)):
        return None
    return _CHECK.unpack_from(raw, _COMMITTED.size)[0] if _is_whole(raw) else None


def _is_whole(raw: bytes) -> bool:
    (check,) = _CHECK.unpack_from(raw, _SLOT.size)
    return bool(check == xxhash.xxh3_64_intdigest(raw[: _SLOT.size], _CHECK_SEED))


_BLANK: Final = bytes(SLOT_HEADER_BYTES)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where things are in a segment of `num_slots` pages of a kind; all in bytes from the start of the file."""

    kind: PageKind
    num_slots: int

    @classmethod
    def fit(cls, kind: PageKind, num_bytes: int) -> Self | None:
        """The most slots that `num_bytes` hold; None if not one."""
        if kind.slot_bytes <= 0:
            return None
        num_slots = (num_bytes - ALIGNMENT) // (_align(kind.slot_bytes) + SLOT_HEADER_BYTES)
        while num_slots > 0 and cls(kind, num_slots).num_bytes > num_bytes:
            num_slots -= 1
        return cls(kind, num_slots) if num_slots > 0 else None

    @property
    def payloads(self) -> int:
        """Where the first payload starts: after the table of slot headers."""
        return ALIGNMENT + _align(self.num_slots * SLOT_HEADER_BYTES)

    @property
    def stride(self) -> int:
        """From one payload to the next."""
        return _align(self.kind.slot_bytes)

    @property
    def num_bytes(self) -> int:
        """The size of the file."""
        return self.payloads + self.num_slots * self.stride

    def header(self, index: int) -> int:
        """Where slot `index` has its header. Raises IndexError for a slot that is not there."""
        self._check_index(index)
        return ALIGNMENT + index * SLOT_HEADER_BYTES

    def payload(self, index: int) -> int:
        """Where slot `index` has its payload. Raises IndexError for a slot that is not there."""
        self._check_index(index)
        return self.payloads + index * self.stride

    def pack(self) -> bytes:
        """The header page. Raises ValueError if the names of the kind are too long for it."""
        kind = self.kind
        body = json.dumps(
            {
                "model": kind.model,
                "recipe": kind.recipe,
                "slot_bytes": kind.slot_bytes,
                "num_slots": self.num_slots,
            }
        ).encode()
        raw = _HEADER.pack(MAGIC, VERSION, len(body), xxhash.xxh3_64_intdigest(body)) + body
        if len(raw) > ALIGNMENT:
            raise ValueError("the names of a page's kind do not fit in a segment's header")
        return raw.ljust(ALIGNMENT, b"\0")

    @classmethod
    def unpack(cls, raw: bytes) -> Self:
        """What a header page says. Raises SegmentError for anything but a whole one of this version."""
        if len(raw) < _HEADER.size:
            raise SegmentError("truncated")
        magic, version, length, check = _HEADER.unpack_from(raw)
        body = raw[_HEADER.size : _HEADER.size + length]
        if magic != MAGIC or version != VERSION:
            raise SegmentError("not a segment of this version")
        if len(body) != length or check != xxhash.xxh3_64_intdigest(body):
            raise SegmentError("damaged header")
        try:
            said = json.loads(body)
            kind = PageKind(str(said["model"]), str(said["recipe"]), int(said["slot_bytes"]))
            layout = cls(kind, int(said["num_slots"]))
        except (ValueError, KeyError, TypeError) as error:
            raise SegmentError("damaged header") from error
        if kind.slot_bytes <= 0 or layout.num_slots <= 0:
            raise SegmentError("damaged header")
        return layout

    def _check_index(self, index: int) -> None:
        if not 0 <= index < self.num_slots:
            raise IndexError(f"slot {index} of {self.num_slots}")


Bytes: TypeAlias = np.ndarray[tuple[int], np.dtype[np.uint8]]


def copy(source: Bytes, target: Bytes, summed: Bytes, generation: int) -> int:
    """Copies a payload of a generation; the checksum of `summed`, which is one of the two. In chunks, so that what is
    summed is in the core's cache. Beware of targets a few bytes above a multiple of 4,096, as numpy likes to allocate
    them: with the source on one, copying takes twice as long (loads wait for stores that look like theirs)."""
    if len(source) <= CHUNK_BYTES:
        np.copyto(target, source)
        return xxhash.xxh3_64_intdigest(summed.data, generation)
    digest = xxhash.xxh3_64(seed=generation)
    for start in range(0, len(source), CHUNK_BYTES):
        chunk = slice(start, start + CHUNK_BYTES)
        np.copyto(target[chunk], source[chunk])
        digest.update(summed[chunk].data)
    return digest.intdigest()


def new_name() -> str:
    """A name for a segment. Names are random and never used again, so a stale one finds nothing instead of another."""
    return secrets.token_hex(8)


def path_of(directory: Path, name: str) -> Path:
    """The file of a segment. Names come from the bus: raises SegmentError for all but 16 hex digits."""
    if not _NAME.fullmatch(name):
        raise SegmentError("not the name of a segment")
    return directory / (name + SUFFIX)


def open_segment(directory: Path, name: str, *, writable: bool = False) -> tuple[int, Layout]:
    """A descriptor of a segment's file, and its layout. Raises SegmentError if it is not whole, or not there."""
    path = path_of(directory, name)
    try:
        fd = open_file(path, os.O_RDWR if writable else os.O_RDONLY)
    except OSError as error:
        raise SegmentError(f"{name}: {error.strerror or error}") from error
    try:
        layout = Layout.unpack(os.pread(fd, ALIGNMENT, 0))
        if os.fstat(fd).st_size < layout.num_bytes:
            raise SegmentError("truncated")
    except (OSError, SegmentError) as error:
        os.close(fd)
        raise SegmentError(f"{name}: {error}") from error
    return fd, layout


def create_segment(directory: Path, name: str, layout: Layout) -> None:
    """Makes a segment of fresh slots. Its memory is there before its name is: raises OSError (ENOSPC) if it is not to
    be had, and leaves nothing behind."""
    path = path_of(directory, name)
    fresh = path.with_suffix(NEW_SUFFIX)
    try:
        fd = open_file(fresh, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            os.posix_fallocate(fd, 0, layout.num_bytes)
            os.pwrite(fd, layout.pack(), 0)
        finally:
            os.close(fd)
        fresh.rename(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def segment_names(directory: Path) -> list[str]:
    """Names of all segments in the folder, whole or not; files of other names are nobody's business."""
    return sorted(p.stem for p in directory.glob(f"*{SUFFIX}") if _NAME.fullmatch(p.stem))


def leftovers(directory: Path) -> list[Path]:
    """Files of segments that were never finished."""
    return [p for p in directory.glob(f"*{NEW_SUFFIX}") if _NAME.fullmatch(p.stem)]


def remove_unlocked(directory: Path, name: str) -> int:
    """Unlinks a segment's file, whatever is in it, if nobody has its lock. Its bytes if somebody has; 0 if it is gone,
    or not a file of ours."""
    path = path_of(directory, name)
    try:
        fd = open_file(path, os.O_RDONLY)
    except OSError:
        return 0
    try:
        if not try_lock(fd):
            return max(1, os.fstat(fd).st_size)
        path.unlink(missing_ok=True)
        return 0
    finally:
        os.close(fd)


def try_lock(fd: int) -> bool:
    """Takes the exclusive flock of a segment's writer, if nobody has it.

    It belongs to the open file description: two opens of a file exclude each other, in one process too; duplicates and
    forked children share it, so it is free only when the last of those is closed; started programs do not inherit it
    (O_CLOEXEC). It ends with its holder, whatever ends that, and not a moment before: a stopped process has it still.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def unlock(fd: int) -> None:
    """Gives the flock back."""
    fcntl.flock(fd, fcntl.LOCK_UN)


def _align(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
