"""The store when a word was lost, its budget or epoch is another than before, or somebody sits on cold pages."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from services.cache.reservations import PATIENCE_S
from shared.arena.reader import Reader
from shared.arena.segment import PageKind, path_of
from shared.arena.writer import Writer
from shared.messages import Keep
from shared.rtc_messages import Commit
from tests.cache.test_arena import KIND, SEGMENT_BYTES, Host, page


def test_a_word_lost_while_the_service_restarted(tmp_path: Path) -> None:
    """A slot that was written to after the restart, unheard: what was there before is not looked for there for ever,
    and what is there now is found, once its writer says that it lives."""
    before = Host(tmp_path, 1)
    writer = before.writers["te"] = Writer(tmp_path)
    before.put("te", [1, 2, 3, 4])
    (slot,) = before.reserve("te", [5]).slots
    assert slot is not None
    before.arena.close()

    after = Host(tmp_path, 1, epoch=2)
    after.writers["te"] = writer
    assert after.has(range(9)) == [1, 2, 3, 4]
    assert writer.write(slot, page(5), page(5) * 256)
    after.reserve("te", [])
    assert len(after.has(range(9))) == 4
    assert 5 in after.has(range(9))
    reader = Reader(tmp_path)
    for number in after.has(range(9)):
        (found,) = after.slots([number])
        assert reader.read(found, page(number), bytearray(KIND.slot_bytes))
    after.close()


def test_generations_go_on_where_the_epoch_was_lost(tmp_path: Path) -> None:
    """Whatever the epoch is said to be, no slot is given out as of a generation that its header has passed: its writer
    would refuse it."""
    before = Host(tmp_path, 1, epoch=7)
    before.put("te", [1, 2, 3, 4])
    before.close()
    after = Host(tmp_path, 1, epoch=1)
    assert after.put("te", [5, 6]).num_refused == 0
    assert set(after.has(range(9))) >= {5, 6}
    after.close()


def test_the_start_of_a_chain_outlives_its_end_after_a_restart(tmp_path: Path) -> None:
    """The order of use is lost, but of pages that were written together the later ones go first, as always."""
    before = Host(tmp_path, 1)
    before.put("te", [1, 2, 3, 4])
    before.close()
    after = Host(tmp_path, 1, epoch=2)
    after.put("te", [11])
    after.put("te", [12])
    assert after.has(range(20)) == [1, 2, 11, 12]
    after.close()


def test_the_start_of_a_chain_outlives_its_end_after_a_lease(tmp_path: Path) -> None:
    """Pages that somebody held are evicted from the last to the first when they are let go."""
    host = Host(tmp_path, 2)
    chain = list(range(1, 9))
    host.put("te", chain[:4])
    host.put("te", chain[4:])
    assert host.arena.lease("all", host.slots(chain[:4]), until=10.0)
    host.slots(chain[4:])
    assert host.arena.release("all")
    host.fill("te", range(11, 17))
    assert host.has(range(9)) == [1, 2]
    host.close()


def test_a_smaller_budget_with_living_writers(tmp_path: Path) -> None:
    """What lives is left alone; as soon as its holder is dead, it goes."""
    before = Host(tmp_path, 3)
    for te, start in (("a", 0), ("b", 10), ("c", 20)):
        before.put(te, list(range(start, start + 4)))
    before.arena.close()
    after = Host(tmp_path, 1, epoch=2)
    after.writers = before.writers
    assert after.arena.num_bytes == 3 * SEGMENT_BYTES
    for te in ("a", "c"):
        after.die(te)
    after.arena.poll(1.0)
    after.arena.check()
    assert after.arena.num_bytes == SEGMENT_BYTES
    assert after.has(range(30)) == [10, 11, 12, 13]
    after.close()


def test_two_explicit_caches_that_wait_for_one_page(tmp_path: Path) -> None:
    """Both hold it once it is there: the end of one does not give it free."""
    host = Host(tmp_path, 2)
    first, second = (Keep(id=name, ttl_ms=60_000) for name in ("first", "second"))
    (slot,) = host.reserve("te", [1], keep=first).slots
    assert slot is not None
    host.reserve("te", [1], keep=second)
    assert host.writers["te"].write(slot, page(1), page(1) * 256)
    host.arena.commit(Commit(te="te", written=[slot]), host.now)
    assert host.arena.free("second")
    host.fill("te", range(10, 30))
    assert host.has(range(5)) == [1]
    assert host.arena.free("first")
    host.fill("te", range(30, 50))
    assert host.has(range(5)) == []
    host.close()


def test_pages_that_are_too_large_cost_nobody_a_segment(tmp_path: Path) -> None:
    """Who asks for what no segment can hold is refused, and no one has to give anything back for it."""
    host = Host(tmp_path, 2)
    host.put("rich", list(range(8)))
    assert host.reserve("poor", [1], PageKind("m", "r", 2 * SEGMENT_BYTES)).num_refused == 1
    assert host.reserve("rich", []).wanted == []
    host.close()


def test_an_idle_holder_gives_what_is_cold_to_a_busy_one(tmp_path: Path) -> None:
    """Who evicts pages of its own, warmer than a whole segment of a richer one, is given that, up to an equal share."""
    host = Host(tmp_path, 6)
    host.put("busy", [1])
    host.put("idle", list(range(100, 120)))
    granted = 1
    for number in range(2, 40):
        copied = host.put("busy", [number])
        assert copied.num_refused == 0
        granted += len(copied.granted)
        returned = host.writers["idle"].give_back(host.reserve("idle", []).wanted)
        host.arena.commit(Commit(te="idle", returned=returned), host.now)
    assert granted == 3
    assert len(host.has(range(100, 120))) == 12
    assert len(host.has(range(40))) == 12
    host.close()


def test_nobody_gives_what_is_warmer(tmp_path: Path) -> None:
    """One with few segments whose own pages are colder than all others goes on with those."""
    host = Host(tmp_path, 5)
    host.put("poor", [1, 2, 3, 4])
    host.put("rich", list(range(100, 116)))
    host.put("poor", [5])
    assert host.reserve("rich", []).wanted == []
    assert len(host.has(range(100, 116))) == 16
    host.close()


def test_cold_pages_of_an_idle_holder_hide_no_others_from_the_ssd(tmp_path: Path) -> None:
    """Each holder evicts from its own segments: those of each are looked at, however many colder ones others have."""
    host = Host(tmp_path, 2, segment_bytes=4096 * 310)
    host.put("idle", list(range(300)))
    host.put("busy", [1001, 1002])
    host.slots([1001])
    (victim,) = host.arena.to_spill(10)
    assert victim.page_hash == page(1001)
    host.close()


def test_a_page_that_is_used_again_is_looked_at_again(tmp_path: Path) -> None:
    """Its copy on the SSD may be gone before the page is cold for the second time."""
    host = Host(tmp_path, 1)
    host.put("te", [1, 2, 3, 4])
    host.slots([1])
    (victim,) = host.arena.to_spill(10)
    host.arena.spilled([victim])
    assert host.arena.to_spill(10) == []
    host.slots([1])
    assert host.arena.to_spill(10) == [victim]
    host.close()


def test_a_page_is_not_waited_for_when_its_writer_is_silent(tmp_path: Path) -> None:
    """A file that vanished under a reservation: the page can be written by another at once."""
    host = Host(tmp_path, 2)
    (slot,) = host.reserve("te", [1]).slots
    assert slot is not None
    assert host.reserve("twin", [1]).slots == [None]
    path_of(tmp_path, slot.segment).unlink()
    host.now += PATIENCE_S / 2
    host.arena.poll(host.now)
    assert host.put("twin", [1]).num_refused == 0
    assert host.has(range(3)) == [1]
    host.close()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 11), max_size=30),
    st.lists(st.integers(1, 5), min_size=1, max_size=6),
)
def test_the_coldest_go_first_over_all_segments_of_a_holder(
    used: list[int], sizes: list[int]
) -> None:
    """What is evicted are the pages that were not used for longest, in whichever segment they are."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        host = Host(Path(folder), 3)
        order = list(range(12))
        for number in order:
            host.put("te", [number])
        for number in used:
            host.slots([number])
            order.remove(number)
            order.append(number)
        fresh = 100
        for size in sizes:
            new = list(range(fresh, fresh + size))
            host.put("te", new)
            order = order[size:] + new[::-1]
            assert set(host.has(range(200))) == set(order)
            fresh += size
        host.close()
