"""Regions that are files: mapped by peers of the host, filled by relays; and how fast an instance hands out bytes."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from shared.distflow.faults import TransferError
from shared.distflow.flow import DistFlow
from shared.distflow.region import Piece

MIB = 1 << 20


@contextmanager
def flows(folder: Path, hosts: str) -> Iterator[list[DistFlow]]:
    """An instance for each letter, which names its host."""
    with ExitStack() as stack:
        yield [
            stack.enter_context(DistFlow(name=f"{host}{number}", directory=folder, host=host))
            for number, host in enumerate(hosts)
        ]


def test_a_file_is_handed_over_on_one_host_alone(tmp_path: Path) -> None:
    """A peer of the host gets a descriptor, to read by, of the very file; one of another host, or of memory that is no
    file, gets none; and what has become another generation is refused."""
    path = tmp_path / "file"
    path.write_bytes(os.urandom(MIB))
    with flows(tmp_path, "xxy") as (giver, near, far), path.open("rb") as file:
        region = giver.register(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ), fd=file.fileno())
        memory = giver.register(bytearray(10))
        link = near.link(giver.offer("x1"), timeout_s=5)
        fd = near.open_file(link, region, timeout_s=5)
        assert fd is not None
        assert os.fstat(fd).st_ino == path.stat().st_ino
        with pytest.raises(OSError, match="Bad file"):
            os.write(fd, b"x")
        os.close(fd)
        assert near.open_file(link, memory, timeout_s=5) is None
        assert far.open_file(far.link(giver.offer("y2"), timeout_s=5), region, timeout_s=5) is None
        giver.renew(region)
        with pytest.raises(TransferError, match="generation"):
            near.open_file(link, region, timeout_s=5)
        giver.unregister(region)
        with pytest.raises(TransferError, match="not registered"):
            near.open_file(link, region, timeout_s=5)


def test_a_file_that_a_relay_fills_is_handed_over_when_it_is_whole(tmp_path: Path) -> None:
    """Who asks for it before waits, and `available` grows meanwhile."""
    whole, path = os.urandom(4 * MIB), tmp_path / "file"
    with flows(tmp_path, "xyy") as (root, node, near), path.open("w+b") as file:
        file.truncate(len(whole))
        source = root.register(whole, bulk=True)
        root.limit_egress(8 * MIB)
        link = node.link(root.offer("y1"), timeout_s=5)
        relayed = node.relay(
            [(link, source)], mmap.mmap(file.fileno(), 0), timeout_s=10, fd=file.fileno()
        )
        assert node.available(relayed.region) < len(whole)
        fd = near.open_file(near.link(node.offer("y2"), timeout_s=5), relayed.region, timeout_s=10)
        assert fd is not None
        assert node.available(relayed.region) == len(whole)
        relayed.ticket.wait()
        with os.fdopen(fd, "rb") as mapped:
            assert mapped.read() == whole


def test_all_readers_share_the_way_out(tmp_path: Path) -> None:
    """Two readers of a limited instance take no less time than its rate has both take; what is no
    bulk does not wait for them."""
    rate, size = 16.0 * MIB, 4 * MIB
    with flows(tmp_path, "xyz") as (giver, one, two):
        region = giver.register(os.urandom(size), bulk=True)
        giver.limit_egress(rate)
        began = time.monotonic()
        tickets = [
            flow.transfer(
                flow.link(giver.offer(name), timeout_s=5),
                [Piece(region.id, 1, 0, size, bytearray(size))],
                timeout_s=10,
            )
            for flow, name in ((one, "y1"), (two, "z2"))
        ]
        small = giver.register(bytearray(1000))
        link = one.link(giver.offer("y1"), timeout_s=5)
        one.transfer(link, [Piece(small.id, 1, 0, 1000, bytearray(1000))], timeout_s=5).wait()
        assert not any(ticket.poll() for ticket in tickets)
        for ticket in tickets:
            ticket.wait()
        assert time.monotonic() - began >= 2 * size / rate
