"""A multipart form that brings one file, read as it comes in: the file is never in memory, or on disk here, whole.

This module must not know what the file is for.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Final

from aiohttp import BodyPartReader, ClientPayloadError, web
from aiohttp.http_exceptions import HttpProcessingError

from services.gateway.http import HELD, BodyTimeout, UnsupportedMedia
from shared.errors import InvalidRequest, TooLarge
from shared.store.base import CHUNK_BYTES

_FIELD_BYTES: Final = 4096
_MAX_FIELDS: Final = 16
_READ_BYTES: Final = 256 * 1024
_SLOWEST_BYTES_S: Final = 32 * 1024  # or a few clients that trickle would keep all others out
# What the library says of a form that is none, or breaks off.
_UNREADABLE: Final = (
    *(ValueError, AssertionError, HttpProcessingError),
    *(ClientPayloadError, web.RequestPayloadError, ConnectionError),
)


class Form:
    """Iterate `chunks` to the end; then `fields` and `file_name` hold what came with the file."""

    def __init__(self, request: web.Request, *, max_bytes: int, timeout_s: float) -> None:
        if not request.content_type.lower().startswith("multipart/form-data"):
            raise UnsupportedMedia("Content-Type must be multipart/form-data", param="Content-Type")
        self.fields: dict[str, str] = {}
        self.file_name: str | None = None
        self._request = request
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s  # for anything to arrive
        request[HELD].resize(2 * CHUNK_BYTES)  # what is in hand at a time, however long the body

    async def chunks(self) -> AsyncIterator[bytes]:
        """The file, in pieces of at most `CHUNK_BYTES` or a little more.

        Raises InvalidRequest for what is no such form, TooLarge, BodyTimeout.
        """
        try:
            reader = await self._request.multipart()
            while True:
                async with asyncio.timeout(self._timeout_s):
                    part = await reader.next()
                if part is None:
                    return
                if not isinstance(part, BodyPartReader):
                    raise InvalidRequest("forms within forms are not taken")
                if part.name == "file" and self.file_name is None:
                    self.file_name = _text(part.filename or "")
                    async for chunk in self._file(part):
                        yield chunk
                else:
                    await self._field(part)
        except TimeoutError as error:
            raise BodyTimeout("the body did not arrive in time") from error
        except _UNREADABLE as error:
            raise InvalidRequest("the form cannot be read") from error

    async def _file(self, part: BodyPartReader) -> AsyncIterator[bytes]:
        size, waited_s = 0, 0.0
        waiting = bytearray()
        clock = asyncio.get_running_loop().time
        while True:
            start = clock()
            async with asyncio.timeout(self._timeout_s):
                piece = await part.read_chunk(_READ_BYTES)
            size += len(piece)
            waited_s += clock() - start  # not what the store took
            if waited_s > self._timeout_s + size / _SLOWEST_BYTES_S:
                raise TimeoutError
            if size > self._max_bytes:
                raise TooLarge(f"a file holds at most {self._max_bytes} bytes", param="file")
            waiting += piece
            if waiting and (not piece or len(waiting) >= CHUNK_BYTES):
                yield bytes(waiting)
                waiting.clear()
            if not piece:
                return

    async def _field(self, part: BodyPartReader) -> None:
        if len(self.fields) >= _MAX_FIELDS:
            raise InvalidRequest("the form has too many fields")
        data = bytearray()
        while True:
            async with asyncio.timeout(self._timeout_s):
                piece = await part.read_chunk(_FIELD_BYTES)
            if not piece:
                break
            data += piece
            if len(data) > _FIELD_BYTES:
                raise InvalidRequest(
                    "a field of the form is too long", param=_text(part.name or "")
                )
        self.fields[_text(part.name or "")] = data.decode("utf-8", "replace")


def _text(name: str) -> str:
    """A name out of a header, whose bytes need not have been text."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
