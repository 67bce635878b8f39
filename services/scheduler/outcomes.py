"""What has come of a batch's lines so far: written down in segments as it comes, read back in the order of the lines.

A segment is a file of the store that appears whole, so what is in one survives every crash, and a line in it is never
run again. Each owner of the batch writes segments of its own number, and reads those of all. A record is one text
line: the input line's number, 1 if it went well or 0, the tokens of prompt, cache and output, and the line for the
batch's file. As lines are started in order, they are nearly in order here, too, and reading them in order touches
each segment about once. This module must not know how lines are run.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator
from typing import Final, NamedTuple

from shared.store.base import Store, read, whole

_FOLDER: Final = "batches"
SEGMENT_BYTES: Final = 1024 * 1024
_READ_BYTES: Final = (
    64 * 1024 * 1024
)  # more than any segment: it ends with the record that passes SEGMENT_BYTES
_CACHED: Final = 32  # segments in memory while reading in order


class _Place(NamedTuple):
    segment: str
    start: int
    end: int
    ok: bool


class Outcomes:
    """Those of one batch. Every method raises Unavailable when the store is in trouble."""

    def __init__(self, store: Store, batch: str, attempt: int) -> None:
        self.num_done = 0
        self.num_failed = 0
        self.tokens = [0, 0, 0]  # of prompts, of them from the cache, of outputs
        self.num_pending_bytes = 0
        self._store = store
        self._batch = batch
        self._attempt = attempt
        self._num_segments = 0
        self._flushed = asyncio.Event()
        self._places: dict[int, _Place] = {}
        self._pending: list[bytes] = []
        self._added: set[int] = set()
        self._cache: OrderedDict[str, bytes] = OrderedDict()

    def __contains__(self, line: int) -> bool:
        """Whether a line's outcome is known, written down or about to be."""
        return line in self._places or line in self._added

    def __len__(self) -> int:
        """Lines whose outcome is known."""
        return len(self._places) + len(self._added)

    def has(self, line: int, *, ok: bool) -> bool:
        """Whether a line's outcome is written down and is of this sort."""
        place = self._places.get(line)
        return place is not None and place.ok is ok

    async def load(self) -> None:
        """Read what all owners up to now have written."""
        for stored in await self._store.listing(f"{_FOLDER}/{self._batch}"):
            self._index(stored.key, await read(self._store, stored.key, _READ_BYTES))

    def add(self, line: int, ok: bool, tokens: tuple[int, int, int], text: bytes) -> None:
        """A line has an outcome; `text` is JSON without a newline. It counts once it is flushed."""
        if line in self:
            return
        prompt, cached, output = tokens
        record = b"%d %d %d %d %d %s\n" % (line, ok, prompt, cached, output, text)
        self._added.add(line)
        self._pending.append(record)
        self.num_pending_bytes += len(record)

    async def flush(self) -> bool:
        """Write down what was added up to now: on disk on return. Whether there was anything."""
        num_left = len(self._pending)  # more may come while the store is slow
        wrote = num_left > 0
        while num_left:
            size, count = 0, 0
            while count < num_left and size < SEGMENT_BYTES:
                size += len(self._pending[count])
                count += 1
            data = b"".join(self._pending[:count])
            self._num_segments += 1
            key = f"{_FOLDER}/{self._batch}/{self._attempt:06d}-{self._num_segments:08d}"
            await self._store.put(key, whole(data))
            del self._pending[:count]
            num_left -= count
            self.num_pending_bytes -= len(data)
            self._flushed.set()
            self._added.difference_update(self._index(key, data))
        return wrote

    async def room(self, num_bytes: int) -> None:
        """Wait until no more than so much is still to be written down: the store may be slow, or away."""
        while self.num_pending_bytes > num_bytes:
            self._flushed.clear()
            await self._flushed.wait()

    def _index(self, segment: str, data: bytes) -> list[int]:
        """Takes a segment's records into account; the first one of a line counts. Their lines."""
        lines = []
        start = 0
        while start < len(data):
            end = data.index(b"\n", start) + 1
            number, ok, prompt, cached, output, text = data[start:end].split(b" ", 5)
            line = int(number)
            lines.append(line)
            if line not in self._places:
                self._places[line] = _Place(segment, end - len(text), end, ok == b"1")
                if ok == b"1":
                    self.num_done += 1
                else:
                    self.num_failed += 1
                for index, tokens in enumerate((prompt, cached, output)):
                    self.tokens[index] += int(tokens)
            start = end
        return lines

    async def all(self, *, ok: bool) -> AsyncIterator[bytes]:
        """The lines for the file of those that went well, or of the others, in the order of the input."""
        for line in sorted(line for line, place in self._places.items() if place.ok is ok):
            yield await self.text(line)

    async def text(self, line: int) -> bytes:
        """One line for a file, with its newline."""
        place = self._places[line]
        data = self._cache.get(place.segment)
        if data is None:
            data = self._cache[place.segment] = await read(self._store, place.segment, _READ_BYTES)
            if len(self._cache) > _CACHED:
                self._cache.popitem(last=False)
        self._cache.move_to_end(place.segment)
        return data[place.start : place.end]


async def unfinished(store: Store) -> set[str]:
    """The batches of which outcomes are stored."""
    return {stored.key.split("/")[1] for stored in await store.listing(_FOLDER)}


async def forget(store: Store, batch: str) -> None:
    """Remove a batch's outcomes."""
    for stored in await store.listing(f"{_FOLDER}/{batch}"):
        await store.delete(stored.key)
