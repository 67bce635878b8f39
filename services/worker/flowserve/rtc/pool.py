"""Blocks and the index over them: who holds which block, and which blocks hold which prefix.

Blocks are numbers. The pool knows nothing of tensors, tokens, time or sequences, and never hashes: it is handed chained
page hashes (`shared/blockhash.py`), where an equal hash means an equal prefix up to and including that page, so that a
flat table is the radix tree of the paper (arXiv 2501.14417, section 3.2). What moves, is leased or kept is the
business of `RtcMaster`; here it is a hold like any other.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from typing import cast

NONE = -1


class BlockPool:
    """`num_blocks` blocks: each is held (by block tables or otherwise), cached (indexed, not held), or free.

    Invariants, which `check` proves:
    - `_tables[b]` counts the block tables that contain b, and a table contains b once. `_refs[b]` counts those, all
      other holds on it, and the held pages that build on it.
    - So whoever holds a page holds all pages before it, and what is cached is whole branches. Only their leaves are in
      the LRU order, and eviction takes them from there: no page is in the index without the pages before it.
    - Only full pages are indexed. A hash names one block. Two sequences that compute the same page at the same time
      leave two blocks with equal content: block tables are append-only, so the second is not exchanged for the first;
      it stays out of the index (the first one wins) and is free as soon as it is not held.

    Every call costs O(blocks named in it), never O(pool); `check` is the exception.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._refs = [0] * num_blocks
        self._tables = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._parents = [NONE] * num_blocks  # the block of the page before, of an indexed page
        self._children = [0] * num_blocks  # indexed pages that build on it
        self._index: dict[bytes, int] = {}
        self._leaves: OrderedDict[int, None] = OrderedDict()  # cached, least recently used first
        self._used = [0] * num_blocks  # when it was held last, in calls of `free`
        self._now = 0
        self._num_cached = 0
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack
        self._num_live = 0  # blocks in tables
        self._moving: set[int] = set()  # blocks whose bytes are on their way, in or out
        self._num_moving = 0  # of those in no table
        self._stored: dict[bytes, None] = {}  # ordered sets, emptied by `drain_events`
        self._removed: dict[bytes, None] = {}

    # ------------------------------------------------------------------------------------------ taking and giving

    @property
    def num_available(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free) + self._num_cached

    def match_by_prefix_token(self, hashes: Sequence[bytes]) -> list[int]:
        """The blocks of the longest indexed prefix of this chain, with a reference taken on each.

        `hashes` begin with a chain's first page. At least one token of a sequence has to be computed to get logits, so
        a caller leaves out the page that holds its last token.
        """
        refs, tables = self._refs, self._tables
        found = list(map(self._index.get, hashes))
        if None in found:
            del found[found.index(None) :]
        blocks = cast("list[int]", found)
        num_held = 0
        for block in blocks:
            if not refs[block]:
                break
            num_held += 1
            refs[block] += 1
            tables[block] += 1
            if tables[block] == 1:
                self._num_live += 1
                if block in self._moving:
                    self._num_moving -= 1
        # Of the others nobody holds what builds on them either.
        cached = blocks[num_held:] if num_held else blocks
        if cached:
            for block in cached:
                refs[block] = 2  # the table, and the next page
                tables[block] = 1
            last = cached[-1]
            refs[last] = 1
            if not self._children[last]:
                del self._leaves[last]
            if num_held:
                refs[blocks[num_held - 1]] += 1
            self._num_cached -= len(cached)
            self._num_live += len(cached)
        return blocks

    def num_present(self, hashes: Sequence[bytes]) -> int:
        """Length of the longest indexed prefix of this chain; takes nothing."""
        index = self._index
        for number, page_hash in enumerate(hashes):
            if page_hash not in index:
                return number
        return len(hashes)

    def alloc_blocks(self, num_blocks: int, *, firm: bool = False) -> list[int] | None:
        """`num_blocks` blocks with one reference each, or None: all or nothing. Evicts the least recently used.

        `firm`: promises give way where there is no other room.
        """
        if num_blocks > self.num_available:
            self._make_room(num_blocks, firm)
            if num_blocks > self.num_available:
                return None
        blocks = [self._take() for _ in range(num_blocks)]
        for block in blocks:
            self._refs[block] = self._tables[block] = 1
        self._num_live += num_blocks
        return blocks

    def append_block(self, table: list[int], *, firm: bool = False) -> bool:
        """Grow a block table by one block; False if there is none."""
        blocks = self.alloc_blocks(1, firm=firm)
        if blocks is None:
            return False
        table += blocks
        return True

    def free(self, table: Sequence[int]) -> None:
        """Give back one reference on each block of a table."""
        refs, tables = self._refs, self._tables
        self._now += 1
        for block in reversed(table):
            tables[block] -= 1
            if not tables[block]:
                self._num_live -= 1
                if block in self._moving:
                    self._num_moving += 1
            refs[block] -= 1
            if not refs[block]:
                self._let_go(block)

    def _make_room(self, num_blocks: int, firm: bool) -> None:
        """Give up promises until `num_blocks` are available; there are none in here."""

    def _take(self) -> int:
        """A block that nobody holds, out of the index. There must be one."""
        if self._free:
            return self._free.pop()
        block, _ = self._leaves.popitem(last=False)
        self._num_cached -= 1
        self._unindex(block)
        return block

    def _hold(self, block: int) -> None:
        """One more hold on an indexed page, and so on all pages before it."""
        refs = self._refs
        refs[block] += 1
        while refs[block] == 1:
            self._num_cached -= 1
            if not self._children[block]:
                del self._leaves[block]
            block = self._parents[block]
            if block < 0:
                return
            refs[block] += 1

    def _release(self, block: int) -> None:
        """Give back a hold."""
        self._refs[block] -= 1
        if not self._refs[block]:
            self._let_go(block)

    def _let_go(self, block: int) -> None:
        """Nobody holds this block any more. Then it does not hold the page before it either."""
        refs = self._refs
        while True:
            if self._hashes[block] is None:
                self._free.append(block)
                return
            self._num_cached += 1
            self._used[block] = self._now
            if not self._children[block]:
                self._leaves[block] = None
            block = self._parents[block]
            if block < 0:
                return
            refs[block] -= 1
            if refs[block]:
                return

    # ----------------------------------------------------------------------------------------------------- index

    def store(self, block: int, page_hash: bytes, before: bytes | None) -> None:
        """Index a held block whose page is full and computed, behind the page `before` (None: it is a chain's first).

        The first block of a hash wins. Where the page before is not in the index, nobody could find this one, and it
        stays out.
        """
        if page_hash in self._index or self._hashes[block] is not None:
            return
        parent = NONE
        if before is not None:
            found = self._index.get(before)
            if found is None:
                return
            parent = found
            self._hold(parent)
            self._children[parent] += 1
        self._parents[block] = parent
        self._index[page_hash] = block
        self._hashes[block] = page_hash
        self._stored[page_hash] = None

    def forget(self, page_hash: bytes) -> None:
        """Take a page out of the index, unless others build on it; unknown hashes are ignored."""
        block = self._index.get(page_hash)
        if block is None or self._children[block]:
            return
        parent = self._parents[block]
        if not self._refs[block]:
            del self._leaves[block]
            self._num_cached -= 1
            self._unindex(block)
            self._free.append(block)
            return
        self._unindex(block)
        if parent >= 0:
            self._release(parent)

    def _unindex(self, block: int) -> None:
        page_hash = self._hashes[block]
        assert page_hash is not None
        parent = self._parents[block]
        if parent >= 0:
            self._parents[block] = NONE
            self._children[parent] -= 1
            if not self._children[parent] and not self._refs[parent]:
                # A leaf now. Used no earlier than this one; if later, by who knows whom: it gets another round.
                self._leaves[parent] = None
                if self._used[parent] == self._used[block]:
                    self._leaves.move_to_end(parent, last=False)
        self._hashes[block] = None
        del self._index[page_hash]
        # A page that came and went between two events was never announced; do not announce its end either.
        if page_hash in self._stored:
            del self._stored[page_hash]
        else:
            self._removed[page_hash] = None

    def drain_events(self) -> tuple[list[bytes], list[bytes]]:
        """What changed in the index since the last call: (stored, removed). Apply removed before stored."""
        if not self._stored and not self._removed:
            return [], []
        stored, removed = list(self._stored), list(self._removed)
        self._stored.clear()
        self._removed.clear()
        return stored, removed

    def index_snapshot(self) -> list[bytes]:
        """Every hash in the index."""
        return list(self._index)

    # ---------------------------------------------------------------------------------------------------- ledger

    def ledger(self) -> dict[str, int]:
        """Counts of blocks by state; total = live + cached + leased + moving + free.

        Live blocks are in tables. Of the others, moving ones have their bytes on the way in or out, and leased ones are
        held for whoever has a lease, a ticket or a named cache, or for a page that is held.
        """
        cached, free = self._num_cached, len(self._free)
        live, moving = self._num_live, self._num_moving
        return {
            "total": self.num_blocks,
            "live": live,
            "cached": cached,
            "leased": self.num_blocks - live - cached - moving - free,
            "moving": moving,
            "free": free,
        }

    def check(self, tables: Iterable[Sequence[int]], holds: Iterable[int] = ()) -> None:
        """Prove the invariants against all block tables in use, and all other holds. Raises AssertionError naming what
        is off."""
        tabled = Counter(block for table in tables for block in table)
        if any(tabled[block] != count for block, count in enumerate(self._tables)):
            raise AssertionError(f"the tables hold {dict(tabled)}, not {self._tables}")
        held, children = tabled + Counter(holds), Counter[int]()
        for page_hash, block in self._index.items():
            parent = self._parents[block]
            if self._hashes[block] != page_hash:
                raise AssertionError("index and blocks disagree on hashes")
            if parent >= 0:
                children[parent] += 1
                held[parent] += self._refs[block] > 0
                if self._hashes[parent] is None:
                    raise AssertionError(f"block {block} is indexed, the page before it is not")
        for block, refs in enumerate(self._refs):
            if held[block] != refs or children[block] != self._children[block]:
                raise AssertionError(f"block {block}: {refs} references, but {held[block]} holders")
        free = set(self._free)
        if len(free) != len(self._free):
            raise AssertionError("a block is free twice")
        idle = {block for block, refs in enumerate(self._refs) if not refs}
        indexed = set(self._index.values())
        if not len(indexed) == len(self._index) == self.num_blocks - self._hashes.count(None):
            raise AssertionError("index and blocks disagree on hashes")
        if free != idle - indexed or len(idle & indexed) != self._num_cached:
            raise AssertionError("who is not held is cached if indexed, and free if not")
        if set(self._leaves) != {block for block in idle & indexed if not children[block]}:
            raise AssertionError("the cached leaves are in the LRU order, and only they")
        live = {block for block, count in enumerate(self._tables) if count}
        if (len(live), len(self._moving - live)) != (self._num_live, self._num_moving):
            raise AssertionError(f"live and moving are miscounted: {self.ledger()}")
