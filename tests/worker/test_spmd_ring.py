"""The ring in shared memory, between real processes; the board for logits; the judge of heartbeats."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest

from services.worker.flowserve.spmd.board import Board, make_board
from services.worker.flowserve.spmd.heartbeat import HUNG_S, Heartbeats, Judge
from services.worker.flowserve.spmd.ring import RingReader, RingWriter, Stalled

CAPACITY = 1 << 12

# Reads records until an empty one, and prints how many and the digest of them all.
READER = """
import hashlib, sys, time
from services.worker.flowserve.spmd.ring import RingReader
ring, digest, count = RingReader(*map(int, sys.argv[1:4])), hashlib.sha256(), 0
while record := ring.read():
    digest.update(record)
    count += 1
    if count % 50 == 0:
        time.sleep(float(sys.argv[4]))
print(count, digest.hexdigest())
"""


@pytest.fixture
def ring() -> Iterator[RingWriter]:
    writer = RingWriter(2, CAPACITY)
    yield writer
    writer.close()


def test_every_reader_gets_every_record_in_order(ring: RingWriter) -> None:
    """Of any size, larger than the ring too, also when one reader is slower than the other."""
    readers = [
        subprocess.Popen(
            [sys.executable, "-c", READER, *map(str, ring.handles(reader)), str(pause_s)],
            pass_fds=ring.handles(reader),
            stdout=subprocess.PIPE,
        )
        for reader, pause_s in enumerate((0.0, 0.01))
    ]
    source, digest = random.Random(0), hashlib.sha256()
    sizes = [source.choice((1, 7, 60, 900, CAPACITY - 4, 3 * CAPACITY + 5)) for _ in range(400)]
    for size in sizes:
        record = source.randbytes(size)
        digest.update(record)
        ring.write(record, timeout_s=20)
    ring.write(b"", timeout_s=20)
    expected = f"{len(sizes)} {digest.hexdigest()}\n".encode()
    assert [reader.communicate(timeout=20)[0] for reader in readers] == [expected] * 2


def test_a_reader_that_stops_reading_is_named(ring: RingWriter) -> None:
    """The writer waits for room only so long, and says who makes none."""
    quick = RingReader(*(os.dup(fd) for fd in ring.handles(0)))
    for _ in range(4):
        ring.write(bytes(CAPACITY // 4 - 4), timeout_s=1)
        quick.read()
    with pytest.raises(Stalled) as caught:
        ring.write(b"more", timeout_s=0.05)
    assert caught.value.reader == 1


def test_a_reader_that_makes_room_lets_the_writer_go_on(ring: RingWriter) -> None:
    """A full ring is writable again as soon as everybody has read."""
    readers = [RingReader(*(os.dup(fd) for fd in ring.handles(reader))) for reader in (0, 1)]
    for number in range(100):
        record = bytes([number]) * (CAPACITY - 4)
        ring.write(record, timeout_s=1)
        assert [reader.read() for reader in readers] == [record] * 2


def test_logits_come_back_whole_and_stay_while_they_are_read() -> None:
    """Arrays of changing size, none at all among them, and the last one is good until there are too many."""
    slots, laid = make_board(3)
    writer, reader = Board(slots, laid), Board(slots, laid)
    source = np.random.default_rng(0)
    shapes = [(1, 8), (0, 8), (5, 8), (700, 8), (2, 8), (700, 8), (3, 8)]
    arrays = [source.standard_normal(shape).astype(np.float32) for shape in shapes]
    writer.write(arrays[0])
    for index, expected in enumerate(arrays):
        for ahead in arrays[index + 1 : index + 2]:
            writer.write(ahead)
        got = reader.read((expected.shape[0], 8), timeout_s=0)
        assert got is not None
        assert np.array_equal(got, expected)
    assert reader.read((1, 8), timeout_s=0) is None
    for fd in (*slots, laid):
        os.close(fd)


def test_who_no_longer_counts_is_hung() -> None:
    """A rank is judged by its own counter, and only after its time."""
    judge = Judge()
    for tick in range(100):
        now, counts = tick * 0.1, [0, tick, min(tick, 20)]
        hung = judge.hung(counts, now, within_s=HUNG_S)
        assert hung == ([2] if now - 2.0 > HUNG_S else [])


def test_a_judge_who_was_away_starts_anew() -> None:
    """After a stop of the judge's own process nobody is hung before another whole time."""
    judge = Judge()
    assert judge.hung([0, 5], 0.0, within_s=HUNG_S) == []
    assert judge.hung([0, 5], 60.0, within_s=HUNG_S) == []
    times = [60.0 + 0.5 * n for n in range(1, 6)]
    assert [judge.hung([0, 5], now, within_s=HUNG_S) for now in times] == [[]] * 4 + [[1]]


def test_heartbeats_are_seen_across_processes() -> None:
    """Counters of one process are read by another, each rank's own."""
    fd = Heartbeats.make(3)
    context = multiprocessing.get_context("fork")
    child = context.Process(target=_beat_twice, args=(fd,))
    child.start()
    child.join()
    assert Heartbeats(fd, 3).counts() == [0, 0, 2]
    os.close(fd)


def _beat_twice(fd: int) -> None:
    heartbeats = Heartbeats(fd, 3)
    heartbeats.beat(2)
    heartbeats.beat(2)
