"""DistFlow's verbs between real processes: over TCP, and with memory shared on one host."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from shared.distflow.faults import Fault, LinkError, TransferError
from shared.distflow.flow import DistFlow
from shared.distflow.link import Link
from shared.distflow.region import Piece, Region
from tests.shared.distflow_peer import Peer, SlowMemory, as_json, pattern

MIB = 1 << 20
StartPeer = Callable[..., Peer]


@pytest.fixture
def start_peer(tmp_path: Path) -> Iterator[StartPeer]:
    """Starts processes, and ends them."""
    peers: list[Peer] = []

    def start(name: str, host: str = "h") -> Peer:
        peers.append(Peer(name, tmp_path, host))
        return peers[-1]

    yield start
    for peer in peers:
        peer.end()


@pytest.fixture(params=["unix", "tcp"])
def flow(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[DistFlow]:
    """This process' end: on the peers' host, or on another."""
    host = "h" if request.param == "unix" else "other"
    with DistFlow(name="here", directory=tmp_path, host=host) as flow:
        yield flow


def read(flow: DistFlow, link: Link, region: Region, timeout_s: float = 10.0) -> np.ndarray:
    """All of it."""
    into = np.zeros(region.num_bytes, np.uint8)
    pieces = [Piece(region.id, region.generation, 0, region.num_bytes, into)]
    flow.transfer(link, pieces, timeout_s=timeout_s).wait()
    return into


@pytest.mark.parametrize("shared", [True, False])
def test_what_is_read_is_what_was_registered(
    flow: DistFlow, start_peer: StartPeer, shared: bool
) -> None:
    """A region of many chunks and parts arrives byte for byte, whatever memory it is and whatever way it takes."""
    peer = start_peer("a")
    region = peer.register(9 * MIB + 13, 1, shared=shared)
    link = flow.link(peer.offer("here"), timeout_s=5)
    assert np.array_equal(pattern(9 * MIB + 13, 1), read(flow, link, region))


def test_the_way_is_the_shortest_there_is(tmp_path: Path, start_peer: StartPeer) -> None:
    """On one host a link is a Unix socket, and memory in files is mapped; from elsewhere it is TCP."""
    peer = start_peer("a")
    for host, scheme in (("h", "unix"), ("other", "tcp"), ("", "tcp")):
        with DistFlow(name="here", directory=tmp_path, host=host) as flow:
            assert flow.link(peer.offer("here"), timeout_s=5).scheme == scheme


def test_pieces_go_where_they_belong(flow: DistFlow, start_peer: StartPeer) -> None:
    """Many pieces of several regions, in any order, land each in its own place and nowhere else."""
    peer = start_peer("a")
    regions = [peer.register(100_000, seed, shared=seed == 1) for seed in range(3)]
    wanted = [pattern(100_000, seed) for seed in range(3)]
    link = flow.link(peer.offer("here"), timeout_s=5)
    into = np.zeros(200_000, np.uint8)
    random = np.random.default_rng(5)
    pieces, expected = [], np.zeros_like(into)
    for number in random.permutation(200):
        which, offset = int(random.integers(3)), int(random.integers(99_500))
        place = slice(int(number) * 1000, int(number) * 1000 + 500)
        piece = Piece(regions[which].id, regions[which].generation, offset, 500, into[place])
        pieces.append(piece)
        expected[place] = wanted[which][offset : offset + 500]
    flow.transfer(link, pieces, timeout_s=10).wait()
    assert np.array_equal(expected, into)


def test_no_pieces_are_done_at_once(flow: DistFlow, start_peer: StartPeer) -> None:
    """A transfer of nothing is done."""
    link = flow.link(start_peer("a").offer("here"), timeout_s=5)
    assert flow.transfer(link, [], timeout_s=1).poll()


async def test_a_ticket_can_be_awaited(flow: DistFlow, start_peer: StartPeer) -> None:
    """A coroutine waits for a transfer without a thread of its own, for its success and for its error."""
    peer = start_peer("a")
    region = peer.register(MIB)
    link = flow.link(peer.offer("here"), timeout_s=5)
    into = bytearray(MIB)
    good = flow.transfer(link, [Piece(region.id, 1, 0, MIB, into)], timeout_s=5)
    assert await asyncio.wrap_future(good.future) == MIB
    bad = flow.transfer(link, [Piece(region.id, 2, 0, MIB, into)], timeout_s=5)
    with pytest.raises(TransferError):
        await asyncio.wrap_future(bad.future)


async def test_who_leaves_while_waiting_breaks_nothing(
    flow: DistFlow, start_peer: StartPeer
) -> None:
    """A coroutine that is cancelled while it awaits a transfer takes no thread of the link with it."""
    peer = start_peer("a")
    region = peer.register(2 * MIB, slow_s=0.1)
    link = flow.link(peer.offer("here"), timeout_s=5)
    for _ in range(6):  # more than the link has threads
        ticket = flow.transfer(link, [_whole(region)], timeout_s=5)
        waiting = asyncio.wrap_future(ticket.future)
        waiting.cancel()
        await asyncio.sleep(0)
        ticket.cancel()
    assert (await asyncio.to_thread(read, flow, link, region)).any()


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"region": 99}, Fault.UNKNOWN_REGION),
        ({"generation": 2}, Fault.STALE),
        ({"generation": 0}, Fault.STALE),
        ({"offset": 1}, Fault.OUT_OF_BOUNDS),
        ({"offset": 1 << 63}, Fault.OUT_OF_BOUNDS),
    ],
)
def test_a_wrong_name_is_a_typed_error(
    flow: DistFlow, start_peer: StartPeer, shared: bool, change: dict[str, int], fault: Fault
) -> None:
    """Unknown regions, other generations and bytes beyond the end are refused, and the link goes on."""
    peer = start_peer("a")
    region = peer.register(5000, shared=shared)
    link = flow.link(peer.offer("here"), timeout_s=5)
    fields = {"region": region.id, "generation": 1, "offset": 0, "length": 5000, **change}
    with pytest.raises(TransferError) as raised:
        flow.transfer(link, [Piece(**fields, into=bytearray(5000))], timeout_s=5).wait()
    assert raised.value.fault == fault
    assert np.array_equal(pattern(5000), read(flow, link, region))


@pytest.mark.parametrize("shared", [True, False])
def test_a_new_generation_ends_the_old_one(
    flow: DistFlow, start_peer: StartPeer, shared: bool
) -> None:
    """After `renew` the old name is stale and the new one is read; after `unregister` there is neither."""
    peer = start_peer("a")
    region = peer.register(5000, shared=shared)
    link = flow.link(peer.offer("here"), timeout_s=5)
    read(flow, link, region)
    renewed = Region(*peer.ask("renew", region=region.id))
    with pytest.raises(TransferError, match="generation 2, not 1") as raised:
        read(flow, link, region)
    assert raised.value.fault == Fault.STALE
    assert np.array_equal(pattern(5000), read(flow, link, renewed))
    peer.ask("unregister", region=region.id)
    with pytest.raises(TransferError) as raised:
        read(flow, link, renewed)
    assert raised.value.fault == Fault.UNKNOWN_REGION


def test_one_bad_piece_fails_the_whole_transfer(flow: DistFlow, start_peer: StartPeer) -> None:
    """A transfer with one piece that cannot be had is never called done."""
    peer = start_peer("a")
    region = peer.register(8 * MIB)
    link = flow.link(peer.offer("here"), timeout_s=5)
    into = bytearray(9 * MIB)
    whole = Piece(region.id, 1, 0, 8 * MIB, memoryview(into)[: 8 * MIB])
    beyond = Piece(region.id, 1, 7 * MIB + 1, MIB, memoryview(into)[8 * MIB :])
    ticket = flow.transfer(link, [whole, beyond], timeout_s=5)
    with pytest.raises(TransferError):
        ticket.wait()


def test_a_place_of_another_size_is_a_mistake_of_the_caller(
    flow: DistFlow, start_peer: StartPeer
) -> None:
    """The place a piece goes to has to be exactly as long, and writable."""
    link = flow.link(start_peer("a").offer("here"), timeout_s=5)
    with pytest.raises(ValueError, match="does not fit"):
        flow.transfer(link, [Piece(1, 1, 0, 10, bytearray(9))], timeout_s=5)
    with pytest.raises(TypeError, match="read-only"):
        flow.transfer(link, [Piece(1, 1, 0, 10, bytes(10))], timeout_s=5)  # type: ignore[arg-type]


def test_memory_of_a_device_is_staged(flow: DistFlow, start_peer: StartPeer) -> None:
    """Memory the host cannot address is read and written through its own two calls, on either side."""
    peer = start_peer("a")
    region = peer.register(2 * MIB + 7, 3, slow_s=0.0)
    link = flow.link(peer.offer("here"), timeout_s=5)
    into = SlowMemory(2 * MIB + 7)
    pieces = [Piece(region.id, region.generation, 0, region.num_bytes, into)]
    flow.transfer(link, pieces, timeout_s=10).wait()
    assert np.array_equal(pattern(2 * MIB + 7, 3), np.frombuffer(into.bytes, np.uint8))


def test_a_place_that_fails_fails_its_transfer_only(flow: DistFlow, start_peer: StartPeer) -> None:
    """What a destination raises ends that transfer with FAILED; the next one on the link succeeds."""

    class Broken(SlowMemory):
        def save(self, offset: int, data: memoryview) -> None:
            raise RuntimeError("no device")

    peer = start_peer("a")
    region = peer.register(5000)
    link = flow.link(peer.offer("here"), timeout_s=5)
    with pytest.raises(TransferError, match="no device") as raised:
        flow.transfer(link, [Piece(region.id, 1, 0, 5000, Broken(5000))], timeout_s=5).wait()
    assert raised.value.fault == Fault.FAILED
    assert np.array_equal(pattern(5000), read(flow, link, region))


def test_everybody_reads_from_everybody(tmp_path: Path, start_peer: StartPeer) -> None:
    """Three processes and this one, each linked with all others, read at once and get what each has."""
    names = ["a", "b", "c"]
    peers = {name: start_peer(name, "h" if name != "c" else "far") for name in names}
    regions = {
        name: peer.register(3 * MIB, seed, shared=True)
        for seed, (name, peer) in enumerate(peers.items())
    }
    sums = {
        name: int(pattern(3 * MIB, seed).sum(dtype=np.int64)) for seed, name in enumerate(names)
    }
    for name, peer in peers.items():
        for other in names:
            if other != name:
                peer.ask("link", offer=as_json(peers[other].offer(name)))
    with DistFlow(name="here", directory=tmp_path, host="h") as flow:
        links = flow.link_cluster([peer.offer("here") for peer in peers.values()], timeout_s=5)
        assert sorted(links) == names
        for shift in (1, 2):
            for i, name in enumerate(names):
                other = names[(i + shift) % 3]
                peers[name].tell("read", peer=other, region=list(_fields(regions[other])))
            own = [flow.transfer(links[n], [_whole(regions[n])], timeout_s=10) for n in names]
            for ticket in own:
                ticket.wait()
            for i, name in enumerate(names):
                assert sums[names[(i + shift) % 3]] == peers[name].answer()


def test_many_threads_share_a_link(flow: DistFlow, start_peer: StartPeer) -> None:
    """Transfers of many threads over one link do not get into each other's way."""
    peer = start_peer("a")
    region = peer.register(300_000, 2)
    wanted = pattern(300_000, 2)
    link = flow.link(peer.offer("here"), timeout_s=5)
    wrong: list[int] = []

    def work(number: int) -> None:
        random = np.random.default_rng(number)
        for _ in range(20):
            offset = int(random.integers(200_000))
            into = np.zeros(100_000, np.uint8)
            piece = Piece(region.id, 1, offset, 100_000, into)
            flow.transfer(link, [piece], timeout_s=20).wait()
            if not np.array_equal(into, wanted[offset : offset + 100_000]):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_closed_link_does_nothing_any_more(flow: DistFlow, start_peer: StartPeer) -> None:
    """Closing a link fails what is under way with CLOSED and refuses what comes after."""
    peer = start_peer("a")
    region = peer.register(8 * MIB, slow_s=0.2)
    link = flow.link(peer.offer("here"), timeout_s=5)
    ticket = flow.transfer(link, [_whole(region)], timeout_s=30)
    link.close()
    with pytest.raises(TransferError) as raised:
        ticket.wait(5)
    assert raised.value.fault == Fault.CLOSED
    assert not link.alive
    with pytest.raises(LinkError):
        flow.transfer(link, [_whole(region)], timeout_s=5)


def test_a_cancelled_transfer_ends(flow: DistFlow, start_peer: StartPeer) -> None:
    """Cancelling ends a transfer long before its peer would have, and the link can be used again."""
    peer = start_peer("a")
    region, quick = peer.register(8 * MIB, slow_s=0.5), peer.register(100)
    link = flow.link(peer.offer("here"), timeout_s=5)
    ticket = flow.transfer(link, [_whole(region)], timeout_s=60)
    ticket.cancel()
    with pytest.raises(TransferError) as raised:
        ticket.wait(5)
    assert raised.value.fault == Fault.CANCELLED
    assert np.array_equal(pattern(100), read(flow, link, quick))


def test_nothing_is_left_behind(tmp_path: Path, start_peer: StartPeer) -> None:
    """After `close` there are no threads, descriptors or files of it."""
    peer = start_peer("a")
    region = peer.register(MIB, shared=True)
    before = _descriptors()
    threads = threading.active_count()
    with DistFlow(name="here", directory=tmp_path, host="h") as flow:
        buffer = flow.allocate(MIB)
        flow.register(buffer)
        link = flow.link(peer.offer("here"), timeout_s=5)
        read(flow, link, region)
        peer.ask("link", offer=as_json(flow.offer("a")))
        buffer.close()
    assert threading.active_count() == threads
    assert _descriptors() == before
    peer.end()
    assert not list(tmp_path.iterdir())


def test_peers_are_given_memory_they_cannot_write_to(tmp_path: Path) -> None:
    """The descriptor of a region that a peer is handed is read-only."""
    from shared.distflow.shm import SharedBuffer, reopen_read_only

    buffer = SharedBuffer(4096, tmp_path)
    fd = reopen_read_only(buffer.fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.write(fd, b"x")
    os.close(fd)
    buffer.close()


def test_a_wildcard_is_no_fabric() -> None:
    """An address no peer can connect to is refused at the start."""
    with pytest.raises(ValueError, match="no address peers can reach"):
        DistFlow(name="here", fabric="0.0.0.0").start()


def _whole(region: Region) -> Piece:
    into = bytearray(region.num_bytes)
    return Piece(region.id, region.generation, 0, region.num_bytes, into)


def _fields(region: Region) -> tuple[int, int, int]:
    return region.id, region.generation, region.num_bytes


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))
