"""The SSD tier: pages that left the arena, in a bounded log of checksummed records.

    file     header (4,096 bytes: magic, version, salt, check), then records, each starting on a multiple of 4,096
    record   header (64 bytes: magic, what it is, page hash, digest of the kind, length, checksum, check), payload

A file says of which kind its pages are in records of their own, before the first page of each. Checks are seeded with
the file's salt. No record is ever changed: a new process writes a new file, and the oldest file is removed whole when
the budget is used up. So a process killed in mid-append leaves at worst a record that is too short, which is found when
the file is opened; what the disk itself corrupts is found when a page is read, and a header that is not whole is
skipped. An append that the disk refuses is cut off again. The log is a cache: nothing is synced.

Appending and looking things up do not wait for each other, however slow the disk is. The index costs about 230 bytes a
page. This module must not know which pages deserve it.
"""

from __future__ import annotations

import json
import os
import secrets
import struct
import threading
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Final

import numpy as np
import xxhash

from services.cache.changes import ChangeLog, Changes
from shared.arena.place import ArenaError, lock_folder, open_file
from shared.arena.segment import Buffer, PageKind
from shared.blockhash import DIGEST_BYTES

FILE_BYTES: Final = 64 << 20
MAX_FILES: Final = 128  # each costs a descriptor; a larger log has larger ones

_ALIGNMENT: Final = 4096
_SUFFIX: Final = ".log"
_FILE_MAGIC: Final = b"DFSSDLOG"
_RECORD_MAGIC: Final = b"DFREC\0"
_VERSION: Final = 1
_FILE: Final = struct.Struct("<8sIIQ")  # magic, version, 0, salt
# magic, what, page hash (of a kind: zeros), kind, length and checksum of the payload
_RECORD: Final = struct.Struct(f"<6sH{DIGEST_BYTES}s8sQQ")
_CHECK: Final = struct.Struct("<Q")
_HEADER_BYTES: Final = 64
_KIND, _PAGE = 1, 2


class _File:
    """A file of the log. Closed when nobody reads it any more, which may be after it was removed."""

    def __init__(self, path: Path, fd: int, salt: int) -> None:
        self.path = path
        self.fd = fd
        self.salt = salt
        self.num_bytes = _ALIGNMENT
        self.kinds: dict[bytes, PageKind] = {}
        self.pages: dict[bytes, tuple[PageKind, int]] = {}  # page -> kind, offset

    def __del__(self) -> None:
        os.close(self.fd)

    @classmethod
    def create(cls, path: Path) -> _File:
        salt = secrets.randbits(63)
        fd = open_file(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        file = cls(path, fd, salt)
        raw = _FILE.pack(_FILE_MAGIC, _VERSION, 0, salt)
        raw += _CHECK.pack(xxhash.xxh3_64_intdigest(raw))
        try:
            if os.pwrite(fd, raw.ljust(_ALIGNMENT, b"\0"), 0) != _ALIGNMENT:
                raise OSError("a file's header was written in part")
        except OSError:
            path.unlink(missing_ok=True)
            raise
        return file

    @classmethod
    def open(cls, path: Path) -> _File | None:
        """A file of this version, and what it holds; None if it is none."""
        file = cls(path, open_file(path, os.O_RDONLY), 0)
        raw = os.pread(file.fd, _FILE.size + _CHECK.size, 0)
        body, check = raw[: _FILE.size], raw[_FILE.size :]
        if len(body) < _FILE.size or check != _CHECK.pack(xxhash.xxh3_64_intdigest(body)):
            return None
        magic, version, _, file.salt = _FILE.unpack(body)
        return file if magic == _FILE_MAGIC and version == _VERSION else None

    def pack(self, what: int, page_hash: bytes, kind: bytes, view: memoryview) -> bytes:
        """The header of a record with this payload."""
        check = xxhash.xxh3_64_intdigest(view, seed=self.salt)
        raw = _RECORD.pack(_RECORD_MAGIC, what, page_hash, kind, view.nbytes, check)
        return (raw + _CHECK.pack(xxhash.xxh3_64_intdigest(raw, seed=self.salt))).ljust(
            _HEADER_BYTES, b"\0"
        )

    def unpack(self, raw: bytes) -> tuple[int, bytes, bytes, int, int] | None:
        """What, page hash, kind, length and checksum by a record's header; None if it is not whole."""
        body = raw[: _RECORD.size]
        if len(raw) < _HEADER_BYTES or not body.startswith(_RECORD_MAGIC):
            return None
        (check,) = _CHECK.unpack_from(raw, _RECORD.size)
        if check != xxhash.xxh3_64_intdigest(body, seed=self.salt):
            return None
        _, what, page_hash, kind, length, checksum = _RECORD.unpack(body)
        return what, page_hash, kind, length, checksum

    def scan(self) -> int:
        """Finds the records; how many places were passed over because no whole record is there."""
        size = os.fstat(self.fd).st_size
        offset, num_bad = _ALIGNMENT, 0
        while offset < size:
            found = self.unpack(os.pread(self.fd, _HEADER_BYTES, offset))
            if found is None:
                # Damaged: the next record starts on one of the following boundaries.
                num_bad += 1
                offset += _ALIGNMENT
                continue
            what, page_hash, kind, length, checksum = found
            if offset + _HEADER_BYTES + length > size:
                num_bad += 1  # torn: its writer was killed
                break
            if what == _PAGE and kind in self.kinds:
                self.pages[page_hash] = (self.kinds[kind], offset)
            elif what == _KIND:
                raw = os.pread(self.fd, length, offset + _HEADER_BYTES)
                if xxhash.xxh3_64_intdigest(raw, seed=self.salt) == checksum:
                    self.kinds[kind] = _unpack_kind(raw)
            offset += _record_bytes(length)
        self.num_bytes = size
        return num_bad


class Ssd:
    """Pages on an SSD, `max_bytes` of files at the most. All calls but `open` and `close` from any thread."""

    def __init__(self, directory: Path, lock: int, *, max_bytes: int, file_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.num_dropped = 0
        self._directory = directory
        self._lock_fd = lock
        # What goes is a file at a time: not too large a part of it all.
        self._file_bytes = max(min(file_bytes, max_bytes // 8), max_bytes // MAX_FILES)
        self._files: dict[int, _File] = {}  # number -> file, oldest first
        self._last = 0
        self._current: _File | None = None  # the one this process appends to
        self._index: dict[bytes, int] = {}  # page -> number of its file
        self._changes = ChangeLog()
        self._appending = threading.Lock()  # the files; held while the disk is written to
        self._changing = (
            threading.Lock()
        )  # the index, which may be looked at without; never held for long

    @classmethod
    def open(cls, directory: Path, *, max_bytes: int, file_bytes: int = FILE_BYTES) -> Ssd:
        """Scans what is there: milliseconds per file. Raises ArenaError for a folder not fit for it, or one another
        process uses."""
        fd = lock_folder(directory)
        if fd is None:
            raise ArenaError(f"another process uses {directory}")
        ssd = cls(directory, fd, max_bytes=max_bytes, file_bytes=file_bytes)
        try:
            for number, path in _numbered(directory):
                ssd._load(number, path)
            ssd._make_room(0)
        except OSError as error:
            ssd.close()
            raise ArenaError(f"{directory} cannot be used: {error}") from error
        return ssd

    def append(self, kind: PageKind, page_hash: bytes, data: Buffer) -> bool:
        """Writes a page, which may remove the oldest file. True if it is there now; False if it has no room, or if the
        disk refuses."""
        view = np.frombuffer(data, np.uint8).data
        if len(page_hash) != DIGEST_BYTES or view.nbytes > kind.slot_bytes:
            return False
        with self._appending:
            found = self._find(page_hash)
            if found is not None:
                return found[1] == kind
            try:
                return self._append(kind, page_hash, view)
            except OSError:
                return False

    def read(self, kind: PageKind, page_hash: bytes, out: Buffer) -> bool:
        """Reads a page into `out` of exactly its length. False if it is not there or damaged (then it is forgotten)."""
        found = self._find(page_hash)
        if found is None or found[1] != kind:
            return False
        file, _, offset = found
        target = np.frombuffer(out, np.uint8)
        header = bytearray(_HEADER_BYTES)
        try:
            num_read = os.preadv(file.fd, [header, target.data], offset)
        except OSError:
            num_read = 0
        record = file.unpack(bytes(header)) if num_read == _HEADER_BYTES + len(target) else None
        if record is not None:
            what, its_hash, its_kind, length, checksum = record
            if (
                what == _PAGE
                and its_hash == page_hash
                and its_kind == _kind_digest(kind)
                and length == len(target)
                and checksum == xxhash.xxh3_64_intdigest(target.data, seed=file.salt)
            ):
                return True
        with self._changing:
            if self._find(page_hash) == found:
                self.num_dropped += 1
                self._forget(file, page_hash)
        return False

    def holds(self, kind: PageKind, hashes: Sequence[bytes]) -> int:
        """How many of the first pages are here. Touches no file."""
        num_pages = 0
        for page_hash in hashes:
            found = self._find(page_hash)
            if found is None or found[1] != kind:
                break
            num_pages += 1
        return num_pages

    def drain_events(self) -> dict[str, Changes]:
        """What changed per model since the last call."""
        with self._changing:
            return self._changes.drain()

    def pages(self, model: str) -> list[bytes]:
        """All pages of a model: for a dump."""
        with self._changing:
            return [
                page
                for file in self._files.values()
                for page, (kind, _) in file.pages.items()
                if kind.model == model
            ]

    def ledger(self) -> dict[str, int]:
        """files, bytes, max_bytes, pages, and dropped: torn or damaged places found so far."""
        return {
            "files": len(self._files),
            "bytes": self.num_bytes,
            "max_bytes": self.max_bytes,
            "pages": len(self._index),
            "dropped": self.num_dropped,
        }

    def check(self) -> None:
        """Raises AssertionError if an account does not balance."""
        with self._appending, self._changing:
            assert self.num_bytes == sum(file.num_bytes for file in self._files.values())
            assert self.num_bytes <= self.max_bytes
            pages = {p: number for number, f in self._files.items() for p in f.pages}
            assert pages == self._index
            assert len(pages) == sum(len(file.pages) for file in self._files.values())

    def close(self) -> None:
        """Closes the files; they stay."""
        with self._appending, self._changing:
            self._current = None
            self._files.clear()
            self._index.clear()
            os.close(self._lock_fd)

    def _load(self, number: int, path: Path) -> None:
        """Takes in a file of an earlier process. One that cannot be opened or read is removed."""
        self._last = number
        try:
            file = _File.open(path)
            num_bad = file.scan() if file is not None else 1
        except OSError:
            file, num_bad = None, 1
        self.num_dropped += num_bad
        if file is None:
            path.unlink(missing_ok=True)
            return
        self.num_bytes += file.num_bytes
        for page_hash, (kind, _) in file.pages.items():
            before = self._files.get(self._index.get(page_hash, -1))
            if before is not None:
                del before.pages[page_hash]  # it was damaged there once, and written again
            self._index[page_hash] = number
            self._changes.stored(kind.model, page_hash)
        self._files[number] = file

    def _find(self, page_hash: bytes) -> tuple[_File, PageKind, int] | None:
        """Where a page is. Safe beside somebody who changes the index."""
        file = self._files.get(self._index.get(page_hash, -1))
        found = file.pages.get(page_hash) if file is not None else None
        return None if file is None or found is None else (file, *found)

    def _append(self, kind: PageKind, page_hash: bytes, view: memoryview) -> bool:
        digest = _kind_digest(kind)
        body = _pack_kind(kind)
        needed = _record_bytes(view.nbytes) + _record_bytes(len(body))
        if _ALIGNMENT + needed > self.max_bytes:
            return False
        file = self._current
        if file is None or (
            file.num_bytes + needed > self._file_bytes and file.num_bytes > _ALIGNMENT
        ):
            self._make_room(_ALIGNMENT + needed, num_files=1)
            file = _File.create(self._directory / f"{self._last + 1:016x}{_SUFFIX}")
            self._last += 1
            self.num_bytes += file.num_bytes
            with self._changing:
                self._files[self._last] = self._current = file
        self._make_room(needed)
        if digest not in file.kinds:
            named = memoryview(body)
            self._write(file, file.pack(_KIND, bytes(DIGEST_BYTES), digest, named), named)
            file.kinds[digest] = kind
        offset = file.num_bytes
        self._write(file, file.pack(_PAGE, page_hash, digest, view), view)
        with self._changing:
            file.pages[page_hash] = (file.kinds[digest], offset)
            self._index[page_hash] = self._last
            self._changes.stored(kind.model, page_hash)
        return True

    def _write(self, file: _File, header: bytes, payload: memoryview) -> None:
        num_bytes = _record_bytes(payload.nbytes)
        padding = bytes(num_bytes - _HEADER_BYTES - payload.nbytes)
        try:
            written = os.pwritev(file.fd, [header, payload, padding], file.num_bytes)
            if written != num_bytes:
                raise OSError(f"{written} of {num_bytes} bytes written")
        except OSError:
            os.ftruncate(file.fd, file.num_bytes)  # so that the next one follows what is whole
            raise
        file.num_bytes += num_bytes
        self.num_bytes += num_bytes

    def _make_room(self, num_bytes: int, *, num_files: int = 0) -> None:
        """Removes the oldest files until `num_bytes` in `num_files` more fit. What is appended to is the newest."""
        for number, file in list(self._files.items()):
            if (
                self.num_bytes + num_bytes <= self.max_bytes
                and len(self._files) + num_files <= MAX_FILES
            ):
                return
            file.path.unlink(missing_ok=True)
            self.num_bytes -= file.num_bytes
            with self._changing:
                for page_hash in list(file.pages):
                    self._forget(file, page_hash)
                del self._files[number]

    def _forget(self, file: _File, page_hash: bytes) -> None:
        kind, _ = file.pages.pop(page_hash)
        if self._files.get(self._index.get(page_hash, -1)) is file:
            del self._index[page_hash]
            self._changes.removed(kind.model, page_hash)


def _numbered(directory: Path) -> Iterator[tuple[int, Path]]:
    for path in sorted(directory.glob(f"*{_SUFFIX}")):
        if len(path.stem) == 16 and not set(path.stem) - set("0123456789abcdef"):
            yield int(path.stem, 16), path


def _record_bytes(length: int) -> int:
    return -(-(_HEADER_BYTES + length) // _ALIGNMENT) * _ALIGNMENT


def _pack_kind(kind: PageKind) -> bytes:
    return json.dumps([kind.model, kind.recipe, kind.slot_bytes]).encode()


def _unpack_kind(raw: bytes) -> PageKind:
    model, recipe, slot_bytes = json.loads(raw)
    return PageKind(model, recipe, slot_bytes)


def _kind_digest(kind: PageKind) -> bytes:
    return blake2b(_pack_kind(kind), digest_size=8).digest()
