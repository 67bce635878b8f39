"""The arena when its writers or its service are stopped or killed, with real processes and signals."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.cache.arena import GRANT_S, Arena
from shared.arena.place import Place
from shared.arena.reader import Reader
from shared.arena.segment import PageKind, path_of
from shared.arena.writer import Writer
from shared.rtc_messages import Commit, Slot
from tests.cache.arena_processes import said, stopped, writer

KIND = PageKind("model", "recipe", 100_000)
SEGMENT_BYTES = 500_000  # four slots
MINE = "this-process"


class Service:
    """A store on a folder, which can be started again; the clock is its own."""

    def __init__(self, folder: Path, *, num_segments: int = 2) -> None:
        self.folder = folder
        self.num_segments = num_segments
        self.now = 0.0
        self.start()

    def start(self) -> None:
        place = Place.own(self.folder)
        assert place is not None
        self.place = place
        self.arena = Arena(
            self.folder,
            max_bytes=self.num_segments * SEGMENT_BYTES,
            segment_bytes=SEGMENT_BYTES,
            epoch=place.epoch,
        )
        self.arena.rebuild(self.now)
        self.arena.check()

    def restart(self) -> None:
        self.stop()
        self.start()

    def stop(self) -> None:
        self.arena.close()
        self.place.close()

    def reserve(
        self, te: str, fills: list[int], held: list[str] | None = None
    ) -> list[Slot | None]:
        pages = [bytes([fill]) * 16 for fill in fills]
        copied = self.arena.reserve(te, KIND, pages, held=held or [], keep=None, now=self.now)
        self.arena.check()
        return copied.slots

    def slots(self, te: str, fills: list[int], held: list[str] | None = None) -> list[Slot]:
        """As reserve, where each page must get a slot."""
        slots = [slot for slot in self.reserve(te, fills, held) if slot is not None]
        assert len(slots) == len(fills)
        return slots

    def poll(self, seconds: float = 1.0) -> None:
        self.now += seconds
        self.arena.poll(self.now)
        self.arena.check()

    def cached(self) -> set[int]:
        """The pages in the index, each of which must be readable and right."""
        reader, found = Reader(self.folder), set()
        for page in self.arena.pages("model"):
            (slot,) = self.arena.find(KIND, [page])
            out = bytearray(KIND.slot_bytes)
            if reader.read(slot, page, out):
                assert out == page[:1] * KIND.slot_bytes, "a wrong byte was read"
                found.add(page[0])
        return found


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    """A store with room for two segments of four slots."""
    service = Service(tmp_path)
    yield service
    service.stop()


def readable(folder: Path, slots: list[Slot], fills: list[int]) -> list[bool]:
    """Which pages can be read from these slots; those that can must be right."""
    reader, result = Reader(folder), []
    for slot, fill in zip(slots, fills, strict=True):
        out = bytearray(KIND.slot_bytes)
        result.append(reader.read(slot, bytes([fill]) * 16, out))
        assert not result[-1] or out == bytes([fill]) * KIND.slot_bytes
    return result


def test_a_writer_stopped_in_mid_write_keeps_its_segment(service: Service) -> None:
    """However long it sleeps and however often the service restarts, nobody else gets its slots; continued, it finishes
    its page, and what it wrote is right."""
    slots = service.slots("te", [1, 2])
    with writer(
        "stop", service.folder, KIND.slot_bytes, zip(slots, [1, 2], strict=True)
    ) as process:
        stopped(process)
        assert readable(service.folder, slots, [1, 2]) == [True, False]
        still_writing = [0, 1]
        for seconds in (1.0, 3600.0):
            service.restart()
            service.poll(seconds)
            service.arena.down("te", service.now)  # as if by mistake
            assert service.cached() == {1}
            (row,) = service.arena.ledger().values()
            assert row["writing"] == still_writing.pop(), "left to its writer, for a while"
            others = service.reserve("other", list(range(10, 20)))
            assert sum(slot is not None for slot in others) == 4, "one segment is left for it"
            assert all(slot is None or slot.segment != slots[0].segment for slot in others)
            service.arena.commit(Commit(te="other", dropped=[s for s in others if s]), service.now)

        process.send_signal(signal.SIGCONT)
        said(process, "ready")
        assert service.arena.commit(Commit(te="te", written=slots), service.now) == [b"\2" * 16]
        assert service.cached() == {1, 2}
    assert readable(service.folder, slots, [1, 2]) == [True, True]


def test_a_stopped_writer_whose_file_was_unlinked_harms_nobody(service: Service) -> None:
    """It writes on to memory that has no name; the service forgets the segment, and what it says of it is ignored."""
    slots = service.slots("te", [1, 2])
    with writer(
        "stop", service.folder, KIND.slot_bytes, zip(slots, [1, 2], strict=True)
    ) as process:
        stopped(process)
        service.arena.commit(Commit(te="te", written=slots[:1]), service.now)
        path_of(service.folder, slots[0].segment).unlink()
        service.poll()
        assert service.cached() == set()
        others = service.slots("other", list(range(10, 18)))
        assert all(slot.segment != slots[0].segment for slot in others)
        mine = Writer(service.folder)
        assert mine.lock({slot.segment for slot in others}) == []
        for slot, fill in zip(others, range(10, 18), strict=True):
            assert mine.write(slot, bytes([fill]) * 16, bytes([fill]) * KIND.slot_bytes)
        service.arena.commit(Commit(te="other", written=others), service.now)

        process.send_signal(signal.SIGCONT)
        said(process, "ready")
        assert service.arena.commit(Commit(te="te", written=slots), service.now) == []
        assert service.cached() == set(range(10, 18))
        mine.close()


def test_a_writer_killed_in_mid_write_leaves_what_it_had_committed(service: Service) -> None:
    """Half a page is never read; the segment is an orphan at once, whole pages in it are found though nobody said so,
    and the next one who needs room adopts it and keeps them."""
    slots = service.slots("te", [1, 2, 3])
    with writer(
        "kill", service.folder, KIND.slot_bytes, zip(slots, [1, 2, 3], strict=True)
    ) as process:
        assert process.wait() == -signal.SIGKILL
    assert readable(service.folder, slots, [1, 2, 3]) == [True, True, False]
    service.arena.down("te", service.now)
    service.arena.check()
    assert service.cached() == {1, 2}
    (row,) = service.arena.ledger().values()
    assert row == {"total": 4, "cached": 2, "kept": 0, "leased": 0, "writing": 0, "free": 2}

    first = service.slots("other", [10, 11, 12, 13])  # a segment of its own
    more = service.slots("other", [14, 15], [first[0].segment])
    assert {slot.segment for slot in more} == {slots[0].segment}
    assert {slot.index for slot in more}.isdisjoint({slots[0].index, slots[1].index})
    assert service.cached() == {1, 2}
    mine = Writer(service.folder)
    assert mine.lock({slot.segment for slot in more}) == []
    assert mine.write(more[0], bytes([14]) * 16, bytes([14]) * KIND.slot_bytes)
    service.arena.commit(Commit(te="other", written=more[:1]), service.now)
    assert service.cached() == {1, 2, 14}
    mine.close()


def test_a_writer_killed_while_the_service_is_away(service: Service) -> None:
    """The service finds whole pages whose commit nobody could hear, and frees the half one."""
    slots = service.slots("te", [1, 2])
    with writer(
        "kill", service.folder, KIND.slot_bytes, zip(slots, [1, 2], strict=True)
    ) as process:
        assert process.wait() == -signal.SIGKILL
    service.restart()
    assert service.cached() == {1}
    (row,) = service.arena.ledger().values()
    assert (row["cached"], row["writing"], row["free"]) == (1, 0, 3)


def test_a_living_writer_goes_on_after_the_service_restarted(service: Service) -> None:
    """It is known again by what it holds; slots given out before are not given out twice as the same generation."""
    mine = Writer(service.folder)
    old = service.slots(MINE, [1, 2])
    segment = old[0].segment
    assert mine.lock([segment]) == []
    assert mine.write(old[0], b"\1" * 16, b"\1" * KIND.slot_bytes)
    service.restart()
    assert service.cached() == {1}

    new = service.slots(MINE, [3, 4, 5], [segment])
    assert {slot.segment for slot in new} == {segment}
    assert min(slot.generation for slot in new) > max(slot.generation for slot in old)
    assert {slot.generation >> 40 for slot in new} == {service.place.epoch}
    # The old slot is written late: the page is right or gone, whichever comes last, and never mixed.
    late = mine.write(old[1], b"\2" * 16, b"\2" * KIND.slot_bytes)
    service.arena.commit(Commit(te=MINE, written=old), service.now)
    service.arena.check()
    for slot, fill in zip(new, (3, 4, 5), strict=True):
        assert mine.write(slot, bytes([fill]) * 16, bytes([fill]) * KIND.slot_bytes)
    service.arena.commit(Commit(te=MINE, written=new), service.now)
    assert late
    assert service.cached() == {1, 3, 4, 5}
    mine.close()


SERVICE = """
import os, signal, sys
from pathlib import Path
from services.cache.arena import Arena
from services.cache.extent import Extent
from shared.arena.place import Place
from shared.arena.segment import PageKind
from shared.arena.writer import Writer
from shared.rtc_messages import Commit

folder, survive = Path(sys.argv[1]), int(sys.argv[2])
place = Place.own(folder)
arena = Arena(folder, max_bytes=1_000_000, segment_bytes=500_000, epoch=place.epoch)
arena.rebuild(0.0)
kind, pages = PageKind("model", "recipe", 100_000), [bytes([n]) * 16 for n in range(1, 5)]
copied = arena.reserve("te", kind, pages, held=[], keep=None, now=0.0)
writer = Writer(folder)
writer.lock(copied.granted)
for slot, page in list(zip(copied.slots, pages))[:3]:
    writer.write(slot, page, page[:1] * 100_000)

class Dying(Extent):
    def store(self, *args):
        global survive
        survive -= 1
        if survive < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        super().store(*args)

for extent in arena._extents:
    extent.__class__ = Dying
arena.commit(Commit(te="te", written=[slot for slot in copied.slots if slot]), 0.0)
"""


@pytest.mark.parametrize("survive", [0, 2])
def test_a_service_killed_in_mid_commit_loses_nothing(tmp_path: Path, survive: int) -> None:
    """However far it came, the next one's index is what is committed in the slots: three pages, not the fourth."""
    command = [sys.executable, "-c", SERVICE, str(tmp_path), str(survive)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    service = Service(tmp_path)
    assert service.cached() == {1, 2, 3}
    (row,) = service.arena.ledger().values()
    assert (row["cached"], row["writing"], row["free"]) == (3, 0, 1)
    service.stop()


def test_what_was_granted_and_never_locked_goes_to_another(service: Service) -> None:
    """A holder that died before it locked its segment is told by the free lock, after the time that locking takes."""
    service.num_segments = 1
    service.restart()
    lost = service.slots("te", [1])
    assert service.reserve("other", [2]) == [None]
    service.poll(GRANT_S)
    (slot,) = service.slots("other", [2])
    assert slot.segment == lost[0].segment
    assert slot.generation > lost[0].generation
