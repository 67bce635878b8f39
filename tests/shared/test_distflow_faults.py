"""What DistFlow does when a peer dies, stops, lies, or comes with the wrong papers: an error in time, never a hang."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shared.distflow.channel import Channel, within
from shared.distflow.faults import Fault, LinkError, TransferError
from shared.distflow.flow import DistFlow
from shared.distflow.handshake import Credential, Gate, enter
from shared.distflow.region import Piece, Region
from shared.rtc_messages import LinkOffer
from tests.shared.distflow_peer import Peer, pattern

MIB = 1 << 20


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[Peer]:
    """A process that holds regions."""
    peer = Peer("a", tmp_path, "h")
    yield peer
    peer.end()


@pytest.fixture(params=["unix", "tcp"])
def flow(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[DistFlow]:
    """This process' end: on the peer's host, or on another."""
    host = "h" if request.param == "unix" else "other"
    with DistFlow(name="here", directory=tmp_path, host=host) as flow:
        yield flow


def whole(region: Region) -> Piece:
    into = bytearray(region.num_bytes)
    return Piece(region.id, region.generation, 0, region.num_bytes, into)


# ------------------------------------------------------------------------------------------------- dead and stopped


@pytest.mark.parametrize("kind", ["plain", "shared", "device"])
def test_a_killed_peer_is_an_error(flow: DistFlow, peer: Peer, kind: str) -> None:
    """kill -9 of the holder, before or while it is read, fails the transfer and the link, and does not wait for the
    deadline."""
    more = {"shared": kind == "shared", "slow_s": 0.1 if kind == "device" else None}
    region = peer.register(32 * MIB, **more)
    link = flow.link(peer.offer("here"), timeout_s=5)
    ticket = flow.transfer(link, [whole(region)], timeout_s=30)
    if kind != "device":
        ticket.wait()  # so a shared region is mapped, and goes on being mapped
    peer.kill()
    if kind != "device":
        ticket = flow.transfer(link, [whole(region)], timeout_s=30)
    with pytest.raises(TransferError) as raised:
        ticket.wait(10)
    assert raised.value.fault in (Fault.PEER_LOST, Fault.UNREACHABLE)
    with pytest.raises((TransferError, LinkError)):
        flow.transfer(link, [whole(region)], timeout_s=30).wait(10)
    assert not link.alive


@pytest.mark.parametrize("shared", [True, False])
def test_a_stopped_peer_is_an_error_at_the_deadline(
    flow: DistFlow, peer: Peer, shared: bool
) -> None:
    """SIGSTOP of the holder fails the transfer when its time is up; continued, it serves the same link again."""
    region = peer.register(4 * MIB, 1, shared=shared)
    link = flow.link(peer.offer("here"), timeout_s=5)
    flow.transfer(link, [whole(region)], timeout_s=10).wait()
    peer.stop()
    started = time.monotonic()
    into = bytearray(4 * MIB)
    ticket = flow.transfer(link, [Piece(region.id, 1, 0, 4 * MIB, into)], timeout_s=0.5)
    with pytest.raises(TransferError) as raised:
        ticket.wait(10)
    assert raised.value.fault == Fault.DEADLINE
    assert time.monotonic() - started >= 0.5
    left = bytes(into)
    peer.go_on()
    again = bytearray(4 * MIB)
    flow.transfer(link, [Piece(region.id, 1, 0, 4 * MIB, again)], timeout_s=10).wait()
    assert again == pattern(4 * MIB, 1).tobytes()
    assert bytes(into) == left  # nothing writes into the place of a transfer that has failed


def test_a_slow_peer_is_an_error_at_the_deadline(flow: DistFlow, peer: Peer) -> None:
    """A holder that brings a little now and then is not waited for beyond the deadline."""
    region = peer.register(16 * MIB, slow_s=0.2)
    link = flow.link(peer.offer("here"), timeout_s=5)
    ticket = flow.transfer(link, [whole(region)], timeout_s=0.7)
    with pytest.raises(TransferError) as raised:
        ticket.wait(10)
    assert raised.value.fault == Fault.DEADLINE


def test_a_deadline_holds_for_those_who_have_to_wait(flow: DistFlow, peer: Peer) -> None:
    """Many transfers that wait for a stopped peer do not keep one with less time from failing in time."""
    region = peer.register(MIB)
    link = flow.link(peer.offer("here"), timeout_s=5)
    peer.stop()
    patient = [flow.transfer(link, [whole(region)], timeout_s=30) for _ in range(20)]
    hurried = flow.transfer(link, [whole(region)], timeout_s=0.5)
    with pytest.raises(TransferError) as raised:
        hurried.wait(10)
    assert raised.value.fault == Fault.DEADLINE
    assert [t.future.exception() for t in patient if t.future.done()] == []
    peer.go_on()
    for ticket in patient:
        ticket.wait(20)


def test_linking_to_a_stopped_or_dead_peer_fails(flow: DistFlow, peer: Peer) -> None:
    """A link to a process that does not answer is an error at the deadline; to one that is gone, at once."""
    offers = [peer.offer("here") for _ in range(3)]
    peer.stop()
    with pytest.raises(LinkError) as raised:
        flow.link(offers[0], timeout_s=0.5)
    assert raised.value.fault == Fault.DEADLINE
    assert flow.link_cluster(offers[1:2], timeout_s=0.5) == {}
    peer.kill()
    with pytest.raises(LinkError) as raised:
        flow.link(offers[2], timeout_s=30)
    assert raised.value.fault == Fault.UNREACHABLE


def test_an_unregistered_region_ends_who_is_in_the_middle(flow: DistFlow, peer: Peer) -> None:
    """A region that goes while it is read fails that transfer: what came before is not taken for all of it."""
    region = peer.register(16 * MIB, slow_s=0.05)
    link = flow.link(peer.offer("here"), timeout_s=5)
    ticket = flow.transfer(link, [whole(region)], timeout_s=30)
    peer.ask("unregister", region=region.id)
    with pytest.raises(TransferError) as raised:
        ticket.wait(10)
    assert raised.value.fault == Fault.UNKNOWN_REGION


def test_a_renewed_region_ends_who_is_in_the_middle(flow: DistFlow, peer: Peer) -> None:
    """A region whose generation changes while it is read fails that transfer as stale."""
    region = peer.register(16 * MIB, slow_s=0.05)
    link = flow.link(peer.offer("here"), timeout_s=5)
    ticket = flow.transfer(link, [whole(region)], timeout_s=30)
    peer.ask("renew", region=region.id)
    with pytest.raises(TransferError) as raised:
        ticket.wait(10)
    assert raised.value.fault == Fault.STALE


# ------------------------------------------------------------------------------------------------------------ papers


def test_a_token_opens_one_link(flow: DistFlow, peer: Peer) -> None:
    """A token that was used is refused, and the link it opened goes on."""
    region = peer.register(100)
    offer = peer.offer("here")
    link = flow.link(offer, timeout_s=5)
    with pytest.raises(LinkError) as raised:
        flow.link(offer, timeout_s=5)
    assert raised.value.fault == Fault.REFUSED
    flow.transfer(link, [whole(region)], timeout_s=5).wait()


def test_a_token_is_for_one_name_and_for_a_while(
    tmp_path: Path, flow: DistFlow, peer: Peer
) -> None:
    """Another instance cannot use a token, and nobody after its time."""
    for offer in (peer.offer("somebody else"), peer.offer("here", ttl_s=0.0)):
        with pytest.raises(LinkError) as raised:
            flow.link(offer, timeout_s=5)
        assert raised.value.fault == Fault.REFUSED


def test_a_wrong_secret_is_found_out(flow: DistFlow, peer: Peer) -> None:
    """Who knows a token's name and not its secret gets no link, and neither side takes the other for genuine."""
    offer = peer.offer("here")
    forged = replace(offer, token=offer.token[:-1] + bytes([offer.token[-1] ^ 1]))
    with pytest.raises(LinkError) as raised:
        flow.link(forged, timeout_s=5)
    assert raised.value.fault == Fault.TAMPERED
    with pytest.raises(LinkError, match="is none"):
        flow.link(replace(offer, token=b"short"), timeout_s=5)


def test_an_opener_has_to_prove_itself() -> None:
    """The holder lets nobody in whose proof does not hold, and an eavesdropper's recording of one that did is of no
    use: the token is gone, and the challenge another."""
    gate = Gate()
    token = gate.offer("b", 5.0)
    good = Credential.of_token(token)
    outcomes: list[object] = []

    def admit(channel: Channel) -> None:
        try:
            outcomes.append(gate.admit(channel, within(5.0)))
        except TransferError as error:
            outcomes.append(error.fault)

    def connect() -> tuple[Channel, Channel, threading.Thread]:
        here, there = socket.socketpair()
        thread = threading.Thread(target=admit, args=(Channel(there),))
        thread.start()
        return Channel(here), Channel(there), thread

    here, there, thread = connect()
    forged = Credential(good.id, bytes(32))
    with pytest.raises(LinkError):
        enter(here, forged, "b", within(5.0))
    here.close()
    thread.join()
    assert outcomes == [Fault.PEER_LOST]
    for channel in (here, there):
        channel.release()

    token = gate.offer("b", 5.0)
    here, there, thread = connect()
    link = enter(here, Credential.of_token(token), "b", within(5.0))
    thread.join()
    assert outcomes[1] == link.id
    for channel in (here, there):
        channel.release()

    here, there, thread = connect()
    with pytest.raises(LinkError):
        enter(here, Credential.of_token(token), "b", within(5.0))
    thread.join()
    assert outcomes[2] == Fault.REFUSED
    for channel in (here, there):
        channel.release()


def test_offers_and_links_end() -> None:
    """A gate forgets offers after their time, and links some time after their last connection."""
    now = 0.0
    gate = Gate(lambda: now)
    tokens = [gate.offer("b", 5.0) for _ in range(5000)]
    here, there = socket.socketpair()
    ends = Channel(here), Channel(there)
    found: list[bytes] = []
    thread = threading.Thread(target=lambda: found.append(gate.admit(ends[1], within(5.0))))
    thread.start()
    link = enter(ends[0], Credential.of_token(tokens[-1]), "b", within(5.0))
    thread.join()
    assert gate.num_links == 1
    gate.left(found[0])
    assert gate.num_links == 0
    now = 31.0
    thread = threading.Thread(target=lambda: _refused(gate, ends[1]))
    thread.start()
    with pytest.raises(LinkError):
        enter(ends[0], link, "b", within(5.0))
    thread.join()
    for end in ends:
        end.release()


def test_an_opener_that_goes_at_once_leaves_no_link() -> None:
    """A link whose opener is gone before it is told that it is in counts no connection, so it ends in time."""
    gate = Gate()
    here, there = socket.socketpair()
    ends = Channel(here), Channel(there)

    def gone() -> float:  # the proof is read by then, and READY not sent
        if gate.num_links:
            raise TransferError(Fault.DEADLINE, "gone")
        return 5.0

    found: list[object] = []

    def admit() -> None:
        try:
            found.append(gate.admit(ends[1], gone))
        except TransferError as error:
            found.append(error.fault)

    thread = threading.Thread(target=admit)
    thread.start()
    with pytest.raises(TransferError):
        enter(ends[0], Credential.of_token(gate.offer("b", 5.0)), "b", within(0.5))
    thread.join()
    assert found == [Fault.DEADLINE]
    assert gate.num_links == 0
    for end in ends:
        end.release()


def _refused(gate: Gate, channel: Channel) -> None:
    with pytest.raises(TransferError):
        gate.admit(channel, within(5.0))


# --------------------------------------------------------------------------------------------------------- tampering


class Meddler:
    """A man in the middle of a TCP connection: hands everything on, except for what `change` does to it.

    `change(from_holder, bytes so far, data)` gives back the data, changed or not.
    """

    def __init__(self, offer: LinkOffer, change: Callable[[bool, int, bytes], bytes]) -> None:
        ip, port = next(a for a in offer.addresses if a.startswith("tcp:"))[4:].rsplit(":", 1)
        self._target = ip, int(port)
        self._change = change
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._run, daemon=True)]
        self._threads[0].start()
        port = self._listener.getsockname()[1]
        self.offer = replace(offer, addresses=[f"tcp:127.0.0.1:{port}"])

    def _run(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection(self._target)
            self._sockets += [near, far]
            for source, sink, from_holder in ((near, far, False), (far, near, True)):
                thread = threading.Thread(target=self._pump, args=(source, sink, from_holder))
                self._threads.append(thread)
                thread.start()

    def _pump(self, source: socket.socket, sink: socket.socket, from_holder: bool) -> None:
        count = 0
        with contextlib.suppress(OSError):  # the other end has gone, as it should
            while data := source.recv(65536):
                sink.sendall(self._change(from_holder, count, data))
                count += len(data)
        _end(source, sink)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        _end(*self._sockets)
        for thread in self._threads:
            thread.join()
        for end in self._sockets:
            end.close()


def _end(*ends: socket.socket) -> None:
    for end in ends:
        with contextlib.suppress(OSError):  # ended already
            end.shutdown(socket.SHUT_RDWR)


HANDSHAKE_UP, HANDSHAKE_DOWN = 4 + 1 + 16 + 32 + 255 + 32, 65 + 32
READ_BYTES = 32 + 8 + 32
CHUNK_HEAD = 32 + 12


@pytest.fixture
def far(tmp_path: Path) -> Iterator[DistFlow]:
    """This process' end, which has to go by TCP."""
    with DistFlow(name="here", num_streams=1) as flow:
        yield flow


def _flip(direction: bool, position: int) -> Callable[[bool, int, bytes], bytes]:
    """One bit of the byte at `position` of one direction, on every connection."""

    def change(from_holder: bool, count: int, data: bytes) -> bytes:
        if from_holder != direction or not count <= position < count + len(data):
            return data
        changed = bytearray(data)
        changed[position - count] ^= 1
        return bytes(changed)

    return change


@pytest.mark.parametrize(
    ("from_holder", "position"),
    [
        (False, 1),  # magic
        (False, 10),  # the token's name
        (False, 30),  # nonce
        (False, 300),  # name
        (False, 310),  # proof
        (True, 0),  # the answer's first byte
        (True, 10),  # nonce
        (True, 40),  # proof
        (True, 70),  # the first frame
    ],
)
def test_a_changed_handshake_makes_no_link(
    far: DistFlow, peer: Peer, from_holder: bool, position: int
) -> None:
    """Whatever bit of the handshake somebody in the middle flips, there is no link."""
    meddler = Meddler(peer.offer("here"), _flip(from_holder, position))
    with pytest.raises(LinkError):
        far.link(meddler.offer, timeout_s=0.7)
    meddler.close()


@pytest.mark.parametrize(
    ("from_holder", "position", "faults"),
    [
        (False, HANDSHAKE_UP + 16 + 8, {Fault.PEER_LOST}),  # the region asked for
        (False, HANDSHAKE_UP + 8, {Fault.PEER_LOST}),  # the frame's number
        (False, HANDSHAKE_UP + READ_BYTES - 1, {Fault.PEER_LOST}),  # the MAC
        (True, HANDSHAKE_DOWN + 17, {Fault.TAMPERED}),  # the length of a chunk
        (True, HANDSHAKE_DOWN + 22, {Fault.TAMPERED}),  # its checksum
        (True, HANDSHAKE_DOWN + 43, {Fault.TAMPERED}),  # the MAC
        (True, HANDSHAKE_DOWN + CHUNK_HEAD + 500, {Fault.CORRUPT}),  # the bytes
        (True, HANDSHAKE_DOWN + CHUNK_HEAD + 1000 + 5, {Fault.TAMPERED, Fault.DEADLINE}),  # DONE
    ],
)
def test_a_changed_transfer_is_not_done(
    far: DistFlow, peer: Peer, from_holder: bool, position: int, faults: set[Fault]
) -> None:
    """Whatever bit of a request, an answer or the bytes themselves somebody flips, the transfer fails."""
    region = peer.register(1000)
    meddler = Meddler(peer.offer("here"), _flip(from_holder, position))
    link = far.link(meddler.offer, timeout_s=5)
    with pytest.raises(TransferError) as raised:
        far.transfer(link, [whole(region)], timeout_s=0.7).wait()
    assert raised.value.fault in faults
    meddler.close()


def test_a_repeated_request_is_not_answered(far: DistFlow, peer: Peer) -> None:
    """A frame that is sent a second time ends the connection."""
    region = peer.register(1000)
    seen = bytearray()

    def repeat(from_holder: bool, count: int, data: bytes) -> bytes:
        if from_holder or count < HANDSHAKE_UP:
            return data
        seen.extend(data)
        return data if len(seen) > READ_BYTES else data + data

    meddler = Meddler(peer.offer("here"), repeat)
    link = far.link(meddler.offer, timeout_s=5)
    far.transfer(link, [whole(region)], timeout_s=5).wait()  # the first of the two is genuine
    for _ in range(100):
        if not link.alive:
            break
        time.sleep(0.05)
    assert not link.alive
    meddler.close()


def test_noise_does_not_stop_a_holder(flow: DistFlow, peer: Peer) -> None:
    """Connections that say nothing, or nonsense, cost the others nothing."""
    region = peer.register(1000)
    offer = peer.offer("here")
    ip, port = offer.addresses[-1][4:].rsplit(":", 1)
    noise = [socket.create_connection((ip, int(port))) for _ in range(20)]
    for number, connection in enumerate(noise[:15]):
        connection.sendall(np.random.default_rng(number).bytes(400))
    link = flow.link(offer, timeout_s=5)
    into = bytearray(1000)
    flow.transfer(link, [Piece(region.id, 1, 0, 1000, into)], timeout_s=5).wait()
    assert into == pattern(1000).tobytes()
    for connection in noise:
        connection.close()
