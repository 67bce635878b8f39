"""The store against a naive model: any interleaving of its calls, with real segment files."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from services.cache.arena import GRANT_S, Arena
from services.cache.reservations import RESERVE_S
from shared.arena.reader import Reader, ReadSegment
from shared.arena.segment import Layout, PageKind, State, path_of
from shared.arena.writer import Writer
from shared.messages import Keep
from shared.rtc_messages import Commit, Slot

KINDS = (PageKind("a", "r", 3000), PageKind("a", "s", 3000), PageKind("b", "r", 7000))
SEGMENT_BYTES = 4096 * 12  # room for ten small pages or five large ones
BUDGET = 3 * SEGMENT_BYTES
TES = ("te-0", "te-1", "te-2")
PAGES = [bytes([n]) * 16 for n in range(24)]


def content(kind: PageKind, page: bytes) -> bytes:
    """What a page holds, wherever it is."""
    return bytes([(page[0] * 3 + KINDS.index(kind)) % 256]) * kind.slot_bytes


class Te:
    """A holder of segments: real locks, and the slots it was given and has not spoken of yet."""

    def __init__(self, folder: Path) -> None:
        self.writer = Writer(folder)
        self.given: list[tuple[Slot, PageKind, bytes]] = []
        self.written: list[Slot] = []


class StoreMachine(RuleBasedStateMachine):
    """The model is what may be in the index: pages that were committed, and must be: those that are pinned."""

    @initialize()
    def start(self) -> None:
        self.folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
        self.now, self.epoch = 0.0, 0
        self.tes = {name: Te(self.folder) for name in TES}
        self.reader = Reader(self.folder)
        self.committed: set[tuple[PageKind, bytes]] = set()  # ever, as the writers know it
        self.seen: dict[str, set[bytes]] = {}  # by the events
        self.kept: dict[str, tuple[float, set[tuple[PageKind, bytes]]]] = {}
        self.leased: dict[str, tuple[float, list[Slot], PageKind]] = {}
        self.stale = False
        self.arena = self.open()

    def open(self) -> Arena:
        self.epoch += 1
        arena = Arena(self.folder, max_bytes=BUDGET, segment_bytes=SEGMENT_BYTES, epoch=self.epoch)
        arena.rebuild(self.now)
        return arena

    def teardown(self) -> None:
        if hasattr(self, "arena"):
            for te in self.tes.values():
                te.writer.close()
            self.arena.close()
            shutil.rmtree(self.folder)

    # ------------------------------------------------------------------------------------------------------- the calls

    @rule(
        name=st.sampled_from(TES), kind=st.sampled_from(KINDS), start=st.integers(0, 20),
        num_pages=st.integers(0, 12), lock=st.booleans(), keep=st.sampled_from(["", "x", "y"]),
    )  # fmt: skip
    def reserve(
        self, name: str, kind: PageKind, start: int, num_pages: int, lock: bool, keep: str
    ) -> None:
        te, pages = self.tes[name], PAGES[start : start + num_pages]
        named = Keep(id=keep, ttl_ms=20_000) if keep else None
        held = te.writer.held
        before = {page for page in pages if self.arena.holds(kind, [page])}
        copied = self.arena.reserve(name, kind, pages, held=held, keep=named, now=self.now)
        assert len(copied.slots) == len(pages)
        given = [(s, kind, p) for s, p in zip(copied.slots, pages, strict=True) if s is not None]
        assert {slot.segment for slot, _, _ in given} <= set(held) | set(copied.granted)
        assert not {page for _, _, page in given} & before
        assert copied.num_refused <= len(pages) - len(given)
        assert set(copied.wanted) <= set(held) | set(copied.granted) | {
            row["segment"] for row in self.arena.segments() if row["holder"] == name
        }
        if lock:
            te.writer.lock(copied.granted)
        te.given += given
        if keep:
            self.kept[keep] = (max(self.now + 20.0, self.kept.get(keep, (0.0, set()))[0]), set())

    @rule(name=st.sampled_from(TES), count=st.integers(1, 12), tell=st.booleans())
    def write(self, name: str, count: int, tell: bool) -> None:
        te = self.tes[name]
        dropped = []
        for slot, kind, page in te.given[:count]:
            if te.writer.write(slot, page, content(kind, page)):
                self.committed.add((kind, page))
                te.written.append(slot)
            else:
                dropped.append(slot)
        del te.given[:count]
        if tell:
            new = self.arena.commit(Commit(te=name, written=te.written, dropped=dropped), self.now)
            te.written = []
            for kind, page in {(k, p) for k in KINDS for p in new}:
                assert not self.arena.holds(kind, [page]) or (kind, page) in self.committed
            assert all(any(self.arena.holds(kind, [page]) for kind in KINDS) for page in new)

    @rule(name=st.sampled_from(TES), lie=st.booleans())
    def drop(self, name: str, lie: bool) -> None:
        """Slots that are not written are dropped, or called written, which the headers disprove."""
        te = self.tes[name]
        slots = [slot for slot, _, _ in te.given]
        commit = Commit(te=name, written=slots) if lie else Commit(te=name, dropped=slots)
        assert self.arena.commit(commit, self.now) == []
        te.given = []

    @rule(name=st.sampled_from(TES), tell=st.booleans())
    def give_back(self, name: str, tell: bool) -> None:
        te = self.tes[name]
        returned = te.writer.give_back(te.writer.held[:1])
        if tell:
            self.arena.commit(Commit(te=name, returned=returned), self.now)

    @rule(name=st.sampled_from(TES), heard=st.booleans())
    def die(self, name: str, heard: bool) -> None:
        te = self.tes[name]
        te.writer.close()
        self.tes[name] = Te(self.folder)
        if heard:
            self.arena.down(name, self.now)

    @rule()
    def restart(self) -> None:
        self.arena.close()
        self.arena = self.open()
        self.kept, self.leased, self.seen = {}, {}, {}
        # What the last store gave out may be written over what this one finds: its pins cannot hold that.
        self.stale = any(te.given for te in self.tes.values())
        whole: dict[PageKind, set[bytes]] = {kind: set() for kind in KINDS}
        for path in self.folder.glob("*.kv"):
            segment = ReadSegment(self.folder, path.stem)
            for header in map(segment.header, range(segment.layout.num_slots)):
                if header is not None and header.state is State.COMMITTED:
                    whole[segment.layout.kind].add(header.page_hash)
        for kind, pages in whole.items():
            assert {page for page in PAGES if self.arena.holds(kind, [page])} == pages

    @rule(seconds=st.sampled_from([0.5, GRANT_S, RESERVE_S]))
    def poll(self, seconds: float) -> None:
        self.now += seconds
        self.arena.poll(self.now)
        self.kept = {k: v for k, v in self.kept.items() if v[0] > self.now}
        self.leased = {k: v for k, v in self.leased.items() if v[0] > self.now}

    @rule(keep=st.sampled_from(["x", "y", "z"]))
    def free(self, keep: str) -> None:
        assert self.arena.free(keep) == (self.kept.pop(keep, None) is not None)

    @rule(kind=st.sampled_from(KINDS), start=st.integers(0, 20), number=st.integers(0, 3))
    def lease(self, kind: PageKind, start: int, number: int) -> None:
        slots = self.arena.find(kind, PAGES[start : start + 4])
        name = f"lease-{number}"
        held = name in self.leased and self.leased[name][0] > self.now
        if self.arena.lease(name, slots, self.now + 10.0):
            assert name not in self.leased or not held
            self.leased[name] = (self.now + 10.0, slots, kind)

    @precondition(lambda self: self.leased)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.leased)))
        until, slots, _ = self.leased.pop(name)
        pages = {(slot.segment, slot.index, slot.generation) for slot in slots}
        valid = self.arena.release(name)
        assert valid or until <= self.now or self.stale
        if valid:
            for segment, index, generation in pages:
                mapped = self.reader.segment(segment)
                header = mapped.header(index) if mapped else None
                assert header is not None
                assert header.generation == generation

    @rule(data=st.data())
    def unlink(self, data: st.DataObject) -> None:
        """Somebody removes a file under everybody's hands."""
        names = [str(row["segment"]) for row in self.arena.segments()]
        if names and data.draw(st.integers(0, 3)) == 0:
            path_of(self.folder, data.draw(st.sampled_from(names))).unlink(missing_ok=True)
            self.arena.poll(self.now)
            for name in self.leased:
                self.arena.release(name)
            self.leased = {}

    @rule()
    def spill(self) -> None:
        victims = self.arena.to_spill(5, every=True)
        for victim in victims:
            out = bytearray(victim.kind.slot_bytes)
            if self.reader.read(victim.slot, victim.page_hash, out):
                assert out == content(victim.kind, victim.page_hash)
        self.arena.spilled(victims)
        assert not {v.page_hash for v in self.arena.to_spill(5, every=True) if v in victims}

    # ------------------------------------------------------------------------------------------------- what must hold

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "arena"):
            return
        self.arena.check()
        files = sum(path.stat().st_size for path in self.folder.glob("*.kv"))
        assert self.arena.num_bytes <= BUDGET
        assert files <= BUDGET
        for model, changes in self.arena.drain_events().items():
            assert not set(changes.stored) & set(changes.removed)
            seen = self.seen.setdefault(model, set())
            seen -= set(changes.removed)
            seen |= set(changes.stored)
        for model in ("a", "b"):
            pages = self.arena.pages(model)
            kinds = {k for k in KINDS if k.model == model}
            if len(kinds) == 1:
                assert len(pages) == len(set(pages))
                assert set(pages) == self.seen.get(model, set())
            for kind in kinds:
                for page in set(pages):
                    slots = self.arena.find(kind, [page])
                    assert not slots or (kind, page) in self.committed
                    out = bytearray(kind.slot_bytes)
                    if slots and self.reader.read(slots[0], page, out):
                        assert out == content(kind, page)

    @invariant()
    def leases_hold(self) -> None:
        """A page under lease stays where it is until the lease ends."""
        if hasattr(self, "arena") and not self.stale:
            for until, slots, _ in self.leased.values():
                for slot in slots if until > self.now else []:
                    segment = self.reader.segment(slot.segment)
                    header = segment.header(slot.index) if segment else None
                    assert header is not None
                    assert header.generation == slot.generation

    @invariant()
    def one_writer(self) -> None:
        """No segment is held by two, and no slot is given to one who does not hold its segment."""
        if hasattr(self, "arena"):
            held = [name for te in self.tes.values() for name in te.writer.held]
            assert len(held) == len(set(held))


StoreMachine.TestCase.settings = settings(
    max_examples=40,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestStore = StoreMachine.TestCase


def test_the_budget_of_the_machine_is_tight() -> None:
    """The model above has fewer slots than pages, or nothing would ever be evicted."""
    layout = Layout.fit(KINDS[0], SEGMENT_BYTES)
    assert layout is not None
    assert layout.num_slots * (BUDGET // SEGMENT_BYTES) < len(KINDS) * len(PAGES)
    assert os.path.isdir("/dev/shm")
