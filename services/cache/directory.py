"""The directory: who holds which page, in which tier, built from numbered block events. Pure; no bus and no clock.

A holder is a TE (its device, one model) or a cache service (the arena and SSD of its host, many models). Each holder
has an index of its own per model, page hash -> tiers, fed by numbered events (`BlockFeeds`). While an index is
*unsynced* its last view stands: the holder itself decides what it really has, so a stale answer costs a little time and
no correctness (RTC holds soft state, says the paper).

Memory is bounded: every page costs `PAGE_BYTES` of one budget. Past it an index that has its fair share or more gets no
new pages, and one below its share takes the room from the newest pages of the largest. Refusing the newest keeps
chains whole from their root, which is where a prefix match starts; a directory that forgot roots would match nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from shared.block_feed import BlockFeeds
from shared.rtc_messages import BlockEvents, BlocksDump, Holder

TIERS: Final = ("device", "host", "ssd")  # fastest first
PAGE_BYTES: Final = 200  # a dict slot at its worst load, and a 16-byte hash as an object of its own
ABSENT: Final = -1  # of a page that a holder does not have, where a tier's rank would stand

_BIT: Final = {tier: 1 << rank for rank, tier in enumerate(TIERS)}
_FASTEST: Final = tuple(
    next((rank for rank in range(len(TIERS)) if bits >> rank & 1), 0)
    for bits in range(1 << len(TIERS))
)


@dataclass(slots=True)
class _Index:
    """One holder's pages of one model."""

    pages: dict[bytes, int] = field(default_factory=dict)  # hash -> bits of the tiers that hold it
    truncated: bool = False  # pages were refused or given up for the budget


class Directory:
    """Page hash -> holders and tier. `max_bytes` is the budget of all indexes together."""

    def __init__(self, *, max_bytes: int) -> None:
        self.max_pages = max_bytes // PAGE_BYTES
        self.num_pages = 0
        self.num_refused = 0
        self.feeds = BlockFeeds()
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

    # ------------------------------------------------------------------------------------------------------ changes

    def seen(self, holder: str, model: str) -> None:
        """A holder beats. One not known yet may hold anything: it is unsynced."""
        self.feeds.seen(holder, model)
        self._open(holder, model)

    def owns(self, cache: str, host: str) -> None:
        """This holder is a cache service, and what it holds is in the arena of `host`."""
        self._hosts[cache] = host

    def apply(self, events: BlockEvents) -> None:
        """Takes in an event: at once if it is next, later if it is early, never if it is old."""
        index = self._open(events.te, events.model)
        for event in self.feeds.take(events):
            self._change(index, event)

    def load(self, dump: BlocksDump) -> None:
        """Takes in a whole index. One older than what was applied already says nothing new."""
        index = self._open(dump.te, dump.model)
        later = self.feeds.load(dump)
        if later is None:
            return
        self.num_pages -= len(index.pages)
        index.pages.clear()
        index.truncated = False
        self._store(index, dump.hashes, dump.tier)
        self._store(index, dump.ssd, "ssd")
        for event in later:
            self._change(index, event)

    def remove(self, holder: str) -> bool:
        """The holder is gone, and its pages with it. True if it was known."""
        self._hosts.pop(holder, None)
        if not self.feeds.remove(holder):
            return False
        for model, indexes in list(self._models.items()):
            index = indexes.pop(holder, None)
            if index is not None:
                self.num_pages -= len(index.pages)
            if not indexes:
                del self._models[model]
        self._reclaim_room()
        return True

    # --------------------------------------------------------------------------------------------------- questions

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
        self.feeds.check()

    def _open(self, holder: str, model: str) -> _Index:
        return self._models.setdefault(model, {}).setdefault(holder, _Index())

    def _index(self, holder: str, model: str) -> _Index | None:
        return self._models.get(model, {}).get(holder)

    def _all(self) -> Iterator[_Index]:
        for indexes in self._models.values():
            yield from indexes.values()

    # ---------------------------------------------------------------------------------------------------------- pages

    def _change(self, index: _Index, events: BlockEvents) -> None:
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
        for model, indexes in self._models.items():
            for holder, index in indexes.items():
                if index.truncated:
                    self.feeds.doubt(holder, model)
