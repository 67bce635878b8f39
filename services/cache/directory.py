"""The directory: which TE holds which page, built from sequence-numbered block events. Pure; no bus and no clock.

Each TE has an index of its own, page hash -> tiers, fed by events numbered from 1. An event that arrives out of turn
waits; while one waits, or when a TE is seen for the first time in mid-life, the TE is *unsynced* and its whole index is
to be asked for (`BlocksDump`). Until that comes its last view stands: the TE itself decides what it really has, so a
stale answer costs a little time and no correctness (RTC holds soft state, says the paper).

Memory is bounded: every page costs `PAGE_BYTES` of one budget. Past it a TE that holds its fair share or more gets no
new pages, and a TE below its share takes the room from the newest pages of the largest index. Refusing the newest keeps
chains whole from their root, which is where a prefix match starts; a directory that forgot roots would match nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from shared.messages import BlockEvents, BlocksDump, Holder

TIERS: Final = ("device", "host", "ssd")  # fastest first
PAGE_BYTES: Final = 200  # a dict slot at its worst load, and a 16-byte hash as an object of its own
MAX_WAITING_PAGES: Final = 16_384  # of one TE, in events that arrived out of turn

_BIT: Final = {tier: 1 << rank for rank, tier in enumerate(TIERS)}
_FASTEST: Final = tuple(
    next((rank for rank in range(len(TIERS)) if bits >> rank & 1), 0)
    for bits in range(1 << len(TIERS))
)


@dataclass(slots=True)
class _Index:
    """One TE's pages. `seq` is the last event applied; `waiting` those that came too early, by number."""

    model: str
    seq: int = 0
    pages: dict[bytes, int] = field(default_factory=dict)  # hash -> bits of the tiers that hold it
    waiting: dict[int, BlockEvents] = field(default_factory=dict)
    num_waiting_pages: int = 0
    synced: bool = False
    truncated: bool = False  # pages were refused or given up for the budget


class Directory:
    """Page hash -> holders and tier. `max_bytes` is the budget of all indexes together."""

    def __init__(self, *, max_bytes: int) -> None:
        self.max_pages = max_bytes // PAGE_BYTES
        self.num_pages = 0
        self.num_gaps = 0
        self.num_refused = 0
        self._tes: dict[str, _Index] = {}

    @property
    def num_bytes(self) -> int:
        """What the indexes cost by our own account; events that wait are bounded apart."""
        return self.num_pages * PAGE_BYTES

    # ------------------------------------------------------------------------------------------------------ changes

    def seen(self, te: str, model: str) -> None:
        """A TE beats. One not known yet may hold anything: it is unsynced."""
        if te not in self._tes:
            self._tes[te] = _Index(model)

    def apply(self, events: BlockEvents) -> None:
        """Takes in an event: at once if it is next, later if it is early, never if it is old."""
        index = self._tes.get(events.te)
        if index is None:
            # From its first event on nothing is missing; anything later needs a dump first.
            index = self._tes[events.te] = _Index(events.model, synced=events.seq == 1)
        if events.seq <= index.seq:
            return
        if events.seq != index.seq + 1:
            self._wait(index, events)
            return
        self._change(index, events)
        self._catch_up(index)

    def load(self, dump: BlocksDump) -> None:
        """Takes in a TE's whole index. One older than what was applied already says nothing new."""
        index = self._tes.get(dump.te)
        if index is None:
            index = self._tes[dump.te] = _Index(dump.model)
        if dump.seq < index.seq:
            index.synced = index.synced or not index.waiting
            return
        self.num_pages -= len(index.pages)
        index.pages.clear()
        index.truncated = False
        index.seq, index.synced = dump.seq, True
        self._store(index, dump.hashes, dump.tier)
        for seq in [seq for seq in index.waiting if seq <= dump.seq]:
            self._drop_waiting(index, seq)
        self._catch_up(index)

    def remove(self, te: str) -> bool:
        """The TE is gone, and its pages with it. True if it was known."""
        index = self._tes.pop(te, None)
        if index is None:
            return False
        self.num_pages -= len(index.pages)
        self._reclaim_room()
        return True

    def doubt(self) -> None:
        """Events may have been lost unseen (the bus was away): ask everybody again."""
        for index in self._tes.values():
            index.synced = False

    # --------------------------------------------------------------------------------------------------- questions

    def unsynced(self) -> list[str]:
        """The TEs whose whole index is to be asked for."""
        return [te for te, index in self._tes.items() if not index.synced]

    def tes(self) -> dict[str, int]:
        """Pages by TE."""
        return {te: len(index.pages) for te, index in self._tes.items()}

    def match(self, model: str, hashes: Sequence[bytes]) -> list[Holder]:
        """Who holds the first pages of a chain, longest first; a holder's tier is the slowest one it needs.

        Linear in pages times holders of the first one: a chain may be broken in the middle (blocks are evicted one
        by one), so nothing shorter than a scan is exact.
        """
        holders = []
        for te, index in self._tes.items():
            if index.model != model:
                continue
            find = index.pages.get
            num_pages = slowest = 0
            for page in hashes:
                tiers = find(page)
                if tiers is None:
                    break
                num_pages += 1
                if _FASTEST[tiers] > slowest:
                    slowest = _FASTEST[tiers]
            if num_pages:
                holders.append(Holder(te=te, num_pages=num_pages, tier=TIERS[slowest]))
        return sorted(holders, key=lambda holder: (-holder.num_pages, TIERS.index(holder.tier)))

    def check(self) -> None:
        """Raises AssertionError if the account does not balance or a bound is passed. For tests and `status`."""
        assert self.num_pages == sum(len(index.pages) for index in self._tes.values())
        assert self.num_pages <= self.max_pages
        for index in self._tes.values():
            waiting = sum(_num_hashes(events) for events in index.waiting.values())
            assert waiting == index.num_waiting_pages <= MAX_WAITING_PAGES
            assert not (index.synced and index.waiting)
            assert all(seq > index.seq + 1 for seq in index.waiting)

    # ------------------------------------------------------------------------------------------------------ sequence

    def _wait(self, index: _Index, events: BlockEvents) -> None:
        if index.synced:
            self.num_gaps += 1
        index.synced = False
        if events.seq in index.waiting:
            return
        cost = _num_hashes(events)
        if index.num_waiting_pages + cost > MAX_WAITING_PAGES:
            # A dump that comes now would be followed by a gap again, and by the next dump: nothing is lost for good.
            index.waiting.clear()
            index.num_waiting_pages = 0
            return
        index.waiting[events.seq] = events
        index.num_waiting_pages += cost

    def _catch_up(self, index: _Index) -> None:
        """Applies the waiting events whose turn it is; synced once none is left."""
        while (events := index.waiting.get(index.seq + 1)) is not None:
            self._drop_waiting(index, events.seq)
            self._change(index, events)
        if index.waiting:
            index.synced = False

    def _drop_waiting(self, index: _Index, seq: int) -> None:
        index.num_waiting_pages -= _num_hashes(index.waiting.pop(seq))

    # ---------------------------------------------------------------------------------------------------------- pages

    def _change(self, index: _Index, events: BlockEvents) -> None:
        index.seq = events.seq
        bit = _BIT.get(events.tier, 0)
        for page in events.removed:
            left = index.pages.get(page, 0) & ~bit
            if left:
                index.pages[page] = left
            elif index.pages.pop(page, None) is not None:
                self.num_pages -= 1
        self._store(index, events.stored, events.tier)

    def _store(self, index: _Index, hashes: Iterable[bytes], tier: str) -> None:
        bit = _BIT.get(tier, 0)
        if not bit:
            return  # a tier of a later version: not ours to answer for
        for page in hashes:
            tiers = index.pages.get(page)
            if tiers is None:
                if self.num_pages >= self.max_pages and not self._make_room(index):
                    continue
                self.num_pages += 1
            index.pages[page] = (tiers or 0) | bit

    def _make_room(self, index: _Index) -> bool:
        """Whether `index` may have one page more. The budget is spent: somebody goes without."""
        self.num_refused += 1
        if len(index.pages) >= self.max_pages // len(self._tes):
            index.truncated = True
            return False
        largest = max(self._tes.values(), key=lambda other: len(other.pages))
        largest.pages.popitem()  # dicts keep order: the newest
        largest.truncated = True
        self.num_pages -= 1
        return True

    def _reclaim_room(self) -> None:
        """There is room again: those who went without are asked for everything once more."""
        for index in self._tes.values():
            if index.truncated:
                index.synced = False


def _num_hashes(events: BlockEvents) -> int:
    """What an event costs while it waits; one without pages still costs something."""
    return 1 + len(events.stored) + len(events.removed)
