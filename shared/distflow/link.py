"""The side that wants the bytes: a link to one peer, its few connections, and the threads that read from them.

A transfer is cut into parts, each the work of one thread on one connection. Whatever the way its bytes take, a part is
done only when the holder says afterwards that every region still had its generation. It must not know how an offer got
here.
"""

from __future__ import annotations

import functools
import os
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import structlog

from shared.distflow.backend import Attached, Backend
from shared.distflow.channel import Channel, Remaining
from shared.distflow.faults import Fault, LinkError, TransferError
from shared.distflow.reader import BY_CONNECTION, Part, PartReader, Progress, Run, Way, split
from shared.distflow.region import Region
from shared.distflow.ticket import Ticket

_MIN_THREADS: Final = 4  # transfers at a time: one that waits for its peer does not keep the others
_MAX_MAPPED: Final = 256  # each keeps a descriptor
_MAX_ATTACHED: Final = 64

_log = structlog.get_logger(__name__)


class Link:
    """The way to one peer: this side reads what the other registers. Made by `DistFlow.link`; `close()` it.

    `peer` is the peer's name, `scheme` the way: "unix" (same host; regions in files are mapped) or "tcp". A link that
    broke stays broken (`alive` is False): ask the peer for another offer.
    """

    def __init__(
        self,
        *,
        peer: str,
        scheme: str,
        first: Channel,
        connect: Callable[[Remaining], Channel],
        num_streams: int,
        backends: Mapping[str, Backend],
    ) -> None:
        self.peer: Final = peer
        self.scheme: Final = scheme
        self._connect = connect
        self._num_streams = num_streams
        self._backends = backends
        self._changed = threading.Condition()  # also the lock of all that follows
        self._idle: list[Channel] = [first]
        self._busy: set[Channel] = set()
        self._threads: list[threading.Thread] = []
        self._num_idle = 0  # threads without work
        self._max_threads = max(num_streams, _MIN_THREADS)
        self._parts: deque[Part] = deque()  # that no thread has begun
        self._closed = False
        self._ways: OrderedDict[int, Way] = OrderedDict()
        self._attached: list[Attached] = []
        self._peer_left = False  # it ended a connection, and no other has been made since
        self._fault: LinkError | None = None

    @property
    def alive(self) -> bool:
        """Whether it can be used, as far as is known."""
        with self._changed:
            if self._fault is not None:
                return False
            self._drop_ended()
            return bool(self._idle or self._busy) or not self._peer_left

    def close(self) -> None:
        """End it; what is under way fails with CLOSED. Idempotent."""
        self._break(LinkError(Fault.CLOSED, f"the link to {self.peer!r} was closed"))
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            threads, self._threads = self._threads, []
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join()
        with self._changed:
            attached, self._attached = self._attached, []
            self._ways.clear()
        for region in attached:
            region.close()

    def submit(self, ticket: Ticket, runs: Sequence[Run], progress: Progress | None = None) -> None:
        """Read `runs`; each part of the work ends with one `part_done` of the ticket. With `progress` it is one part,
        read in order, and the call is made as bytes come. Raises LinkError."""
        parts = [runs] if progress is not None else split(runs, self._num_streams)
        with self._changed:
            if self._fault is not None:
                raise LinkError(self._fault.fault, self._fault.message)
            ticket.add_parts(len(parts) - 1)
            self._parts += [Part(ticket, part, progress) for part in parts]
            num_missing = len(self._parts) - self._num_idle
            for _ in range(min(num_missing, self._max_threads - len(self._threads))):
                thread = threading.Thread(target=self._work, name="distflow-read", daemon=True)
                self._threads.append(thread)
                self._num_idle += 1
                thread.start()
            self._changed.notify(len(parts))

    def open_file(self, region: Region, remaining: Remaining) -> int | None:
        """See `DistFlow.open_file`."""
        channel = self._take(remaining)
        if not channel.passes_files:
            self._put_back(channel, answered=True)
            return None
        run = Run(region.id, region.generation, 0, region.num_bytes, memoryview(b""))
        part = Part(Ticket(region.num_bytes, remaining()), [run], None)
        reader = PartReader(channel, part, remaining)
        try:
            fd = reader.open_file(region.id)
            if fd is not None:
                try:
                    reader.check([run])
                except BaseException:
                    os.close(fd)
                    raise
            return fd
        finally:
            self._put_back(channel, reader.answered)

    # -------------------------------------------------------------------------------------------------- in a thread

    def _work(self) -> None:
        """Until the link is closed; what waits then is still answered."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._parts or self._closed)
                if not self._parts:
                    return
                part = self._parts.popleft()
                self._num_idle -= 1
            error: TransferError | None = None
            try:
                self._read_part(part)
            except TransferError as fault:
                error = fault
            except LinkError as fault:
                error = TransferError(fault.fault, fault.message)
            except (
                Exception
            ) as cause:  # a destination's or a backend's: it fails this transfer alone
                _log.warning("transfer failed", peer=self.peer, exc_info=True)
                error = TransferError(Fault.FAILED, f"{type(cause).__name__}: {cause}")
            with self._changed:
                self._num_idle += 1
            part.ticket.part_done(error)

    def _remaining(self, part: Part) -> float:
        """Of this part's deadline. Every thread that is at work comes by here a few times a second, and ends parts that
        nobody has begun in time, whatever the threads wait for themselves. Raises TransferError."""
        overdue: list[tuple[Part, TransferError]] = []
        with self._changed:
            if self._fault is not None:
                raise self._as_transfer_error()
            for _ in range(len(self._parts)):
                waiting = self._parts.popleft()
                try:
                    _ = waiting.ticket.remaining_s
                    self._parts.append(waiting)
                except TransferError as error:
                    overdue.append((waiting, error))
        for waiting, late in overdue:
            waiting.ticket.part_done(late)
        return part.ticket.remaining_s

    def _read_part(self, part: Part) -> None:
        remaining = functools.partial(self._remaining, part)
        channel = self._take(remaining)
        reader = PartReader(channel, part, remaining)
        try:
            by_connection, direct = [], []
            for run in part.runs:
                way = self._way(channel, run.region, reader)
                if way.mapped is not None or way.attached is not None:
                    reader.copy(run, way)
                    direct.append(run)
                else:
                    by_connection.append(run)
            if by_connection:
                reader.receive(by_connection)
            if direct:
                reader.check(direct)
        except TransferError as error:
            if error.fault in (Fault.UNKNOWN_REGION, Fault.STALE):
                self._forget({run.region for run in part.runs})
            if self._fault is not None:
                raise self._as_transfer_error() from error
            raise
        finally:
            self._put_back(channel, reader.answered)

    def _way(self, channel: Channel, region: int, reader: PartReader) -> Way:
        """How to get at the region: asked once."""
        if not channel.passes_files and not self._backends:
            return BY_CONNECTION
        with self._changed:
            way = self._ways.get(region)
            if way is not None:
                self._ways.move_to_end(region)
                return way
            backends = self._backends if len(self._attached) < _MAX_ATTACHED else {}
        way = reader.map(region, backends)
        with self._changed:
            if way.attached is not None:
                self._attached.append(way.attached)
            if not way.filling:  # else it is asked again: later there may be nothing to wait for
                self._ways[region] = way
            if len(self._ways) > _MAX_MAPPED:  # who reads by it now keeps the mapping until then
                self._ways.popitem(last=False)
        return way

    def _forget(self, regions: set[int]) -> None:
        with self._changed:
            for region in regions:
                self._ways.pop(region, None)

    def _take(self, remaining: Remaining) -> Channel:
        """A connection nobody uses, or a new one. Raises TransferError, LinkError."""
        with self._changed:
            if self._fault is not None:
                raise self._as_transfer_error()
            self._drop_ended()
            if self._idle:
                channel = self._idle.pop()
                self._busy.add(channel)
                return channel
        try:
            channel = self._connect(remaining)
        except LinkError as error:
            self._break(error)
            raise
        if not self._adopt(channel):
            channel.release()
            raise self._as_transfer_error()
        return channel

    def _adopt(self, channel: Channel) -> bool:
        """Count a new connection in, unless the link broke meanwhile."""
        with self._changed:
            if self._fault is not None:
                return False
            self._peer_left = False
            self._busy.add(channel)
            return True

    def _drop_ended(self) -> None:
        """Let go of idle connections that the peer has ended."""
        for channel in [channel for channel in self._idle if not channel.is_open()]:
            self._idle.remove(channel)
            channel.release()
            self._peer_left = True

    def _put_back(self, channel: Channel, answered: bool) -> None:
        with self._changed:
            self._busy.discard(channel)
            if answered and self._fault is None:
                self._idle.append(channel)
                return
        channel.release()

    def _break(self, error: LinkError) -> None:
        with self._changed:
            self._fault = self._fault or error
            for channel in self._busy:
                channel.close()
            idle, self._idle = self._idle, []
        for channel in idle:
            channel.release()

    def _as_transfer_error(self) -> TransferError:
        assert self._fault is not None
        return TransferError(self._fault.fault, self._fault.message)
