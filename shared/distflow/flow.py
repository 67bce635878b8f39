"""DistFlow's verbs: register, offer, link, transfer, relay (the paper, section 4).

Receiver-driven: whoever wants bytes asks for them and says where they go. Blocking sockets in threads: they let go of
the interpreter while bytes move. This package must not know blocks, pages or the bus: offers travel by other means.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, Self

import structlog

from shared.distflow import fabric as fabrics
from shared.distflow.backend import Backend
from shared.distflow.channel import Channel, Remaining, within
from shared.distflow.egress import Egress
from shared.distflow.faults import Fault, LinkError, TransferError
from shared.distflow.handshake import Credential, Gate, enter
from shared.distflow.holder import Holder
from shared.distflow.link import Link
from shared.distflow.memory import Destination, Memory, Source, num_bytes_of, writable
from shared.distflow.reader import runs_of
from shared.distflow.region import Entry, Piece, Region, Table
from shared.distflow.relay import Node, Patience, Relayed
from shared.distflow.shm import SharedBuffer
from shared.distflow.ticket import Ticket
from shared.rtc_messages import LinkOffer

_HANDSHAKE_S: Final = 5.0
_MAX_CONNECTIONS: Final = 1024  # of peers that read from here
_MAX_STREAMS: Final = 4

_log = structlog.get_logger(__name__)


def default_streams() -> int:
    """Connections that share one large transfer: on few cores more of them only get into each other's way."""
    return max(1, min(_MAX_STREAMS, len(os.sched_getaffinity(0)) // 4))


class DistFlow:
    """One instance's end of all its links.

    `name` is what peers know it by, `fabric` the address TCP binds to (a port is chosen), `directory` a folder of the
    host that its instances share and `host` its id: only those of the same `host` try shared memory. Threads start
    with `start()` and end with `close()`. `num_streams` connections share one large transfer (0: as the cores allow).
    All methods may be called from any thread; those that take `timeout_s` and return no ticket block.
    """

    def __init__(
        self,
        *,
        name: str,
        fabric: str = "127.0.0.1",
        directory: Path | None = None,
        host: str = "",
        backends: Sequence[Backend] = (),
        num_streams: int = 0,
    ) -> None:
        self._name = name
        self._fabric = fabric
        self._directory = directory if host else None
        self._host = host
        self._backends = {backend.scheme: backend for backend in backends}
        self._num_streams = num_streams or default_streams()
        self._table = Table()
        self._gate = Gate()
        self._egress = Egress()
        self._lock = threading.Lock()
        self._addresses: list[str] = []
        self._listeners: list[socket.socket] = []
        self._socket_path: Path | None = None
        self._acceptors: list[threading.Thread] = []
        self._connections: dict[Channel, threading.Thread] = {}
        self._links: list[Link] = []
        self._nodes: list[tuple[Node, Ticket]] = []
        self._closing = threading.Event()

    # --------------------------------------------------------------------------------------------------------- life

    def start(self) -> None:
        """Listen. Raises OSError if `fabric` is not an address of this machine, ValueError if it is a wildcard."""
        if self._directory is not None:
            listener, name = fabrics.listen_unix(self._directory)
            self._listeners.append(listener)
            self._socket_path = self._directory / name
            self._addresses.append(f"unix:{self._host}/{name}")
        try:
            listener = fabrics.listen_tcp(self._fabric)
        except (OSError, ValueError):
            self.close()
            raise
        self._listeners.append(listener)
        self._addresses.append(fabrics.tcp_address(listener))
        for listener in self._listeners:
            thread = threading.Thread(
                target=self._accept, args=(listener,), name="distflow-accept", daemon=True
            )
            self._acceptors.append(thread)
            thread.start()

    def close(self) -> None:
        """End every link, both ways, and every transfer; waits for the threads. Idempotent."""
        with self._lock:
            self._closing.set()
            links, self._links = self._links, []
            nodes, self._nodes = self._nodes, []
        for listener in self._listeners:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
        for thread in self._acceptors:
            thread.join()
        for listener in self._listeners:
            listener.close()
        if self._socket_path is not None:
            self._socket_path.unlink(missing_ok=True)
        for _, ticket in nodes:
            ticket.cancel()
        for link in links:
            link.close()
        for node, _ in nodes:
            node.join()
        with self._lock:
            connections = dict(self._connections)
        for channel in connections:
            channel.close()
        for thread in connections.values():
            thread.join()
        for entry in self._table.clear():
            self._withdraw(entry)
        for backend in self._backends.values():
            backend.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------- what peers may read

    def register(
        self, memory: Source | SharedBuffer, *, fd: int | None = None, bulk: bool = False
    ) -> Region:
        """Let peers read this memory. `fd`: the file whose bytes from 0 on it is, never to be shrunk; peers of this
        host are then given a read-only descriptor of it and copy by themselves. A SharedBuffer knows its own. `bulk`:
        it is large, and can wait (`limit_egress`)."""
        if isinstance(memory, SharedBuffer):
            return self._table.register(memory.view, memory.fd, bulk=bulk)
        return self._table.register(memory, fd, bulk=bulk)

    def renew(self, region: Region) -> Region:
        """The same memory with the next generation: whatever reads the old one fails, also if it is in the middle.
        Raises KeyError."""
        return self._table.renew(region.id)

    def available(self, region: Region) -> int:
        """How many of its first bytes are there; less than all only while a relay fills it. Raises TransferError."""
        return self._table.get(region.id).available

    def unregister(self, region: Region) -> None:
        """Nobody reads it from here on; who is in the middle fails. Idempotent."""
        entry = self._table.unregister(region.id)
        if entry is not None:
            self._withdraw(entry)

    def limit_egress(self, rate: float | Callable[[], float]) -> None:
        """Hand out no more than so many bytes a second of bulk and relayed regions over sockets, to all peers together;
        0: no limit. What may change is asked for chunk by chunk, from any thread."""
        self._egress.limit(rate if callable(rate) else lambda: rate)

    def allocate(self, num_bytes: int) -> SharedBuffer:
        """Memory that peers on this host can map once it is registered. Raises OSError."""
        return SharedBuffer(num_bytes, self._directory)

    # -------------------------------------------------------------------------------------------------------- links

    def offer(self, by: str, *, ttl_s: float = 10.0) -> LinkOffer:
        """A one-time token with which the instance of the name `by`, and no other, may open one link."""
        return LinkOffer(
            to=self._name,
            token=self._gate.offer(by, ttl_s),
            addresses=list(self._addresses),
            ttl_ms=int(1000 * ttl_s),
        )

    def link(self, offer: LinkOffer, *, timeout_s: float) -> Link:
        """Open the link that a peer offered, the best way that works. Raises LinkError."""
        remaining = within(timeout_s)
        token = Credential.of_token(offer.token)
        failure = LinkError(Fault.UNREACHABLE, f"{offer.to!r} has no address in reach")
        for address in offer.addresses:
            try:
                channel = self._connect(address, remaining)
            except LinkError as error:
                failure = error
                continue
            except TransferError as error:
                raise LinkError(error.fault, error.message) from error
            if channel is None:
                continue
            try:
                credential = enter(channel, token, self._name, remaining)
            except TransferError as error:
                channel.release()
                raise LinkError(error.fault, error.message) from error
            except LinkError:
                channel.release()
                raise
            return self._keep(
                Link(
                    peer=offer.to,
                    scheme=address.partition(":")[0],
                    first=channel,
                    connect=functools.partial(self._join, address, credential),
                    num_streams=self._num_streams,
                    backends=self._backends,
                )
            )
        raise failure

    def link_cluster(self, offers: Iterable[LinkOffer], *, timeout_s: float) -> dict[str, Link]:
        """Open all of them at once, by peer. A peer that cannot be reached is logged and missing from the result."""
        offers = list(offers)
        if not offers:
            return {}
        links = {}
        with ThreadPoolExecutor(min(len(offers), 32), "distflow-link") as pool:
            opening = [
                (offer, pool.submit(self.link, offer, timeout_s=timeout_s)) for offer in offers
            ]
            for offer, future in opening:
                try:
                    links[offer.to] = future.result()
                except LinkError as error:
                    _log.warning(
                        "no link", peer=offer.to, fault=error.fault.value, reason=error.message
                    )
        return links

    # ---------------------------------------------------------------------------------------------------- transfers

    def transfer(self, link: Link, pieces: Sequence[Piece], *, timeout_s: float) -> Ticket:
        """Start reading `pieces` into their places; returns at once. The ticket says the rest: all pieces are there and
        were of the generation asked for until the last byte, or TransferError. Raises ValueError for a piece whose
        place is not as long as it; LinkError if the link is broken."""
        runs = runs_of(pieces)
        ticket = Ticket(sum(run.length for run in runs), timeout_s)
        if runs:
            link.submit(ticket, runs)
        else:
            ticket.part_done()
        return ticket

    def open_file(self, link: Link, region: Region, *, timeout_s: float) -> int | None:
        """A read-only descriptor of the file whose bytes a peer's region is, once all of them are there: whoever maps
        it has them without a copy, for as long as he likes. It is the caller's to close. None: the peer is on another
        host, or the region is no file. Raises LinkError, TransferError."""
        return link.open_file(region, within(timeout_s))

    def relay(
        self,
        sources: Iterable[tuple[Link, Region]],
        into: Destination | SharedBuffer,
        *,
        timeout_s: float,
        fd: int | None = None,
        patience: Patience = Patience(),  # noqa: B008 - frozen
    ) -> Relayed:
        """Take part in a broadcast: read the whole region of the first source into `into`, and let others read it from
        here as it comes. A source that fails or tries one's patience is left for the next one, and reading goes on
        where it was; `sources` is drawn from only then, in a thread, so it may be a generator that links as needed.
        The region that others read is to be unregistered like any other. `fd` is as `register` has it."""
        fd = into.fd if isinstance(into, SharedBuffer) else fd
        memory = into.view if isinstance(into, SharedBuffer) else into
        place = memory if isinstance(memory, Memory) else writable(memory)
        region = self._table.register(memory, fd, filling=True, bulk=True)
        ticket = Ticket(num_bytes_of(memory), timeout_s)
        node = Node(
            sources,
            place,
            ticket,
            patience,
            advance=functools.partial(self._table.advance, region.id),
            fail=functools.partial(self._table.fail, region.id),
        )
        with self._lock:
            self._check_open()
            self._nodes = [(n, t) for n, t in self._nodes if not t.future.done()] + [(node, ticket)]
            node.start()
        return Relayed(region, ticket)

    # ------------------------------------------------------------------------------------------------------ inside

    def _connect(self, address: str, remaining: Remaining) -> Channel | None:
        """A connection nobody has proven anything on; None if the address is not for here. Raises LinkError, and
        TransferError when time is up."""
        scheme, _, rest = address.partition(":")
        try:
            if scheme == "tcp":
                return Channel(fabrics.connect_tcp(rest, remaining()))
            host, _, name = rest.partition("/")
            if scheme == "unix" and self._directory is not None and host == self._host:
                return Channel(fabrics.connect_unix(self._directory, name, remaining()))
        except TimeoutError as error:
            raise TransferError(Fault.DEADLINE, f"nobody answers at {address} in time") from error
        except (OSError, ValueError) as error:
            raise LinkError(Fault.UNREACHABLE, f"nobody answers at {address}: {error}") from error
        return None

    def _join(self, address: str, credential: Credential, remaining: Remaining) -> Channel:
        """One more connection of a link. Raises LinkError, TransferError."""
        channel = self._connect(address, remaining)
        assert channel is not None
        try:
            enter(channel, credential, self._name, remaining)
        except BaseException:
            channel.release()
            raise
        return channel

    def _keep(self, link: Link) -> Link:
        with self._lock:
            dead = [known for known in self._links if not known.alive]
            self._links = [known for known in self._links if known not in dead] + [link]
            if self._closing.is_set():
                dead = [link]
        for known in dead:
            known.close()
        self._check_open()
        return link

    def _check_open(self) -> None:
        if self._closing.is_set():
            raise LinkError(Fault.CLOSED, f"DistFlow of {self._name!r} was closed")

    def _withdraw(self, entry: Entry) -> None:
        for backend in self._backends.values():
            backend.withdraw(entry.memory)

    def _accept(self, listener: socket.socket) -> None:
        while not self._closing.is_set():
            try:
                connection, _ = listener.accept()
            except OSError as error:
                if self._closing.is_set():
                    return
                _log.warning("cannot accept a connection", error=str(error))
                time.sleep(0.1)  # out of descriptors, say
                continue
            with self._lock:
                if self._closing.is_set() or len(self._connections) >= _MAX_CONNECTIONS:
                    connection.close()
                    continue
                channel = Channel(connection)
                thread = threading.Thread(
                    target=self._serve,
                    args=(channel, connection),
                    name="distflow-serve",
                    daemon=True,
                )
                self._connections[channel] = thread
                thread.start()

    def _serve(self, channel: Channel, connection: socket.socket) -> None:
        link = None
        try:
            fabrics.tune(connection)
            link = self._gate.admit(channel, within(_HANDSHAKE_S))
            holder = Holder(channel, self._table, list(self._backends.values()), self._egress)
            holder.serve()
        except TransferError as error:
            if error.fault != Fault.PEER_LOST:
                _log.warning("connection ended", fault=error.fault.value, reason=error.message)
        except Exception:
            _log.exception("connection failed")
        finally:
            if link is not None:
                self._gate.left(link)
            with self._lock:
                self._connections.pop(channel, None)
            channel.release()
