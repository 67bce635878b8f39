"""The global prompt trees of a Job Executor: which TE holds how much of a prompt. Pure; the clock is passed in.

There is one tree per TE type of a model (the paper, section 5.2). Page hashes are chained, so a hash names a path from
the root, and a tree needs no nodes: `PromptTree` is one table, page hash -> bit mask of the TEs that hold the page. A
match walks the pages of a prompt once, whatever the number of TEs: what is left of the mask are those that held every
page so far.

A TE that was given a prompt will hold its pages, and the next prompt must not wait for its block events to know. That
is *assumed*, and ends by itself. What is assumed of a TE are whole chains, so a second table needs but few marks of
each, ever sparser with their depth (`_MARKS`).

This is soft state: what a TE really has it decides itself, so a stale answer costs a little time and no correctness.
Memory is bounded. The table is in the order of use, the tail of each chain before its root, and past the budget it
loses its oldest pages. A TE that goes, or that tells its whole index anew, only retires its bit; the pages are cleared
of it little by little, as others change the tree.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from math import inf
from typing import Final

from shared.block_feed import BlockFeeds
from shared.rtc_messages import BlockEvents, BlocksDump

PAGE_BYTES: Final = (
    200  # a dict slot at its worst load, a 16-byte hash of its own, a place in a sweep
)
_MARK_BYTES: Final = 160  # beyond those of a page: a second dict slot, and a place among `_ends`
_DEVICE: Final = "device"  # the tier a TE computes from; what is elsewhere it would have to fetch
_DIGIT_BITS: Final = 30  # of an int, in 4 bytes each
_ASSUMED_SHARE: Final = 8  # of the budget, one in so many bytes may be for assumptions
_PRESSED: Final = 0.75  # of the budget: from here on a use renews a page
_PART: Final = 4096  # pages between two looks at the budget
_BATCH: Final = 64  # of the pages, one in so many is given up at a time
_SWEEP: Final = 1024  # pages cleared of retired bits with each change, at least


def _marks(max_pages: int) -> list[int]:
    """Numbers of pages at which a chain is marked: each up to 16, each second up to 32, each fourth up to 64, ..."""
    marks, step = list(range(1, 17)), 2
    while marks[-1] < max_pages:
        marks += range(marks[-1] + step, 2 * marks[-1] + 1, step)
        step *= 2
    return marks


_MARKS: Final = _marks(1 << 20)


@dataclass(slots=True)
class _Member:
    """A TE's place in the masks, and until when which marks of it are assumed."""

    slot: int
    assumed: dict[bytes, float] = field(default_factory=dict)

    @property
    def bit(self) -> int:
        return 1 << self.slot


class PromptTree:
    """Page hash -> the TEs of one type that hold the page. `max_bytes` bounds it at any moment."""

    def __init__(self, *, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_evicted = 0
        self._pages: dict[bytes, int] = {}  # hash -> bits of the TEs; the oldest in use first
        self._tes: dict[str, _Member] = {}
        self._names: list[str] = []  # by slot
        self._live = 0  # the bits of those in `_tes`
        self._free: list[int] = []  # slots, a heap: masks stay short
        self._retired = 0  # bits that the next sweep clears
        self._sweeping = 0  # bits that this one clears
        self._unswept: list[bytes] = []
        self._page_bytes = PAGE_BYTES
        self._assumed: dict[bytes, int] = {}  # hash of a mark -> bits of the TEs
        self._ends: list[tuple[float, int, str, list[bytes]]] = []  # of assumptions, a heap
        self._num_assumptions = 0
        self._num_marks = 0  # in `_ends`

    @property
    def num_pages(self) -> int:
        """Pages that some TE holds, or held until lately."""
        return len(self._pages)

    @property
    def num_tes(self) -> int:
        """TEs that hold a page, or may."""
        return len(self._tes)

    @property
    def num_bytes(self) -> int:
        """What the tree costs by its own account, every mask taken for an object of its own."""
        return len(self._pages) * self._page_bytes + self.num_assumed_bytes

    @property
    def num_assumed_bytes(self) -> int:
        """The part of it that is for assumptions."""
        return self._num_marks * (self._page_bytes + _MARK_BYTES)

    # ------------------------------------------------------------------------------------------------------ changes

    def stored(self, te: str, hashes: Sequence[bytes]) -> None:
        """`te` has these pages now; a chain comes root first."""
        bit, pages = self._join(te).bit, self._pages
        for stop in range(len(hashes), 0, -_PART):
            part = hashes[max(0, stop - _PART) : stop]
            before, after = 0, bit
            for page in reversed(part):
                mask = pages.get(page, 0)
                if not mask & bit:
                    if mask is not before:  # pages with one history share their mask
                        before, after = mask, mask | bit
                    pages[page] = after
            self._changed(len(part))

    def removed(self, te: str, hashes: Sequence[bytes]) -> None:
        """`te` has these pages no more."""
        if te in self._tes:
            _clear(self._pages, hashes, self._retired | self._sweeping | self._tes[te].bit)
            self._changed(len(hashes))

    def replace(self, te: str, hashes: Sequence[bytes]) -> None:
        """`te` has these pages and no others. What is assumed of it stays assumed."""
        before = self._tes.get(te)
        self.forget(te)
        self.stored(te, hashes)
        if before is not None:
            member = self._tes[te]
            member.assumed = before.assumed
            for mark in member.assumed:
                self._assumed[mark] = self._assumed.get(mark, 0) | member.bit

    def forget(self, te: str) -> None:
        """`te` is gone, and its pages with it."""
        member = self._tes.pop(te, None)
        if member is not None:
            _clear(self._assumed, member.assumed, member.bit)
            self._live &= ~member.bit
            self._retired |= member.bit
            self._changed(0)

    def assume(
        self,
        te: str,
        hashes: Sequence[bytes],
        now: float,
        for_s: float,
        *,
        num_bytes_elsewhere: int = 0,
    ) -> None:
        """`te` was given a prompt of these pages, root first: for `for_s` it counts as their holder, whatever it says.

        Once too much is assumed already, here and in other trees that share the budget, nothing more is.
        """
        self.expire(now)
        member, until = self._join(te), now + for_s
        if self.num_bytes > _PRESSED * self.max_bytes:
            self._renew(hashes)
        marks = [
            hashes[num - 1]
            for num in _MARKS[: bisect_right(_MARKS, len(hashes))]
            if member.assumed.get(hashes[num - 1], now) < until
        ]
        room = self.max_bytes // _ASSUMED_SHARE - self.num_assumed_bytes - num_bytes_elsewhere
        if marks and len(marks) * (self._page_bytes + _MARK_BYTES) <= room:
            for mark in marks:
                self._assumed[mark] = self._assumed.get(mark, 0) | member.bit
                member.assumed[mark] = until
            self._num_assumptions += 1
            self._num_marks += len(marks)
            heapq.heappush(self._ends, (until, self._num_assumptions, te, marks))
        self._changed(0)

    def expire(self, now: float) -> None:
        """Ends the assumptions whose time has come."""
        while self._ends and self._ends[0][0] <= now:
            _, _, te, marks = heapq.heappop(self._ends)
            self._num_marks -= len(marks)
            member = self._tes.get(te)
            if member is not None:
                ended = [mark for mark in marks if member.assumed.get(mark, inf) <= now]
                for mark in ended:
                    del member.assumed[mark]
                _clear(self._assumed, ended, member.bit)

    def evict(self, num_bytes: int) -> None:
        """Gives up the oldest pages, and at least so many bytes of them."""
        pages = self._pages
        num = min(len(pages), -(-num_bytes // self._page_bytes) + len(pages) // _BATCH)
        for page in list(islice(pages, num)):
            del pages[page]
        self.num_evicted += num

    # ----------------------------------------------------------------------------------------------------- questions

    def match(self, hashes: Sequence[bytes], now: float) -> dict[str, int]:
        """TE -> how many of the first pages it holds or is assumed to, without those that hold none.

        Linear in pages: a chain may be broken in the middle (blocks are evicted one by one), so nothing shorter than a
        walk is exact. Of what is assumed, the answer may fall short by one in eight.
        """
        held: dict[str, int] = {}
        left, last, num = self._live, 0, 0
        for mask in map(self._pages.get, hashes):
            if mask is not last:
                if mask is None:
                    break
                here = left & mask
                if here != left:
                    if num:
                        self._tell(left ^ here, num, held)
                    left = here
                    if not left:
                        break
                last = mask
            num += 1
        if num:
            self._tell(left, num, held)
        self.expire(now)
        if self._assumed and hashes:
            self._match_assumed(hashes, held)
        return held

    def _match_assumed(self, hashes: Sequence[bytes], held: dict[str, int]) -> None:
        left, num = self._live, 0
        for mark in _MARKS[: bisect_right(_MARKS, len(hashes))]:
            here = left & self._assumed.get(hashes[mark - 1], 0)
            if here != left:
                if num:
                    self._tell(left ^ here, num, held)
                left = here
                if not left:
                    return
            num = mark
        self._tell(left, num, held)

    def _tell(self, bits: int, num_pages: int, held: dict[str, int]) -> None:
        for slot in _bits(bits):
            te = self._names[slot]
            if held.get(te, 0) < num_pages:
                held[te] = num_pages

    def check(self) -> None:
        """Raises AssertionError if the account does not balance or a bound is passed. For tests and `status`."""
        slots = [member.slot for member in self._tes.values()]
        away = self._retired | self._sweeping
        assert self._live == sum(1 << slot for slot in slots)
        assert not self._live & away
        assert not self._retired & self._sweeping
        assert sorted([*slots, *self._free, *_bits(away)]) == list(range(len(self._names)))
        assert all(self._names[member.slot] == te for te, member in self._tes.items())
        assert all(mask and not mask & ~(self._live | away) for mask in self._pages.values())
        assumed: dict[bytes, int] = {}
        for member in self._tes.values():
            for mark in member.assumed:
                assumed[mark] = assumed.get(mark, 0) | member.bit
        assert assumed == self._assumed
        assert self._num_marks == sum(len(marks) for *_, marks in self._ends)
        ending = {(te, mark) for _, _, te, marks in self._ends for mark in marks}
        assert ending >= {(te, mark) for te, of in self._tes.items() for mark in of.assumed}
        assert self.num_bytes <= self.max_bytes

    # ------------------------------------------------------------------------------------------------------- the rest

    def _join(self, te: str) -> _Member:
        member = self._tes.get(te)
        if member is None:
            if not self._free:
                self._free.append(len(self._names))
                self._names.append("")
                digits = -(-len(self._names) // _DIGIT_BITS)
                self._page_bytes = PAGE_BYTES + (24 + 4 * digits + 15) // 16 * 16
            member = self._tes[te] = _Member(heapq.heappop(self._free))
            self._names[member.slot] = te
            self._live |= member.bit
            self._changed(0)
        return member

    def _renew(self, hashes: Sequence[bytes]) -> None:
        """A prompt is in use: its pages go last, and its tail before its root."""
        pages = self._pages
        for page in reversed(hashes):
            mask = pages.pop(page, None)
            if mask is not None:
                pages[page] = mask

    def _changed(self, num_pages: int) -> None:
        """After a change of so many pages: a part of the sweep, and the budget."""
        if self._retired or self._sweeping:
            self._sweep(_SWEEP + 4 * num_pages)
        excess = self.num_bytes - self.max_bytes
        if excess > 0:
            self.evict(excess)

    def _sweep(self, num_pages: int) -> None:
        """Clears the next pages of retired bits; a slot is free again when no page has its bit any more."""
        if not self._sweeping:
            self._sweeping, self._retired = self._retired, 0
            self._unswept = list(self._pages)
        _clear(self._pages, self._unswept[-num_pages:], self._sweeping)
        del self._unswept[-num_pages:]
        if not self._unswept:
            for slot in _bits(self._sweeping):
                heapq.heappush(self._free, slot)
            self._sweeping = 0


class PromptTrees:
    """The trees of all models and TE types, fed by numbered block events. `max_bytes` is the budget of all together.

    A TE is known from `seen` until `gone`; of others nothing is taken in.
    """

    def __init__(self, *, max_bytes: int = 256 * 1024 * 1024) -> None:
        self.max_bytes = max_bytes
        self.feeds = BlockFeeds()
        self._trees: dict[tuple[str, str], PromptTree] = {}  # (model, role) -> its tree
        self._groups: dict[str, tuple[str, str]] = {}  # TE -> (model, role)

    @property
    def num_pages(self) -> int:
        """Of all trees. Like the next one for the thread of the metrics port as well: it copies, then counts."""
        return sum(tree.num_pages for tree in list(self._trees.values()))

    @property
    def num_bytes(self) -> int:
        """What the trees cost by their own account; events that wait are bounded apart."""
        return sum(tree.num_bytes for tree in list(self._trees.values()))

    @property
    def num_evicted(self) -> int:
        """Pages given up for the budget, in the trees that there are."""
        return sum(tree.num_evicted for tree in list(self._trees.values()))

    # ------------------------------------------------------------------------------------------------------ changes

    def seen(self, te: str, model: str, role: str) -> None:
        """A TE beats. One not known yet may hold anything: it is unsynced. In another role it is another TE."""
        group = self._groups.get(te)
        if group == (model, role):
            return
        if group is not None:
            self.gone(te)
        self._groups[te] = (model, role)
        self._trees.setdefault((model, role), PromptTree(max_bytes=self.max_bytes))
        self.feeds.seen(te, model)

    def gone(self, te: str) -> bool:
        """The TE is dead, or has left. True if it was known."""
        group = self._groups.pop(te, None)
        if group is None:
            return False
        self.feeds.remove(te)
        if group in self._groups.values():
            self._trees[group].forget(te)
        else:
            del self._trees[group]
        return True

    def apply(self, events: BlockEvents) -> None:
        """Takes in an event: at once if it is next, later if it is early, never if it is old."""
        tree = self._tree(events.te, events.model)
        if tree is not None:
            for event in self.feeds.take(events):
                _change(tree, event)
            self._fit()

    def load(self, dump: BlocksDump) -> None:
        """Takes in a TE's whole index. One older than what was applied already says nothing new."""
        tree = self._tree(dump.te, dump.model)
        if tree is None or (later := self.feeds.load(dump)) is None:
            return
        tree.replace(dump.te, dump.hashes if dump.tier == _DEVICE else [])
        for event in later:
            _change(tree, event)
        self._fit()

    def doubt(self) -> None:
        """Events may have been lost unseen (the bus was away): ask everybody again."""
        self.feeds.doubt()

    def assume(self, te: str, hashes: Sequence[bytes], now: float, for_s: float) -> None:
        """`te` was given a prompt of these pages, root first: for `for_s` it counts as their holder."""
        group = self._groups.get(te)
        if group is not None:
            elsewhere = 0
            for other, tree in self._trees.items():
                if other != group:
                    tree.expire(now)
                    elsewhere += tree.num_assumed_bytes
            self._trees[group].assume(te, hashes, now, for_s, num_bytes_elsewhere=elsewhere)
            self._fit()

    # ----------------------------------------------------------------------------------------------------- questions

    def unsynced(self) -> list[tuple[str, str]]:
        """(TE, model) of the indexes that are to be asked for."""
        return self.feeds.unsynced()

    def match(self, model: str, role: str, hashes: Sequence[bytes], now: float) -> dict[str, int]:
        """TE of that role -> how many of the first pages it holds, without those that hold none."""
        tree = self._trees.get((model, role))
        return {} if tree is None else tree.match(hashes, now)

    def status(self) -> list[dict[str, object]]:
        """For people: the size of each tree."""
        return [
            {
                "model": model,
                "role": role,
                "tes": tree.num_tes,
                "pages": tree.num_pages,
                "bytes": tree.num_bytes,
                "evicted": tree.num_evicted,
            }
            for (model, role), tree in self._trees.items()
        ]

    def check(self) -> None:
        """Raises AssertionError if an account does not balance or a bound is passed. For tests and `status`."""
        self.feeds.check()
        assert set(self._groups.values()) == set(self._trees)
        assert self.num_bytes <= self.max_bytes
        for tree in self._trees.values():
            tree.check()

    def _tree(self, te: str, model: str) -> PromptTree | None:
        group = self._groups.get(te)
        return None if group is None or group[0] != model else self._trees[group]

    def _fit(self) -> None:
        """Past the budget of all, the tree with the most pages gives some up; what is assumed is but a part of it."""
        if len(self._trees) > 1:
            while (excess := self.num_bytes - self.max_bytes) > 0 and self.num_pages:
                max(self._trees.values(), key=lambda tree: tree.num_pages).evict(excess)


def _change(tree: PromptTree, event: BlockEvents) -> None:
    if event.tier == _DEVICE:
        tree.removed(event.te, event.removed)
        tree.stored(event.te, event.stored)


def _clear(table: dict[bytes, int], hashes: Iterable[bytes], bits: int) -> None:
    """Takes `bits` out of the masks of these pages; those without any left go."""
    before = after = 0
    for page in hashes:
        mask = table.get(page, 0)
        if mask & bits:
            if mask is not before:  # pages with one history share their mask
                before, after = mask, mask & ~bits
            if after:
                table[page] = after
            else:
                del table[page]


def _bits(mask: int) -> list[int]:
    """The places of the ones in a mask, lowest first."""
    places = []
    while mask:
        lowest = mask & -mask
        places.append(lowest.bit_length() - 1)
        mask ^= lowest
    return places
