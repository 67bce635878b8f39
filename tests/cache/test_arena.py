"""The store's rules one by one: what goes for room, who gets what, what is held, what a page costs."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.cache.arena import PAGE_BYTES, Arena
from services.cache.reservations import RESERVE_S
from shared.arena.reader import Reader
from shared.arena.segment import PageKind, new_name, path_of
from shared.arena.writer import Writer
from shared.messages import Keep
from shared.rtc_messages import Commit, Copied, Slot

KIND = PageKind("model", "recipe", 4096)
OTHER = PageKind("other", "recipe", 4096)
SEGMENT_BYTES = 4096 * 6  # four slots


def page(number: int) -> bytes:
    """A page hash."""
    return number.to_bytes(16, "big")


class Host:
    """A store and the writers of some TEs, on one folder."""

    def __init__(
        self, folder: Path, num_segments: int, epoch: int = 1, segment_bytes: int = SEGMENT_BYTES
    ) -> None:
        self.folder = folder
        self.now = 0.0
        self.arena = Arena(
            folder,
            max_bytes=num_segments * segment_bytes,
            segment_bytes=segment_bytes,
            epoch=epoch,
        )
        self.arena.rebuild(self.now)
        self.writers: dict[str, Writer] = {}

    def reserve(
        self, te: str, numbers: list[int], kind: PageKind = KIND, keep: Keep | None = None
    ) -> Copied:
        """Asks for slots, and locks what was granted."""
        writer = self.writers.setdefault(te, Writer(self.folder))
        pages = [page(number) for number in numbers]
        copied = self.arena.reserve(te, kind, pages, held=writer.held, keep=keep, now=self.now)
        assert writer.lock(copied.granted) == []
        self.arena.check()
        return copied

    def put(
        self, te: str, numbers: list[int], kind: PageKind = KIND, keep: Keep | None = None
    ) -> Copied:
        """Writes pages; what is refused is left out."""
        copied = self.reserve(te, numbers, kind, keep)
        written = []
        for slot, number in zip(copied.slots, numbers, strict=True):
            if slot is not None:
                assert self.writers[te].write(slot, page(number), page(number) * 256)
                written.append(slot)
        self.arena.commit(Commit(te=te, written=written), self.now)
        self.arena.check()
        return copied

    def fill(self, te: str, numbers: range, kind: PageKind = KIND) -> int:
        """Writes pages one by one; how many were refused."""
        return sum(self.put(te, [number], kind).num_refused for number in numbers)

    def die(self, te: str) -> None:
        """The TE is gone, and somebody says so."""
        self.writers.pop(te).close()
        self.arena.down(te, self.now)

    def has(self, numbers: range, kind: PageKind = KIND) -> list[int]:
        """The pages that are indexed."""
        return [number for number in numbers if self.arena.holds(kind, [page(number)])]

    def slots(self, numbers: list[int], kind: PageKind = KIND) -> list[Slot]:
        """Where pages are; uses them."""
        return self.arena.find(kind, [page(number) for number in numbers])

    def close(self) -> None:
        for writer in self.writers.values():
            writer.close()
        self.arena.close()


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    """Room for two segments of four slots."""
    host = Host(tmp_path, 2)
    yield host
    host.close()


def test_a_prefix_is_found_up_to_the_first_gap(host: Host) -> None:
    """And only under its own kind."""
    host.put("te", [1, 2, 4])
    assert [slot.index for slot in host.slots([1, 2, 3, 4])] == [
        slot.index for slot in host.slots([1, 2])
    ]
    assert len(host.slots([1, 2, 3, 4])) == 2
    assert host.slots([1], OTHER) == []
    assert set(host.arena.pages("model")) == {page(1), page(2), page(4)}


def test_the_coldest_page_goes_first_and_the_end_of_a_chain_before_its_start(host: Host) -> None:
    """A use keeps a page; of pages used together, later ones go first, as they are nothing without the first."""
    host.put("te", [1, 2, 3, 4])
    host.put("te", [5, 6, 7, 8])
    host.slots([1, 2, 3, 4])
    host.put("te", [9])
    assert host.has(range(1, 10)) == [1, 2, 3, 4, 5, 6, 7, 9]
    host.put("te", [10, 11, 12, 13])
    assert host.has(range(1, 14)) == [1, 2, 3, 9, 10, 11, 12, 13]
    assert host.arena.num_evicted == 5


def test_events_tell_the_index(host: Host) -> None:
    """What is stored and removed is told once per page, by model."""
    host.put("te", list(range(1, 9)))
    assert sorted(host.arena.drain_events()["model"].stored) == [page(n) for n in range(1, 9)]
    host.put("te", [9])
    changes = host.arena.drain_events()["model"]
    assert changes.stored == [page(9)]
    assert len(changes.removed) == 1
    assert host.arena.drain_events() == {}


def test_a_page_is_written_once(host: Host) -> None:
    """No slot for what is there or being written; after a while another may try, and the second copy goes."""
    host.put("te", [1])
    assert host.reserve("te", [1, 2, 2]).slots[0] is None
    copied = host.reserve("te", [2])
    assert copied.slots == [None]
    assert copied.num_refused == 0
    assert host.reserve("twin", [2]).slots == [None]
    host.now += 6.0
    (slot,) = host.put("twin", [2]).slots
    assert slot is not None
    assert host.slots([2]) == [slot]
    host.now += RESERVE_S
    host.arena.poll(host.now)
    (row,) = host.arena.ledger().values()
    assert row == {"total": 8, "cached": 2, "kept": 0, "leased": 0, "writing": 0, "free": 6}


def test_a_word_about_a_slot_that_is_not_ones_own_counts_for_nothing(host: Host) -> None:
    """Neither written nor dropped by another, unknown segments and indices beyond the end are ignored."""
    (slot,) = host.reserve("te", [1]).slots
    assert slot is not None
    strange = [
        Slot(segment=new_name(), index=0, generation=1),
        Slot(segment="../../etc/passwd", index=0, generation=1),
        Slot(segment=slot.segment, index=99, generation=1),
        Slot(segment=slot.segment, index=-1, generation=1),
    ]
    assert host.writers["te"].write(slot, page(1), page(1) * 256)
    commit = Commit(te="thief", written=[slot, *strange], dropped=[slot, *strange], returned=["x"])
    assert host.arena.commit(commit, host.now) == []
    assert host.arena.commit(Commit(te="te", written=[slot, *strange]), host.now) == [page(1)]
    assert host.arena.commit(Commit(te="te", written=[slot], dropped=[slot]), host.now) == []
    assert host.has(range(3)) == [1]
    host.arena.check()


def test_pages_that_cannot_fit_are_refused(host: Host) -> None:
    """A page larger than a segment, an empty one, and a hash of another length."""
    for kind in (PageKind("m", "r", SEGMENT_BYTES), PageKind("m", "r", 0), PageKind("m", "r", -1)):
        assert host.reserve("te", [1], kind).num_refused == 1
    copied = host.arena.reserve("te", KIND, [b"short"], held=[], keep=None, now=0.0)
    assert copied.num_refused == 1
    assert host.arena.num_bytes == 0


def test_an_orphan_of_the_same_kind_is_adopted_with_its_pages(host: Host) -> None:
    """Its free slots first; its pages are evicted only as cold as they are."""
    host.put("dead", [1, 2, 3])
    host.die("dead")
    host.put("te", [11, 12, 13, 14])
    copied = host.put("te", [15])
    assert len(copied.granted) == 1
    assert host.has(range(20)) == [1, 2, 3, 11, 12, 13, 14, 15]
    assert host.arena.num_adopted == 1
    host.put("te", [16])
    assert host.has(range(20)) == [2, 3, 11, 12, 13, 14, 15, 16] or host.has(range(20)) == [
        1, 2, 11, 12, 13, 14, 15, 16,
    ]  # fmt: skip


def test_an_orphan_of_another_kind_gives_its_room(host: Host) -> None:
    """It goes once all of it is colder than what the asker has, or if the asker has nothing; never while pinned."""
    host.put("dead", [1, 2], OTHER)
    host.put("gone", [3, 4], OTHER)
    host.die("dead")
    host.die("gone")
    assert host.arena.lease("lease", host.slots([1], OTHER), until=100.0)
    host.put("te", [11])
    assert host.has(range(10), OTHER) == [1, 2]
    assert host.reserve("third", [12]).num_refused == 1
    assert host.arena.release("lease")
    host.put("third", [12])
    assert host.has(range(10), OTHER) == []
    assert host.has(range(20)) == [11, 12]
    assert len(list(host.folder.glob("*.kv"))) == 2


def test_the_richest_is_asked_for_a_segment(host: Host) -> None:
    """One who has no room is refused, the richest hears that a segment is wanted, and with that the first is served."""
    host.put("rich", list(range(8)))
    assert host.put("poor", [20], OTHER).num_refused == 1
    assert host.put("poor", [20], OTHER).num_refused == 1
    copied = host.reserve("rich", [])
    assert len(copied.wanted) == 1, "one at a time"
    returned = host.writers["rich"].give_back(copied.wanted)
    host.arena.commit(Commit(te="rich", returned=returned), host.now)
    assert host.has(range(8)) == list(range(8)), "what it holds can be read until it is needed"
    assert host.put("poor", [20], OTHER).num_refused == 0
    assert len(host.has(range(8))) == 4
    assert host.reserve("rich", []).wanted == []
    assert host.put("poor", [21, 22, 23, 24], OTHER).num_refused == 0, "evicting its own"
    assert host.reserve("rich", []).wanted == [], "both have their share"


def test_a_segment_whose_file_is_gone_is_forgotten_by_all(host: Host) -> None:
    """Its pages leave the index, its holder hears that it is to let go of it, and gets another one."""
    (gone,) = host.put("te", [1, 2]).granted
    host.arena.drain_events()
    path_of(host.folder, gone).unlink()
    host.arena.poll(1.0)
    assert set(host.arena.drain_events()["model"].removed) == {page(1), page(2)}
    assert host.arena.num_bytes == 0
    copied = host.put("te", [1, 2])
    assert copied.wanted == [gone]
    assert gone not in copied.granted
    assert host.writers["te"].give_back(copied.wanted) == [gone]
    host.arena.commit(Commit(te="te", returned=[gone]), 1.0)
    assert host.reserve("te", []).wanted == []
    assert host.has(range(5)) == [1, 2]


def test_kept_pages_stay(host: Host) -> None:
    """Pages of an explicit cache are not evicted before it ends, by time or by word; those to come are held as well."""
    keep = Keep(id="cache", ttl_ms=60_000)
    host.put("te", [1])
    host.put("te", [1, 2], keep=keep)
    host.fill("te", range(10, 40))
    assert host.has(range(5)) == [1, 2]
    (row,) = host.arena.ledger().values()
    assert (row["kept"], row["cached"]) == (2, 6)
    host.now = 59.0
    host.arena.poll(host.now)
    host.fill("te", range(40, 60))
    assert host.has(range(5)) == [1, 2]
    assert host.arena.free("cache")
    assert not host.arena.free("cache")
    host.fill("te", range(60, 80))
    assert host.has(range(5)) == []

    host.put("te", [1], keep=keep)
    host.now += 61.0
    host.arena.poll(host.now)
    host.fill("te", range(80, 100))
    assert host.has(range(5)) == []


def test_explicit_caches_cannot_have_everything(host: Host) -> None:
    """Half of the arena may be kept; beyond that pages are cached like any other, and writing goes on."""
    keep = Keep(id="cache", ttl_ms=60_000)
    assert host.put("te", list(range(8)), keep=keep).num_refused == 0
    (row,) = host.arena.ledger().values()
    assert 0 < row["kept"] * KIND.slot_bytes <= SEGMENT_BYTES
    assert host.fill("te", range(10, 30)) == 0


def test_leased_pages_stay_until_released(host: Host) -> None:
    """What a reader elsewhere holds is not evicted; its release proves that it was held, unless it expired."""
    host.put("te", [1, 2])
    slots = host.slots([1, 2])
    assert host.arena.lease("a", slots, until=10.0)
    assert not host.arena.lease("a", slots, until=10.0), "a name for each"
    host.fill("te", range(10, 40))
    assert host.slots([1, 2]) == slots
    assert host.arena.release("a")
    assert not host.arena.release("a")
    host.fill("te", range(40, 60))
    assert not host.arena.lease("b", slots, until=10.0), "they hold other pages"

    assert host.arena.lease("c", host.slots([59]), until=10.0)
    host.now = 10.0
    host.arena.poll(host.now)
    assert not host.arena.release("c")
    host.arena.check()


def test_a_lease_over_a_slot_that_was_written_to_is_not_valid(tmp_path: Path) -> None:
    """A slot given out before a restart may be written to after it: the lease's end looks at the header."""
    before = Host(tmp_path, 1)
    writer = before.writers["te"] = Writer(tmp_path)
    before.put("te", [1, 2, 3, 4])
    (stale,) = before.reserve("te", [5]).slots
    assert stale is not None
    before.arena.close()

    after = Host(tmp_path, 1, epoch=2)
    (slot,) = [s for n in range(1, 5) for s in after.slots([n]) if s.index == stale.index]
    assert after.arena.lease("lease", [slot], until=10.0)
    assert writer.write(stale, page(5), page(5) * 256)
    assert not after.arena.release("lease")
    assert after.arena.commit(Commit(te="te", written=[stale]), 0.0) == [page(5)]
    after.arena.check()
    assert 5 in after.has(range(9))
    writer.close()
    after.close()


def test_what_is_worth_a_copy_on_the_ssd(host: Host) -> None:
    """Once the arena is full: the coldest pages that were used again, each told of once; every one if so wished."""
    host.put("te", list(range(4)))
    assert host.arena.to_spill(10, every=True) == []
    host.put("te", list(range(4, 8)))
    assert host.arena.to_spill(10) == []
    assert len(host.arena.to_spill(10, every=True)) == 8
    host.slots([5])
    (victim,) = host.arena.to_spill(10)
    out = bytearray(4096)
    assert Reader(host.folder).read(victim.slot, victim.page_hash, out)
    assert out == page(5) * 256
    host.arena.spilled([victim])
    assert host.arena.to_spill(10) == []


def test_files_that_are_no_segments_of_ours(tmp_path: Path) -> None:
    """Of another version or damaged: removed unless locked, and then they count; other names are left alone."""
    stale, locked = path_of(tmp_path, new_name()), path_of(tmp_path, new_name())
    stale.write_bytes(b"DFARENA\n\xff" + bytes(SEGMENT_BYTES))
    half = stale.with_suffix(".new")
    half.write_bytes(bytes(100))
    (tmp_path / "notes.kv").write_text("mine")
    locked.write_bytes(bytes(SEGMENT_BYTES))
    code = "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, 2); print(flush=True); sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(locked)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        host = Host(tmp_path, 2)
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([locked.name, "notes.kv"])
        assert host.arena.num_bytes == SEGMENT_BYTES
        assert host.fill("te", range(8)) == 0, "within the one that is left"
        assert len(host.has(range(8))) == 4
        host.arena.check()
        holder.kill()
    host.arena.poll(1.0)
    assert not locked.exists()
    assert host.fill("te", range(20, 26)) == 0
    assert len(host.has(range(30))) == 8
    host.close()


def test_a_smaller_budget_after_a_restart(tmp_path: Path) -> None:
    """Orphans beyond it go, the coldest first."""
    host = Host(tmp_path, 3)
    for te, start in (("a", 0), ("b", 10), ("c", 20)):
        host.put(te, list(range(start, start + 4)))
    host.close()
    smaller = Host(tmp_path, 1, epoch=2)
    assert smaller.has(range(30)) == [20, 21, 22, 23]
    smaller.close()


def test_a_large_arena_has_larger_segments(tmp_path: Path) -> None:
    """Every segment costs its readers a descriptor, so there are at most a few hundred."""
    arena = Arena(tmp_path, max_bytes=1 << 30, segment_bytes=4096 * 6, epoch=1)
    arena.reserve("te", KIND, [page(1)], held=[], keep=None, now=0.0)
    assert arena.num_bytes >= (1 << 30) // 256 - 2 * 4096
    arena.close()


FULL = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from services.cache.extents import SHORTAGE_S
from tests.cache.test_arena import *

host = Host(Path({folder!r}), 8)
assert host.fill("te", range(40)) == 0
assert host.arena.num_shortages == 1
assert host.arena.budget_bytes == host.arena.num_bytes == 4 * SEGMENT_BYTES
assert len(host.has(range(40))) == 16
assert host.put("other", [50]).num_refused == 1
Path({folder!r}, "in-the-way").unlink()
assert host.put("other", [50]).num_refused == 1
host.now = SHORTAGE_S
assert host.put("other", [50]).num_refused == 0
assert host.arena.budget_bytes == 8 * SEGMENT_BYTES
host.close()
"""


def test_a_full_tmpfs_shrinks_the_budget(tmp_path: Path) -> None:
    """The store makes do with the segments it has, and grows again when there is room: no signal, no error."""
    script = FULL.format(root=str(Path(__file__).parents[2]), folder=str(tmp_path))
    mount = (
        f"mount -t tmpfs -o size={5 * SEGMENT_BYTES},mode=700 tmpfs {tmp_path} &&"
        f'head -c {SEGMENT_BYTES} /dev/zero > {tmp_path}/in-the-way && exec "$@"'
    )
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    probe = subprocess.run(
        [*command, f"mount -t tmpfs tmpfs {tmp_path}"], capture_output=True, check=False
    )
    if probe.returncode:
        pytest.skip("no tmpfs can be mounted here")
    result = subprocess.run(
        [*command, mount, "sh", sys.executable, "-c", script],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr


def test_what_a_page_costs(tmp_path: Path) -> None:
    """The index stays below PAGE_BYTES for each page, by what is allocated."""
    kind = PageKind("model", "recipe", 16)
    arena = Arena(tmp_path, max_bytes=12_600_000, segment_bytes=6_300_000, epoch=1)
    writer, num_pages = Writer(tmp_path), 3_000
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for start in range(0, num_pages, 500):
            pages = [page(number) for number in range(start, start + 500)]
            copied = arena.reserve("te", kind, pages, held=writer.held, keep=None, now=0.0)
            writer.lock(copied.granted)
            slots = [slot for slot in copied.slots if slot is not None]
            for slot, name in zip(slots, pages, strict=True):
                writer.write(slot, name, name)
            assert len(arena.commit(Commit(te="te", written=slots), 0.0)) == 500
        arena.drain_events()
        del pages, copied, slots, slot, name
        cost = (tracemalloc.get_traced_memory()[0] - before) / num_pages
    finally:
        tracemalloc.stop()
    assert cost <= PAGE_BYTES
    writer.close()
    arena.close()
