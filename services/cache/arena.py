"""The store of a host's arena: which page is in which slot, who may write where, and what has to go for room.

A segment has one writer at a time, its *holder*, who proves by the file's lock that it lives. So a slot is only ever
given to the holder of its segment, and a segment to another holder only when its lock is free: a writer that was
stopped for an hour and goes on where it stood still finds its slots its own. A slot's generation is new whenever it is
given out (the high bits are the store's epoch, so this holds across restarts), and what counts as written is what the
slot's own header says. A segment that nobody holds is an orphan; its pages are read as before, and who needs room
adopts it whole.

Room for a page is looked for in this order: a free slot of the asker's segments; a new segment within the byte budget;
an orphan, if it has free slots or is colder than what the asker has; the asker's own coldest page. For an asker without
its share the richest holder is asked to give back its coldest segment, if that is colder than what the asker evicts.

The index is soft state, rebuilt from the headers. A page costs it at most PAGE_BYTES. One thread; the clock (monotonic
seconds) is passed in; I/O is on the segment files alone. This module must not know the bus, nor the tiers around it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Final

from services.cache.adoption import Wanted, best_orphan
from services.cache.changes import ChangeLog, Changes
from services.cache.extent import INDEX_BITS, NEVER, Extent, Use
from services.cache.extents import Coldest, Extents
from services.cache.pins import Pins
from services.cache.reservations import Reservation, Reservations
from services.cache.spilling import Victim, victims
from shared.arena.segment import PageKind, SlotHeader, State
from shared.blockhash import DIGEST_BYTES
from shared.log import note
from shared.messages import Keep
from shared.rtc_messages import Commit, Copied, Slot

PAGE_BYTES: Final = 256  # dict entry, hash, place, and the slot's share of the arrays
GRANT_S: Final = 5.0  # to lock what one was given; a lock that is free after it will not be taken
MAX_KEEPS: Final = 65_536  # explicit caches
PINNED_SHARE: Final = 0.5  # of the budget, for explicit caches, and as much for leases

_EPOCH_SHIFT: Final = 40


class Arena:
    """Pages of all kinds in segments of one folder, of at most `max_bytes` together.

    `epoch` is the place's: greater than that of any store before on this folder.
    """

    def __init__(self, directory: Path, *, max_bytes: int, segment_bytes: int, epoch: int) -> None:
        self.num_evicted = 0
        self.num_adopted = 0
        self._extents = Extents(directory, max_bytes=max_bytes, segment_bytes=segment_bytes)
        self._count = epoch << _EPOCH_SHIFT  # generations, and stamps of use
        self._index: dict[PageKind, dict[bytes, int]] = {}  # page -> place
        self._reservations = Reservations()
        share = max_bytes * PINNED_SHARE
        self._keeps = Pins(self._extents.by_number, lambda extent: extent.keeps, share)
        self._leases = Pins(self._extents.by_number, lambda extent: extent.leases, share)
        self._wanted = Wanted(self._extents)
        self._changes = ChangeLog()

    # ------------------------------------------------------------------------------------------------------ life cycle

    def rebuild(self, now: float) -> None:
        """Indexes what the folder's segments hold, by their slots' headers; removes leftovers that nobody uses, and the
        coldest orphans beyond the budget. Call it once, first."""
        # The order of use is lost; that of writing is what is left.
        extents = sorted(self._extents.load(), key=Extent.last_written)
        if extents:  # whatever became of the epoch
            self._count = max(self._count, extents[-1].last_written())
        for extent in extents:
            extent.unlocked()
            self._scan(extent, now)
        self._shrink()

    def poll(self, now: float) -> None:
        """Call it about once a second: ends keeps, leases and reservations that are over, and makes orphans of segments
        whose lock is free and forgets those whose file is gone. Orphans beyond the budget are removed."""
        for pins in (self._keeps, self._leases):
            for name in pins.expired(now):
                pins.close(name, self._next)
        for place in self._reservations.overdue(now):
            self._clear(place)
        for extent in self._extents:
            if extent.gone():
                note("arena_segment_lost", segment=extent.name, holder=extent.holder)
                self._remove(extent)
            else:
                self._look(extent, now)
        self._extents.retry()
        self._shrink()

    def down(self, te: str, now: float) -> None:
        """A holder was declared dead: looks at its locks at once."""
        for extent in self._extents:
            if extent.holder == te:
                extent.granted_at = now - GRANT_S
                self._look(extent, now)

    def close(self) -> None:
        """Closes the files; they stay."""
        self._extents.close()

    # ---------------------------------------------------------------------------------------------------------- writing

    def reserve(
        self,
        te: str,
        kind: PageKind,
        hashes: Sequence[bytes],
        *,
        held: Iterable[str],
        keep: Keep | None,
        now: float,
    ) -> Copied:
        """Slots for pages that `te` (a TE, or this cache service) is to write: the answer to `Copy`.

        A call without hashes tells which segments are wanted back, and nothing else.
        """
        held = set(held)
        self._claim(te, held, now)
        if keep is not None:
            self.keep(keep, kind, hashes, now)
        own = Coldest(
            e for e in self._extents if e.holder == te and e.kind == kind and not e.wanted
        )
        orphans = [extent for extent in self._extents if extent.orphan]
        fits = self._extents.fits(kind)
        pages = self._index.get(kind, {})
        slots: list[Slot | None] = []
        granted: dict[str, None] = {}
        num_refused, num_evicted = 0, self.num_evicted
        # The first pages of a chain are its most useful ones: they are touched last.
        for page_hash in reversed(hashes):
            if (place := pages.get(page_hash)) is not None:
                self._touch(place)
        for page_hash in hashes:
            awaited = self._reservations.awaited(te, kind, page_hash, now)
            if awaited is not None and keep is not None:
                awaited.keeps.add(keep.id)
            if awaited is not None or page_hash in pages:
                slots.append(None)
                continue
            sound = fits and len(page_hash) == DIGEST_BYTES
            room = self._room(te, kind, own, orphans, now) if sound else None
            if room is None:
                slots.append(None)
                num_refused += 1
                continue
            extent, index = room
            extent.await_writing(index, self._next(), page_hash)
            reservation = Reservation(te, kind, page_hash, now, {keep.id} if keep else set())
            self._reservations.add(extent.place(index), reservation)
            slots.append(extent.slot(index))
            if extent.name not in held:
                granted[extent.name] = None
        if fits and (num_refused or self.num_evicted > num_evicted):
            self._wanted.ask_the_richest(te, NEVER if num_refused else own.age())
        wanted = [e.name for e in self._extents if e.wanted and e.holder == te]
        # Of a file that is gone, a mapping only keeps the memory.
        wanted += [name for name in held if self._extents.named(name) is None]
        return Copied(slots=slots, granted=list(granted), wanted=wanted, num_refused=num_refused)

    def commit(self, commit: Commit, now: float) -> list[bytes]:
        """Takes in what was written, as the slots' headers have it, what will not be, and segments that are given back.
        Returns the pages that are new here."""
        new = []
        # Later pages of a chain first, as they are to be evicted first.
        for slot in reversed(commit.written):
            found = self._writable(commit.te, slot)
            if found is None:
                continue
            extent, index = found
            header = extent.header(index)
            if header is None or header.generation != slot.generation:
                self._drop(extent, slot)
            elif self._admit(extent, index, header):
                new.append(header.page_hash)
        for slot in commit.dropped:
            found = self._writable(commit.te, slot)
            if found is not None:
                self._drop(found[0], slot)
        for given in map(self._extents.named, commit.returned):
            if given is not None and given.holder in (commit.te, ""):
                given.granted_at = now - GRANT_S
                if not self._look(given, now):
                    given.holder = ""  # another has it
        new.reverse()
        return new

    # ---------------------------------------------------------------------------------------------------------- reading

    def find(self, kind: PageKind, hashes: Sequence[bytes]) -> list[Slot]:
        """The slots of the longest prefix of these pages that is here, which counts as a use of them."""
        places = self._prefix(kind, hashes)
        for place in reversed(places):
            self._touch(place)
        return [extent.slot(index) for extent, index in map(self._extents.at, places)]

    def holds(self, kind: PageKind, hashes: Sequence[bytes]) -> int:
        """How many of the first pages are here; not a use of them."""
        return len(self._prefix(kind, hashes))

    def pages(self, model: str) -> list[bytes]:
        """All pages of a model: for a dump."""
        return [
            page for kind, pages in self._index.items() if kind.model == model for page in pages
        ]

    def drain_events(self) -> dict[str, Changes]:
        """What changed per model since the last call. Call it often: until then it is kept."""
        return self._changes.drain()

    # ------------------------------------------------------------------------------------------------------------- pins

    def keep(self, keep: Keep, kind: PageKind, hashes: Iterable[bytes], now: float) -> int:
        """Holds those of the pages that are here for an explicit cache; how many of them it holds now. They are not
        evicted before `ttl_ms` from now, or `free`. Beyond PINNED_SHARE of the budget pages are not held."""
        if keep.id not in self._keeps and len(self._keeps) >= MAX_KEEPS:
            return 0
        pin = self._keeps.open(keep.id, now + keep.ttl_ms / 1000)
        pages = self._index.get(kind, {})
        for page_hash in hashes:
            if (place := pages.get(page_hash)) is not None:
                self._keeps.add(pin, *self._extents.at(place))
        return len(pin.places)

    def free(self, keep: str) -> bool:
        """An explicit cache has ended: its pages are as evictable as any. True if it was known."""
        return self._keeps.close(keep, self._next)

    def lease(self, lease: str, slots: Iterable[Slot], until: float) -> bool:
        """Holds slots for a reader elsewhere. False, and nothing is held, if one of them holds another page by now."""
        found = []
        for slot in slots:
            extent = self._extents.named(slot.segment)
            if extent is None or not extent.has(slot):
                return False
            found.append((extent, slot.index))
        if lease in self._leases:
            return False
        pin = self._leases.open(lease, until)
        if all(self._leases.add(pin, extent, index) for extent, index in found):
            return True
        self._leases.close(lease, self._next)
        return False

    def release(self, lease: str) -> bool:
        """Ends a lease. True if it was held until now, and its slots' headers still have what they had."""
        pin = self._leases.get(lease)
        if pin is None:
            return False
        valid = all(self._has(place, generation) for place, generation in pin.places.items())
        self._leases.close(lease, self._next)
        return valid

    # -------------------------------------------------------------------------------------------------------- eviction

    def to_spill(self, limit: int, *, every: bool = False) -> list[Victim]:
        """Up to `limit` pages that are next to be evicted (nothing while there is room for segments), used more than
        once or kept (or `every` one), and not known to be on the SSD. Copy them, then tell `spilled`."""
        return victims(self._extents, limit, every=every) if self._extents.full else []

    def spilled(self, copied: Iterable[Victim]) -> None:
        """These are on the SSD now."""
        for victim in copied:
            place = self._index.get(victim.kind, {}).get(victim.page_hash)
            if place is not None:
                extent, index = self._extents.at(place)
                if extent.has(victim.slot):
                    extent.mark_spilled(index)

    # ------------------------------------------------------------------------------------------------------- accounts

    def ledger(self) -> dict[str, dict[str, int]]:
        """Slots per "model/recipe/slot_bytes": total = cached + kept + leased + writing + free."""
        return self._extents.ledger()

    @property
    def num_bytes(self) -> int:
        """Of all files: what the arena takes of its file system. At most `max_bytes`, or what it found at its start."""
        return self._extents.num_bytes

    @property
    def num_shortages(self) -> int:
        """How often the file system had no room for a segment within the budget."""
        return self._extents.num_shortages

    @property
    def budget_bytes(self) -> int:
        """What it may take: `max_bytes`; while the file system has no room for more, what it has."""
        return self._extents.budget_bytes

    def segments(self) -> list[dict[str, object]]:
        """For `status`: each segment's name, model, holder ("" if not known), lock, and slots by use."""
        return self._extents.rows()

    def check(self) -> None:
        """Raises AssertionError if an account does not balance."""
        self._extents.check()
        places = {}
        for extent in self._extents:
            extent.check()
            for index in range(extent.num_slots):
                if extent.uses[index] == Use.CACHED:
                    places[extent.kind, extent.hashes[index]] = extent.place(index)
                writing = extent.uses[index] == Use.WRITING
                assert writing == (extent.place(index) in self._reservations)
        found = {
            (kind, p): place for kind, pages in self._index.items() for p, place in pages.items()
        }
        assert places == found
        assert len(places) == sum(extent.num_cached for extent in self._extents)
        assert len(self._reservations) == sum(extent.num_writing for extent in self._extents)
        for row in self.ledger().values():
            assert row["total"] == sum(row.values()) - row["total"]
            assert min(row.values()) >= 0
        self._keeps.check()
        self._leases.check()

    # ----------------------------------------------------------------------------------------------------------- places

    def _next(self) -> int:
        self._count += 1
        return self._count

    def _prefix(self, kind: PageKind, hashes: Sequence[bytes]) -> list[int]:
        pages = self._index.get(kind, {})
        return list(takewhile(lambda place: place >= 0, (pages.get(page, -1) for page in hashes)))

    def _touch(self, place: int) -> None:
        extent, index = self._extents.at(place)
        extent.touch(index, self._next())

    def _has(self, place: int, generation: int) -> bool:
        """Whether a slot's header has a committed page of this generation."""
        if place >> INDEX_BITS not in self._extents.by_number:
            return False
        extent, index = self._extents.at(place)
        header = extent.header(index)
        return (
            header is not None
            and header.state is State.COMMITTED
            and header.generation == generation
        )

    def _writable(self, te: str, slot: Slot) -> tuple[Extent, int] | None:
        """The slot, if `te` may have written to it."""
        extent = self._extents.named(slot.segment)
        if extent is None or not 0 <= slot.index < extent.num_slots:
            return None
        # After a restart the holder is not known until it says so; then the header alone has to vouch.
        return (extent, slot.index) if extent.holder in (te, "") else None

    def _admit(self, extent: Extent, index: int, header: SlotHeader) -> bool:
        """Indexes what a slot's header says it holds. False if that is nothing, nothing new, or of old."""
        kind, page_hash = extent.kind, header.page_hash
        known = extent.generations[index]
        if (
            header.state is not State.COMMITTED
            or not 0 < header.length <= kind.slot_bytes
            or header.generation < known
            or (extent.uses[index] == Use.CACHED and header.generation == known)
        ):
            return False
        reservation = self._reservations.get(extent.place(index))
        self._clear(extent.place(index))
        extent.generations[index] = header.generation
        pages = self._index.setdefault(kind, {})
        new = page_hash not in pages  # else two wrote it at once, and this slot is free again
        if new:
            extent.store(index, header.generation, page_hash, self._next())
            pages[page_hash] = extent.place(index)
            self._changes.stored(kind.model, page_hash)
        for keep in reservation.keeps if reservation else ():
            if (pin := self._keeps.get(keep)) is not None:
                self._keeps.add(pin, *self._extents.at(pages[page_hash]))
        return new

    def _drop(self, extent: Extent, slot: Slot) -> None:
        """A slot that was reserved is not going to be written."""
        if (
            extent.uses[slot.index] == Use.WRITING
            and extent.generations[slot.index] == slot.generation
        ):
            self._clear(extent.place(slot.index))

    def _clear(self, place: int) -> None:
        """Whatever the slot is used for, it is free."""
        extent, index = self._extents.at(place)
        page_hash = extent.hashes[index]
        if extent.uses[index] == Use.CACHED:
            self._keeps.forget(extent, index)
            self._leases.forget(extent, index)
            del self._index[extent.kind][page_hash]
            self._changes.removed(extent.kind.model, page_hash)
        elif extent.uses[index] == Use.WRITING:
            self._reservations.end(place)
        extent.clear(index)

    # --------------------------------------------------------------------------------------------------------- segments

    def _room(
        self, te: str, kind: PageKind, own: Coldest, orphans: list[Extent], now: float
    ) -> tuple[Extent, int] | None:
        """A free slot in a segment of `te`: one of `own`, or one that becomes one."""
        extent = own.first()
        if extent is None or not extent.num_free:
            more = self._extents.grow(kind, now) or self._adopt(kind, orphans, own.age(), now)
            if more is not None:
                more.holder, more.granted_at = te, now
                own.add(more)
                extent = more
        if extent is None:
            return None
        if not extent.num_free:
            coldest = extent.coldest()
            if coldest is None:
                return None
            self.num_evicted += 1
            self._clear(extent.place(coldest))
        return extent, extent.pop_free()

    def _adopt(
        self, kind: PageKind, orphans: list[Extent], before: int, now: float
    ) -> Extent | None:
        """An orphan, if one is a better victim than a page that was used last at `before`."""
        while (extent := best_orphan(orphans, kind, before)) is not None:
            if not self._look(extent, now):
                continue  # somebody has it after all: it is no orphan any more
            self.num_adopted += 1
            if extent.kind == kind:
                self._scan(extent, now)
                return extent
            orphans.remove(extent)
            self._remove(extent)
            return self._extents.grow(kind, now)
        return None

    def _claim(self, te: str, held: set[str], now: float) -> None:
        """Believes what `te` says it holds, as far as the locks bear it out."""
        for extent in self._extents:
            if (extent.holder == te) == (extent.name in held):
                continue
            if extent.name in held:
                if not self._look(extent, now):
                    if not extent.holder:  # what it said since it was looked at may be lost
                        self._scan(extent, now)
                    extent.holder, extent.granted_at = te, now
            elif now - extent.granted_at >= GRANT_S and not self._look(extent, now):
                extent.holder = ""  # another has it: this one never got it

    def _look(self, extent: Extent, now: float) -> bool:
        """Whether the segment's lock is free. Then it is an orphan, unless its holder had no time to lock it yet."""
        was_locked = extent.locked
        if not extent.unlocked():
            return False
        if was_locked or (extent.holder and now - extent.granted_at >= GRANT_S):
            extent.holder, extent.wanted = "", False
            self._scan(extent, now)
        return True

    def _scan(self, extent: Extent, now: float) -> None:
        """Makes the index agree with the slots' headers, where nobody writes; where somebody does, slots that are being
        written are left to him."""
        for index, header in extent.headers():
            place = extent.place(index)
            if extent.locked and (header is None or header.state is State.WRITING):
                if extent.uses[index] != Use.WRITING:
                    self._clear(place)
                    generation, page = (header.generation, header.page_hash) if header else (0, b"")
                    extent.await_writing(index, generation, page)
                    self._reservations.add(place, Reservation("", extent.kind, page, now))
            elif header is None or not self._admit(extent, index, header):
                stale = extent.uses[index] == Use.CACHED and not self._has(
                    place, extent.generations[index]
                )
                if stale or extent.uses[index] == Use.WRITING:
                    self._clear(place)

    def _shrink(self) -> None:
        """Removes the coldest orphans beyond the budget: it may have been larger when they were made."""
        extents = self._extents
        if extents.num_bytes > extents.max_bytes:
            orphans = (e for e in extents if e.orphan and not e.keeps and not e.leases)
            for extent in sorted(orphans, key=Extent.last_use):
                if extents.num_bytes > extents.max_bytes:
                    self._remove(extent)

    def _remove(self, extent: Extent) -> None:
        """Gives up a segment with its pages."""
        for index in range(extent.num_slots):
            self._clear(extent.place(index))
        self._extents.remove(extent)
        if not self._index.get(extent.kind):
            self._index.pop(extent.kind, None)
