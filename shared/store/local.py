"""A store in a folder, which everybody on the host shares. This module must not know what is in the files."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import BinaryIO, Final

from shared.errors import NotFound, Unavailable
from shared.store.base import CHUNK_BYTES, Stored, check_key, is_key

_PARTS: Final = ".parts"  # what is not whole yet; no key begins with a dot
_STALE_S: Final = 86_400.0


class LocalStore:
    """See `base.Store`. A file is on disk, and its name too, when `put` returns."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._parts = root / _PARTS

    async def put(self, key: str, chunks: AsyncIterator[bytes]) -> int:
        """See Store."""
        path = self._path(key)
        part = self._parts / secrets.token_hex(16)
        with _unavailable():
            await asyncio.to_thread(self._tidy)
            file = _create(part)  # not in a thread: cancelled, we would never learn of the file
        size = 0
        try:
            try:
                async for chunk in chunks:
                    with _unavailable():
                        await asyncio.to_thread(file.write, chunk)
                    size += len(chunk)
                with _unavailable():
                    await asyncio.to_thread(_sync, file)
            finally:
                file.close()
            with _unavailable():
                await asyncio.to_thread(_move, part, path)
        finally:
            part.unlink(missing_ok=True)
        return size

    async def get(self, key: str) -> AsyncIterator[bytes]:
        """See Store."""
        path = self._path(key)
        with _unavailable():
            file = _open(path)
        try:
            while True:
                with _unavailable():
                    chunk = await asyncio.to_thread(file.read, CHUNK_BYTES)
                if not chunk:
                    return
                yield chunk
        finally:
            file.close()

    async def delete(self, key: str) -> None:
        """See Store."""
        with _unavailable():
            await asyncio.to_thread(self._delete, self._path(key))

    async def listing(self, prefix: str) -> list[Stored]:
        """See Store."""
        with _unavailable():
            return await asyncio.to_thread(self._list, self._path(prefix))

    def _path(self, key: str) -> Path:
        return self._root / check_key(key)

    def _tidy(self) -> None:
        self._parts.mkdir(mode=0o700, parents=True, exist_ok=True)
        for old in self._parts.iterdir():  # of processes that were killed
            with contextlib.suppress(FileNotFoundError):
                if time.time() - old.stat().st_mtime > _STALE_S:
                    old.unlink()

    def _delete(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        for folder in path.parents:
            if folder == self._root:
                break
            try:
                folder.rmdir()
            except OSError:  # somebody's file is still in it
                break

    def _list(self, folder: Path) -> list[Stored]:
        found = []
        for place, _, names in os.walk(folder):
            for name in names:
                path = Path(place, name)
                with contextlib.suppress(FileNotFoundError):  # just deleted
                    stat = path.stat()
                    key = path.relative_to(self._root).as_posix()
                    if is_key(key):
                        found.append(Stored(key, stat.st_size, stat.st_mtime))
        return sorted(found, key=lambda one: one.key)


def _create(part: Path) -> BinaryIO:
    return part.open("xb")


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFound("there is no such file in the store") from error


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _move(part: Path, path: Path) -> None:
    while True:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            part.rename(path)
            break
        except FileNotFoundError:  # somebody who deleted took the empty folder away
            if not part.exists():
                raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextlib.contextmanager
def _unavailable() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Unavailable(f"the store fails: {error.strerror}") from error
