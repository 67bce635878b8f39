"""Broadcast by relay: chains and trees of real processes, with nodes that die, stop or are slow in the middle."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.distflow.faults import TransferError
from shared.distflow.flow import DistFlow
from shared.distflow.region import Piece, Region
from tests.shared.distflow_peer import Peer, as_json, pattern

MIB = 1 << 20
SIZE = 12 * MIB
StartPeer = Callable[..., Peer]


@pytest.fixture
def start_peer(tmp_path: Path) -> Iterator[StartPeer]:
    """Starts processes, each on a host of its own unless told, and ends them."""
    peers: list[Peer] = []

    def start(name: str, host: str = "") -> Peer:
        peers.append(Peer(name, tmp_path, host or name))
        return peers[-1]

    yield start
    for peer in peers:
        peer.end()


def join(node: Peer, sources: list[tuple[Peer, list[int]]], **arguments: Any) -> list[int]:
    """Have `node` relay from these, in this order of preference; its own region."""
    for peer, _ in sources:
        node.ask("link", offer=as_json(peer.offer(node.name)))
    region: list[int] = node.ask(
        "relay", sources=[(peer.name, region) for peer, region in sources], **arguments
    )
    return region


def root_region(root: Peer, **arguments: Any) -> list[int]:
    region = root.register(SIZE, 1, **arguments)
    return [region.id, region.generation, region.num_bytes]


WANTED = int(pattern(SIZE, 1).sum(dtype=np.int64))


@pytest.mark.parametrize("shared", [True, False])
def test_a_chain_brings_it_to_everybody(start_peer: StartPeer, shared: bool) -> None:
    """Each node of a chain reads from the one before while that is still reading; all get all of it."""
    host = "h" if shared else ""
    nodes = [start_peer(name, host) for name in "rabc"]
    last = nodes[0], root_region(nodes[0], slow_s=0.01)
    for node in nodes[1:]:
        last = node, join(node, [last], shared=shared)
    for node in nodes[1:]:
        assert node.ask("wait") == WANTED


def test_a_tree_brings_it_to_everybody(start_peer: StartPeer) -> None:
    """One node may be the source of several."""
    root, middle, left, right = (start_peer(name) for name in ("r", "m", "x", "y"))
    top = root, root_region(root)
    second = middle, join(middle, [top])
    for leaf in (left, right):
        join(leaf, [second])
    for node in (middle, left, right):
        assert node.ask("wait") == WANTED


def test_bytes_are_passed_on_before_all_have_come(tmp_path: Path, start_peer: StartPeer) -> None:
    """A node serves the beginning of what it relays while its own source has not even read the end."""
    root, middle = start_peer("r"), start_peer("m")
    region = Region(*join(middle, [(root, root_region(root, slow_s=0.3))], stall_s=2.0))
    with DistFlow(name="here") as flow:
        link = flow.link(middle.offer("here"), timeout_s=5)
        into = bytearray(100)
        flow.transfer(link, [Piece(region.id, 1, 0, 100, into)], timeout_s=10).wait()
        assert into == pattern(SIZE, 1)[:100].tobytes()
        end = flow.transfer(link, [Piece(region.id, 1, SIZE - 100, 100, into)], timeout_s=0.3)
        with pytest.raises(TransferError, match="in time"):
            end.wait()
    root.ask("hurry", region=1)
    assert middle.ask("wait") == WANTED


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_a_node_that_falls_out_is_gone_round(start_peer: StartPeer, how: str) -> None:
    """A node in the middle of a chain is killed or stopped: the next one goes on from the node before, where it was,
    and those further down notice nothing."""
    root, first, middle, next_, last = (start_peer(name) for name in ("r", "f", "m", "n", "l"))
    top = root, root_region(root, slow_s=0.1)
    one = first, join(first, [top])
    two = middle, join(middle, [one, top])
    three = next_, join(next_, [two, one, top])
    join(last, [three, two, one, top])
    time.sleep(0.5)
    getattr(middle, how)()
    time.sleep(0.2)
    root.ask("hurry", region=1)
    for node in (first, next_, last):
        assert node.ask("wait") == WANTED


def test_a_slow_node_is_gone_round(start_peer: StartPeer) -> None:
    """A node that has the bytes and hands them out below the floor is left for another source."""
    root, slow, last = (start_peer(name) for name in ("r", "s", "l"))
    top = root, root_region(root)
    two = slow, join(slow, [top], slow_s=0.4)
    join(last, [two, top], stall_s=1.0, floor_bytes_s=4.0 * MIB, timeout_s=8.0)
    assert last.ask("wait") == WANTED


def test_a_node_that_waits_itself_is_not_left(start_peer: StartPeer) -> None:
    """A source that says that it waits for its own source is not at fault: nobody leaves it for that."""
    root, middle, last = (start_peer(name) for name in ("r", "m", "l"))
    top = root, root_region(root, slow_s=0.15)
    two = middle, join(middle, [top], stall_s=5.0)
    join(last, [two], stall_s=0.3)  # has no other source, and its source brings a chunk in 0.15 s
    root.stop()
    time.sleep(0.8)
    root.go_on()
    root.ask("hurry", region=1)
    assert middle.ask("wait") == WANTED
    assert last.ask("wait") == WANTED


def test_a_broadcast_without_a_source_fails_everywhere(start_peer: StartPeer) -> None:
    """The only source dies: each node down the chain has an error, and none a part that passes for the whole."""
    root, middle, last = (start_peer(name) for name in ("r", "m", "l"))
    two = middle, join(middle, [(root, root_region(root, slow_s=0.3))], stall_s=2.0)
    join(last, [two], stall_s=2.0)
    time.sleep(0.3)
    root.kill()
    for node in (middle, last):
        with pytest.raises(RuntimeError):
            node.ask("wait")


def test_a_source_that_changes_fails_the_broadcast(start_peer: StartPeer) -> None:
    """A root whose generation changes in the middle makes the relay fail as stale."""
    root, middle = start_peer("r"), start_peer("m")
    region = root_region(root, slow_s=0.1)
    join(middle, [(root, region)], stall_s=2.0)
    root.ask("renew", region=region[0])
    with pytest.raises(RuntimeError, match="stale"):
        middle.ask("wait")


def test_what_may_be_of_another_generation_is_read_again(start_peer: StartPeer) -> None:
    """A source that changes in the middle is left for another, and what was not proven to be of the old generation is
    not passed on: not even a chunk that had arrived whole."""
    root, other, middle = (start_peer(name) for name in ("r", "o", "m"))
    region = root_region(root, slow_s=0.15)
    join(middle, [(root, region), (other, root_region(other))], stall_s=2.0)
    time.sleep(0.4)
    root.ask("change", region=region[0])
    assert middle.ask("wait") == WANTED
