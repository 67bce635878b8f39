"""The paged KV cache as a ledger: who holds which block, and which blocks hold which prefix.

Blocks are numbers. The pool knows nothing of tensors, tokens or sequences, and never hashes: it is handed chained page
hashes (`shared/blockhash.py`), where an equal hash means an equal prefix up to and including that page. The calls that
the paper's Relational Tensor Cache has (arXiv 2501.14417) keep their names, in snake case.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence


class BlockPool:
    """`num_blocks` blocks, each in exactly one state: live (referenced), cached (indexed, unreferenced), or free.

    Invariants, which `check` proves:
    - live + cached + free = total. `_refs[b]` counts the block tables that contain b, and a table contains b once.
    - Only full pages are indexed. A hash names one block. Two sequences that compute the same page at the same time
      leave two blocks with equal content: block tables are append-only, so the second is not exchanged for the first;
      it stays out of the index (the first one wins) and is free as soon as it is unreferenced.
    - A cached block's predecessors in its chain are evicted no sooner than itself: `free` puts the tail of a table into
      the LRU order first, so eviction takes leaves before the trunks that other prefixes share.

    Every call costs O(blocks named in it), never O(pool); `check` is the exception.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._refs = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._index: dict[bytes, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack
        self._stored: dict[bytes, None] = {}  # ordered sets, emptied by `drain_events`
        self._removed: dict[bytes, None] = {}

    # ------------------------------------------------------------------------------------------ taking and giving

    @property
    def num_available(self) -> int:
        """Blocks that `alloc_blocks` could hand out now, by eviction where needed."""
        return len(self._free) + len(self._cached)

    def match_by_prefix_token(self, hashes: Sequence[bytes]) -> list[int]:
        """The blocks of the longest indexed prefix of this chain, with a reference taken on each.

        At least one token of a sequence has to be computed to get logits, so a caller leaves out the page that holds
        its last token.
        """
        blocks = []
        for page_hash in hashes:
            block = self._index.get(page_hash)
            if block is None:
                break
            if self._refs[block] == 0:
                del self._cached[block]
            self._refs[block] += 1
            blocks.append(block)
        return blocks

    def alloc_blocks(self, num_blocks: int) -> list[int] | None:
        """`num_blocks` blocks with one reference each, or None: all or nothing. Evicts the least recently used."""
        if num_blocks > self.num_available:
            return None
        blocks = []
        for _ in range(num_blocks):
            if self._free:
                block = self._free.pop()
            else:
                block, _ = self._cached.popitem(last=False)
                self._unindex(block)
            self._refs[block] = 1
            blocks.append(block)
        return blocks

    def append_block(self, table: list[int]) -> bool:
        """Grow a block table by one block; False if there is none."""
        blocks = self.alloc_blocks(1)
        if blocks is None:
            return False
        table += blocks
        return True

    def free(self, table: Sequence[int]) -> None:
        """Give back one reference on each block of a table: leaves first, see the class."""
        for block in reversed(table):
            self._refs[block] -= 1
            if self._refs[block] == 0:
                if self._hashes[block] is None:
                    self._free.append(block)
                else:
                    self._cached[block] = None

    # ----------------------------------------------------------------------------------------------------- index

    def store(self, block: int, page_hash: bytes) -> None:
        """Index a referenced block whose page is full and computed; the first block of a hash wins."""
        if page_hash in self._index or self._hashes[block] is not None:
            return
        self._index[page_hash] = block
        self._hashes[block] = page_hash
        self._stored[page_hash] = None

    def forget(self, page_hash: bytes) -> None:
        """Take a page out of the index; unknown hashes are ignored."""
        block = self._index.get(page_hash)
        if block is None:
            return
        self._unindex(block)
        if self._refs[block] == 0:
            del self._cached[block]
            self._free.append(block)

    def _unindex(self, block: int) -> None:
        page_hash = self._hashes[block]
        assert page_hash is not None
        self._hashes[block] = None
        del self._index[page_hash]
        # A page that came and went between two events was never announced; do not announce its end either.
        if page_hash in self._stored:
            del self._stored[page_hash]
        else:
            self._removed[page_hash] = None

    def drain_events(self) -> tuple[list[bytes], list[bytes]]:
        """What changed in the index since the last call: (stored, removed). Apply removed before stored."""
        stored, removed = list(self._stored), list(self._removed)
        self._stored.clear()
        self._removed.clear()
        return stored, removed

    def index_snapshot(self) -> list[bytes]:
        """Every hash in the index."""
        return list(self._index)

    # ---------------------------------------------------------------------------------------------------- ledger

    def ledger(self) -> dict[str, int]:
        """Counts of blocks by state; total = live + cached + free."""
        cached, free = len(self._cached), len(self._free)
        live = self.num_blocks - cached - free
        return {"total": self.num_blocks, "live": live, "cached": cached, "free": free}

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Prove the invariants against all block tables in use. Raises AssertionError naming what is off."""
        held = Counter(block for table in tables for block in table)
        for block, refs in enumerate(self._refs):
            if held[block] != refs:
                raise AssertionError(f"block {block}: {refs} references, in {held[block]} tables")
        free, cached = set(self._free), set(self._cached)
        live = {block for block, refs in enumerate(self._refs) if refs}
        if len(free) != len(self._free):
            raise AssertionError("a block is free twice")
        if free & cached or free & live or cached & live:
            raise AssertionError("a block has two states")
        if len(free) + len(cached) + len(live) != self.num_blocks:
            raise AssertionError(f"{self.num_blocks} blocks, but {self.ledger()}")
        indexed = {block: page_hash for page_hash, block in self._index.items()}
        if indexed != {block: h for block, h in enumerate(self._hashes) if h is not None}:
            raise AssertionError("index and blocks disagree on hashes")
        if not cached <= indexed.keys() or free & indexed.keys():
            raise AssertionError("cached blocks are indexed, free ones are not")
