"""A table on the bus: a KV bucket of messages. `Bus.table` opens one.

Messages are stored as JSON, which a person can read with any NATS tool. This module must not know any table's meaning.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import TypeVar

import nats.errors
import nats.js.errors
from nats.js.kv import KeyValue

from shared import errors, log, wire
from shared.subjects import decode, encode

M = TypeVar("M")


class Table:
    """Messages under keys of any text. Every method raises Unavailable in trouble.

    There is no watch: a nats-py watcher was seen silent for 15.8 s after a server restart. Re-read with `all`, every
    few seconds and on reconnect, and let beats say that something is new.
    """

    def __init__(self, bucket: KeyValue) -> None:
        self._bucket = bucket
        self._log = log.get(component="table")

    async def get(self, key: str, kind: type[M]) -> M | None:
        """The entry, or None."""
        with _unavailable():
            try:
                entry = await self._bucket.get(encode(key))
            except (nats.js.errors.KeyNotFoundError, nats.js.errors.KeyDeletedError):
                return None
            return wire.from_json(entry.value or b"", kind)

    async def put(self, key: str, message: object) -> int:
        """Write; the new revision."""
        with _unavailable():
            return await self._bucket.put(encode(key), wire.to_json(message))

    async def create(self, key: str, message: object) -> bool:
        """Write unless the key exists; whether it was written."""
        with _unavailable():
            try:
                await self._bucket.create(encode(key), wire.to_json(message))
            except nats.js.errors.KeyWrongLastSequenceError:
                return False
            return True

    async def delete(self, key: str) -> None:
        """Remove; a missing key is fine."""
        with _unavailable():
            await self._bucket.delete(encode(key))

    async def all(self, kind: type[M]) -> dict[str, M]:
        """Every entry. One that cannot be read is left out and logged."""
        entries: dict[str, M] = {}
        with _unavailable():
            watcher = await self._bucket.watchall(ignore_deletes=True)
            try:
                async with asyncio.timeout(5):
                    async for entry in watcher:
                        if entry is None:  # all present values have come
                            break
                        try:
                            entries[decode(entry.key)] = wire.from_json(entry.value or b"", kind)
                        except ValueError as error:
                            self._log.warning("entry_refused", key=entry.key, error=str(error))
            finally:
                await watcher.stop()  # type: ignore[no-untyped-call]
        return entries


@contextlib.contextmanager
def _unavailable() -> Iterator[None]:
    try:
        yield
    except (nats.errors.Error, OSError, wire.WireError) as error:  # a TimeoutError is an OSError
        raise errors.Unavailable(f"the table cannot be reached: {error!r}") from error
