"""The work queue: a JetStream stream whose entries stay until somebody is done with them. `Bus.work_queue` opens it.

An entry is handed to one taker at a time. Who holds it says so again and again (`Entry.hold`); who falls silent for
a lease loses it to the next taker, so a taker's death costs that long and no work. An entry says only that there is
something to do: it may come twice, and what is to be done stands in a table. The server bears one entry of an id at a
time, from when it is put in until somebody is done with it, so whoever doubts that there is one puts it in again. This
module must not know what the work is, or who takes it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

import nats.errors
import nats.js.errors
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.api import (
    ConsumerConfig,
    DiscardPolicy,
    RetentionPolicy,
    StorageType,
    StreamConfig,
)

from shared import errors, log, wire
from shared.subjects import Subjects, encode

M = TypeVar("M")
LEASE_S: Final = 10.0
MAX_ENTRIES: Final = 100_000
_FULL: Final = 10077  # JetStream: maximum messages exceeded, in all or of one subject
_THERE: Final = "per subject"


class WorkQueue:
    """Entries by kind. Every method raises Unavailable in trouble. All takers should be told the same `lease_s`."""

    def __init__(self, jetstream: JetStreamContext, subjects: Subjects, lease_s: float) -> None:
        self.lease_s = lease_s
        self._jetstream = jetstream
        self._subjects = subjects
        self._takers: dict[str, Any] = {}
        self._log = log.get(component="queue")

    @classmethod
    async def open(
        cls, jetstream: JetStreamContext, subjects: Subjects, lease_s: float
    ) -> WorkQueue:
        """The realm's queue, created when missing. Raises what nats does."""
        name = subjects.work_queue()
        try:
            await jetstream.stream_info(name)
        except nats.js.errors.NotFoundError:
            await jetstream.add_stream(
                StreamConfig(
                    name=name,
                    subjects=[subjects.job("*", "*")],
                    retention=RetentionPolicy.WORK_QUEUE,
                    storage=StorageType.FILE,
                    discard=DiscardPolicy.NEW,
                    max_msgs=MAX_ENTRIES,
                    max_msgs_per_subject=1,
                    discard_new_per_subject=True,
                )
            )
        return cls(jetstream, subjects, lease_s)

    async def put(self, kind: str, id_: str, message: object) -> None:
        """Add an entry, unless there is one of that id: it is stored on return.

        Raises Overloaded when the queue is full.
        """
        with _unavailable():
            try:
                await self._jetstream.publish(self._subjects.job(kind, id_), wire.encode(message))
            except nats.js.errors.APIError as error:
                if error.err_code != _FULL:
                    raise
                if _THERE in (error.description or ""):
                    return
                raise errors.Overloaded("too many jobs are waiting", retry_after_s=60.0) from error

    async def take(self, kind: str, message: type[M], wait_s: float) -> Entry[M] | None:
        """The next entry of that kind, waiting up to `wait_s` for one. One taker of a kind at a time."""
        with _unavailable():
            taker = self._takers.get(kind)
            if taker is None:
                taker = self._takers[kind] = await self._taker(kind)
            try:
                [found] = await taker.fetch(1, timeout=wait_s)
            except nats.errors.TimeoutError:
                return None
            try:
                decoded = wire.decode(found.data, message)
            except wire.WireError as error:
                self._log.error("entry_refused", kind=kind, error=str(error))
                await found.term()
                return None
            return Entry(decoded, found)

    async def close(self) -> None:
        """Take nothing more: an entry that is on its way here goes to another taker once its lease is over."""
        takers, self._takers = self._takers, {}
        for taker in takers.values():
            with contextlib.suppress(nats.errors.Error):
                await taker.unsubscribe()

    async def _taker(self, kind: str) -> Any:
        stream, durable = self._subjects.work_queue(), encode(kind).replace("=", "_")
        config = ConsumerConfig(
            durable_name=durable,
            filter_subject=self._subjects.job(kind, "*"),
            ack_wait=self.lease_s,
            max_deliver=-1,
        )
        await self._jetstream.add_consumer(stream, config)  # of one that is there, the lease is set
        return await self._jetstream.pull_subscribe_bind(durable, stream)


@dataclass(frozen=True, slots=True)
class Entry(Generic[M]):
    """An entry in hand."""

    message: M
    _inner: Msg

    async def hold(self) -> None:
        """Keep it for another lease."""
        with _unavailable():
            await self._inner.in_progress()

    async def done(self) -> None:
        """There is nothing left to do: it leaves the queue."""
        with _unavailable():
            await self._inner.ack()

    async def release(self, after_s: float = 0.0) -> None:
        """Let another taker have it, or the same one, after so long."""
        with _unavailable():
            await self._inner.nak(after_s or None)


@contextlib.contextmanager
def _unavailable() -> Iterator[None]:
    try:
        yield
    except (nats.errors.Error, OSError) as error:  # a TimeoutError is an OSError
        raise errors.Unavailable(f"the work queue cannot be reached: {error!r}") from error
