"""The directory: who holds which page, in which tier, built from numbered block events. Pure; no bus and no clock.

A holder is a TE (its device, one model) or a cache service (the arena and SSD of its host, many models). Each holder
has an index of its own per model, page hash -> tiers, fed by events numbered from 1. An event that arrives out of turn
waits; while one waits, or when a holder is seen for the first time in mid-life, the index is *unsynced* and is to be
asked for whole (`BlocksDump`). Until that comes its last view stands: the holder itself decides what it really has, so
a stale answer costs a little time and no correctness (RTC holds soft state, says the paper).

Memory is bounded: every page costs `PAGE_BYTES` of one budget. Past it an index that has its fair share or more gets no
new pages, and one below its share takes the room from the newest pages of the largest. Refusing the newest keeps
chains whole from their root, which is where a prefix match starts; a directory that forgot roots would match nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from shared.rtc_messages import BlockEvents, BlocksDump, Holder

TIERS: Final = ("device", "host", "ssd")  # fastest first
PAGE_BYTES: Final = 200  # a dict slot at its worst load, and a 16-byte hash as an object of its own
MAX_WAITING_PAGES: Final = 16_384  # of one index, in events that arrived out of turn
ABSENT: Final = -1  # of a page that a holder does not have, where a tier's rank would stand

_BIT: Final = {tier: 1 << rank for rank, tier in enumerate(TIERS)}
_FASTEST: Final = tuple(
    next((rank for rank in range(len(TIERS)) if bits >> rank & 1), 0)
    for bits in range(1 << len(TIERS))
)


@dataclass(slots=True)
class _Index:
    """One holder's pages of one model. `seq` is the last event applied; `waiting` those that came too early."""

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
        self._models: dict[str, dict[str, _Index]] = {}  # model -> holder -> index
        self._hosts: dict[str, str] = {}  # cache service -> the host whose arena it owns

    @property
    def num_bytes(self) -> int:
        """What the indexes cost by our own account; events that wait are bounded apart."""
        return self.num_pages * PAGE_BYTES

    @property
    def num_holders(self) -> int:
        """Those with an index. Like the next one for the thread of the metrics port as well: it copies, then counts."""
        return len({holder for indexes in list(self._models.values()) for holder in list(indexes)})

    @property
    def num_unsynced(self) -> int:
        """Indexes that are to be asked for."""
        return sum(
            not index.synced
            for indexes in list(self._models.values())
            for index in list(indexes.values())
        )

    # ------------------------------------------------------------------------------------------------------ changes

    def seen(self, holder: str, model: str) -> None:
        """A holder beats. One not known yet may hold anything: it is unsynced."""
        self._models.setdefault(model, {}).setdefault(holder, _Index())

    def owns(self, cache: str, host: str) -> None:
        """This holder is a cache service, and what it holds is in the arena of `host`."""
        self._hosts[cache] = host

    def apply(self, events: BlockEvents) -> None:
        """Takes in an event: at once if it is next, later if it is early, never if it is old."""
        index = self._index(events.te, events.model)
        if index is None:
            # From its first event on nothing is missing; anything later needs a dump first.
            index = _Index(synced=events.seq == 1)
            self._models.setdefault(events.model, {})[events.te] = index
        if events.seq <= index.seq:
            return
        if events.seq != index.seq + 1:
            self._wait(index, events)
            return
        self._change(index, events)
        self._catch_up(index)

    def load(self, dump: BlocksDump) -> None:
        """Takes in a whole index. One older than what was applied already says nothing new."""
        index = self._index(dump.te, dump.model)
        if index is None:
            index = _Index()
            self._models.setdefault(dump.model, {})[dump.te] = index
        if dump.seq < index.seq:
            index.synced = index.synced or not index.waiting
            return
        self.num_pages -= len(index.pages)
        index.pages.clear()
        index.truncated = False
        index.seq, index.synced = dump.seq, True
        self._store(index, dump.hashes, dump.tier)
        self._store(index, dump.ssd, "ssd")
        for seq in [seq for seq in index.waiting if seq <= dump.seq]:
            self._drop_waiting(index, seq)
        self._catch_up(index)

    def remove(self, holder: str) -> bool:
        """The holder is gone, and its pages with it. True if it was known."""
        self._hosts.pop(holder, None)
        known = False
        for model, indexes in list(self._models.items()):
            index = indexes.pop(holder, None)
            if index is not None:
                known = True
                self.num_pages -= len(index.pages)
            if not indexes:
                del self._models[model]
        if known:
            self._reclaim_room()
        return known

    def doubt(self) -> None:
        """Events may have been lost unseen (the bus was away): ask everybody again."""
        for index in self._all():
            index.synced = False

    # --------------------------------------------------------------------------------------------------- questions

    def unsynced(self) -> list[tuple[str, str]]:
        """(holder, model) of the indexes that are to be asked for."""
        return [
            (holder, model)
            for model, indexes in self._models.items()
            for holder, index in indexes.items()
            if not index.synced
        ]

    def holders(self) -> dict[str, int]:
        """Pages by holder, over all its models."""
        num_pages: dict[str, int] = {}
        for indexes in self._models.values():
            for holder, index in indexes.items():
                num_pages[holder] = num_pages.get(holder, 0) + len(index.pages)
        return num_pages

    def match(self, model: str, hashes: Sequence[bytes]) -> list[Holder]:
        """Who holds the first pages of a chain, longest first; a holder's tier is the slowest one it needs.

        Linear in pages times holders of the first one: a chain may be broken in the middle (blocks are evicted one
        by one), so nothing shorter than a scan is exact.
        """
        holders = []
        for name, index in self._models.get(model, {}).items():
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
                tier, host = TIERS[slowest], self._hosts.get(name, "")
                holders.append(Holder(te=name, num_pages=num_pages, tier=tier, host=host))
        return sorted(holders, key=lambda holder: (-holder.num_pages, TIERS.index(holder.tier)))

    def tiers(self, holder: str, model: str, hashes: Sequence[bytes]) -> list[int]:
        """Per page the rank in TIERS of the fastest tier in which `holder` has it, or ABSENT."""
        index = self._index(holder, model)
        if index is None:
            return [ABSENT] * len(hashes)
        found = map(index.pages.get, hashes)
        return [ABSENT if tiers is None else _FASTEST[tiers] for tiers in found]

    def check(self) -> None:
        """Raises AssertionError if the account does not balance or a bound is passed. For tests and `status`."""
        assert self.num_pages == sum(len(index.pages) for index in self._all())
        assert self.num_pages <= self.max_pages
        for index in self._all():
            waiting = sum(_num_hashes(events) for events in index.waiting.values())
            assert waiting == index.num_waiting_pages <= MAX_WAITING_PAGES
            assert not (index.synced and index.waiting)
            assert all(seq > index.seq + 1 for seq in index.waiting)

    def _index(self, holder: str, model: str) -> _Index | None:
        return self._models.get(model, {}).get(holder)

    def _all(self) -> Iterator[_Index]:
        for indexes in self._models.values():
            yield from indexes.values()

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
        indexes = list(self._all())
        if len(index.pages) >= self.max_pages // len(indexes):
            index.truncated = True
            return False
        largest = max(indexes, key=lambda other: len(other.pages))
        largest.pages.popitem()  # dicts keep order: the newest
        largest.truncated = True
        self.num_pages -= 1
        return True

    def _reclaim_room(self) -> None:
        """There is room again: those who went without are asked for everything once more."""
        for index in self._all():
            if index.truncated:
                index.synced = False


def _num_hashes(events: BlockEvents) -> int:
    """What an event costs while it waits; one without pages still costs something."""
    return 1 + len(events.stored) + len(events.removed)
