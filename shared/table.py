"""A table on the bus: a KV bucket of messages. `Bus.table` opens one.

Messages are stored as JSON, which a person can read with any NATS tool. This module must not know any table's meaning.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from typing import Final, NoReturn, TypeVar

import nats.errors
import nats.js.errors
from nats.js import JetStreamContext
from nats.js.kv import KeyValue

from shared import errors, log, wire
from shared.subjects import decode, encode

M = TypeVar("M")
_MAX_TRIES: Final = 16
_QUIET_S: Final = 0.5
_ABSENT: Final = (nats.js.errors.KeyNotFoundError, nats.js.errors.KeyDeletedError)


class Table:
    """Messages under keys of any text. Every method raises Unavailable in trouble.

    There is no watch: a nats-py watcher was seen silent for 15.8 s after a server restart. Re-read with `all`, every
    few seconds and on reconnect, and let beats say that something is new.
    """

    def __init__(
        self, jetstream: JetStreamContext, name: str, bucket: KeyValue, prefix: str = ""
    ) -> None:
        self._jetstream = jetstream
        self._name = name
        self._bucket = bucket
        self._prefix = prefix
        self._log = log.get(component="table")

    @classmethod
    async def open(cls, jetstream: JetStreamContext, bucket: str) -> Table:
        """The table in that bucket, created when missing. Raises what nats does."""
        try:
            found = await jetstream.key_value(bucket)
        except nats.js.errors.BucketNotFoundError:
            found = await jetstream.create_key_value(bucket=bucket, history=1)
        return cls(jetstream, bucket, found)

    def part(self, name: str) -> Table:
        """A table of its own inside this one's bucket: the same keys there are others, and `all` tells them apart."""
        prefix = f"{self._prefix}{encode(name)}."
        return Table(self._jetstream, self._name, self._bucket, prefix)

    async def get(self, key: str, kind: type[M]) -> M | None:
        """The entry, or None."""
        found = await self.look(key, kind)
        return found and found[0]

    async def look(self, key: str, kind: type[M]) -> tuple[M, int] | None:
        """The entry and its revision, or None."""
        with _unavailable():
            try:
                entry = await self._bucket.get(self._key(key))
            except _ABSENT:
                return None
            return wire.from_json(entry.value or b"", kind), entry.revision or 0

    async def put(self, key: str, message: object) -> int:
        """Write; the new revision."""
        with _unavailable():
            return await self._bucket.put(self._key(key), wire.to_json(message))

    async def create(self, key: str, message: object) -> bool:
        """Write unless the key exists; whether it was written."""
        with _unavailable():
            try:
                await self._bucket.create(self._key(key), wire.to_json(message))
            except nats.js.errors.KeyWrongLastSequenceError:
                return False
            return True

    async def replace(self, key: str, message: object, revision: int) -> int | None:
        """Write if the entry is still at `revision` (0: absent): the new revision, None if somebody else was faster."""
        with _unavailable():
            try:
                return await self._bucket.update(self._key(key), wire.to_json(message), revision)
            except nats.js.errors.KeyWrongLastSequenceError:
                return None

    async def change(self, key: str, kind: type[M], step: Callable[[M], M]) -> M | None:
        """Replace an entry by `step(entry)`, anew if somebody else was faster: what it is now, None if it is not."""
        for _ in range(_MAX_TRIES):
            found = await self.look(key, kind)
            if found is None:
                return None
            changed = step(found[0])
            if await self.replace(key, changed, found[1]) is not None:
                return changed
        raise errors.Unavailable("the table's entry is changed by too many at once")

    async def delete(self, key: str) -> None:
        """Remove; a missing key is fine. Nothing is left: the marks that a KV bucket puts in place of what was deleted
        would stay for ever, and each `all` would read them."""
        with _unavailable():
            await self._jetstream.purge_stream(
                f"KV_{self._name}", subject=f"$KV.{self._name}.{self._key(key)}"
            )

    async def all(self, kind: type[M]) -> dict[str, M]:
        """Every entry, the one first that has not been written to for longest. One that cannot be read is left out
        and logged."""
        with _unavailable():
            found = await self._all()
        entries: dict[str, M] = {}
        for entry in sorted(found.values(), key=lambda entry: entry.revision or 0):
            try:
                key = decode(entry.key.removeprefix(self._prefix))
                entries[key] = wire.from_json(entry.value or b"", kind)
            except ValueError as error:
                self._log.warning("entry_refused", key=entry.key, error=str(error))
        return entries

    async def _all(self) -> dict[str, KeyValue.Entry]:
        start = f"$KV.{self._name}."
        info = await self._jetstream.stream_info(
            f"KV_{self._name}", subjects_filter=f"{start}{self._prefix}*"
        )
        found: dict[str, KeyValue.Entry] = {}
        # The server bears 1000 watchers, and would remember each for five minutes after it was stopped.
        watcher = await self._bucket.watch(
            f"{self._prefix}*", ignore_deletes=True, inactive_threshold=0.25
        )
        try:
            # Where something is removed meanwhile, the end comes too early or not at all.
            with contextlib.suppress(nats.errors.TimeoutError):
                while True:
                    entry = await watcher.updates(timeout=_QUIET_S)  # type: ignore[no-untyped-call]
                    if entry is None:
                        break
                    found[entry.key] = entry
        finally:
            await watcher.stop()  # type: ignore[no-untyped-call]
        listed = {subject.removeprefix(start) for subject in info.state.subjects or {}}
        for key in listed - found.keys():
            with contextlib.suppress(*_ABSENT):
                found[key] = await self._bucket.get(key)
        return found

    def _key(self, key: str) -> str:
        return self._prefix + encode(key)


def heed_cancellation() -> None:
    """To be called once a round by a loop that asks the bus for ever: nats-py waits with `asyncio.wait_for`, which
    before Python 3.12 loses a cancellation that comes together with the answer, and nobody cancels twice.

    Raises CancelledError.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


async def keep_read(
    read: Callable[[], Awaitable[None]], again: asyncio.Event, every_s: float
) -> NoReturn:
    """Read tables for ever: every `every_s` seconds, and as soon as `again` is set, which this clears."""
    while True:
        with contextlib.suppress(TimeoutError):  # the usual case: nothing called for it earlier
            async with asyncio.timeout(every_s):
                await again.wait()
        again.clear()
        await read()
        heed_cancellation()


@contextlib.contextmanager
def _unavailable() -> Iterator[None]:
    try:
        yield
    except (nats.errors.Error, OSError, wire.WireError) as error:  # a TimeoutError is an OSError
        raise errors.Unavailable(f"the table cannot be reached: {error!r}") from error
