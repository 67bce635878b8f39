"""The block pool: references, prefix index, eviction, and its ledger."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from services.worker.flowserve.blocks import BlockPool


def hashes(*names: str) -> list[bytes]:
    return [name.encode() for name in names]


def stored_table(pool: BlockPool, *names: str) -> list[int]:
    """A referenced table whose pages are indexed under these names."""
    table = pool.alloc_blocks(len(names))
    assert table is not None
    for block, name in zip(table, hashes(*names), strict=True):
        pool.store(block, name)
    return table


def test_allocation_is_all_or_nothing() -> None:
    """A pool that cannot give all blocks asked for gives none and changes nothing."""
    pool = BlockPool(4)
    table = pool.alloc_blocks(3)
    assert table is not None
    assert len(set(table)) == 3
    assert pool.alloc_blocks(2) is None
    assert pool.ledger() == {"total": 4, "live": 3, "cached": 0, "free": 1}
    assert pool.append_block(table)
    assert not pool.append_block(table)
    pool.check([table])


def test_a_match_shares_blocks_until_the_last_reference_goes() -> None:
    """Two tables may hold one block; it is cached only when both have given it back."""
    pool = BlockPool(4)
    first = stored_table(pool, "a", "b")
    second = pool.match_by_prefix_token(hashes("a", "b", "c"))
    assert second == first
    pool.free(first)
    assert pool.ledger()["live"] == 2
    pool.free(second)
    assert pool.ledger() == {"total": 4, "live": 0, "cached": 2, "free": 2}
    pool.check([])


def test_a_match_ends_at_the_first_gap() -> None:
    """A page whose predecessor is not indexed is not part of a prefix."""
    pool = BlockPool(4)
    stored_table(pool, "a", "c")
    assert len(pool.match_by_prefix_token(hashes("a", "b", "c"))) == 1


def test_leaves_are_evicted_before_the_trunk() -> None:
    """Freeing a table lets its last pages go first, so a shared prefix outlives its continuations."""
    pool = BlockPool(3)
    pool.free(stored_table(pool, "trunk", "branch", "leaf"))
    assert pool.alloc_blocks(2) is not None
    assert pool.index_snapshot() == hashes("trunk")


def test_the_least_recently_used_prefix_is_evicted_first() -> None:
    """A match renews a prefix."""
    pool = BlockPool(2)
    pool.free(stored_table(pool, "old"))
    pool.free(stored_table(pool, "new"))
    pool.free(pool.match_by_prefix_token(hashes("old")))
    pool.alloc_blocks(1)
    assert pool.index_snapshot() == hashes("old")


def test_the_first_of_two_equal_pages_is_indexed() -> None:
    """A duplicate stays out of the index and is free, not cached, once unreferenced."""
    pool = BlockPool(4)
    first = stored_table(pool, "a")
    second = stored_table(pool, "a")
    assert pool.match_by_prefix_token(hashes("a")) == first
    pool.free(second)
    assert pool.ledger() == {"total": 4, "live": 1, "cached": 0, "free": 3}


def test_a_forgotten_page_is_no_longer_found() -> None:
    """Forgetting frees a cached block, and leaves a live one to its holder."""
    pool = BlockPool(2)
    live = stored_table(pool, "live")
    pool.free(stored_table(pool, "cached"))
    for name in hashes("live", "cached", "unknown"):
        pool.forget(name)
    assert pool.index_snapshot() == []
    assert pool.ledger() == {"total": 2, "live": 1, "cached": 0, "free": 1}
    pool.check([live])


def test_events_tell_the_net_change() -> None:
    """Applying removed, then stored, keeps a copy of the index equal; what came and went is not announced."""
    pool = BlockPool(1)
    pool.free(stored_table(pool, "a"))
    assert pool.drain_events() == (hashes("a"), [])
    pool.free(stored_table(pool, "b"))
    pool.free(stored_table(pool, "c"))
    assert pool.drain_events() == (hashes("c"), hashes("a"))
    assert pool.drain_events() == ([], [])


def test_an_imbalance_is_found() -> None:
    """The check fails when a table is missing or is held without a reference."""
    pool = BlockPool(2)
    table = pool.alloc_blocks(1)
    assert table is not None
    with pytest.raises(AssertionError, match="1 references, in 0 tables"):
        pool.check([])
    with pytest.raises(AssertionError, match="in 2 tables"):
        pool.check([table, table])


class PoolMachine(RuleBasedStateMachine):
    """The pool against a naive model: a list of tables, and a set of hashes known to be indexed."""

    @initialize(num_blocks=st.integers(1, 8))
    def start(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks)
        self.tables: list[list[int]] = []
        self.index: set[bytes] = set()  # the copy a listener to events keeps

    @rule(count=st.integers(0, 9))
    def alloc(self, count: int) -> None:
        free = self.pool.num_blocks - len(self._live())
        blocks = self.pool.alloc_blocks(count)
        assert (blocks is None) == (count > free)
        if blocks is not None:
            assert not set(blocks) & self._live()
            self.tables.append(blocks)

    @rule(data=st.data())
    def append(self, data: st.DataObject) -> None:
        if self.tables:
            table = data.draw(st.sampled_from(self.tables))
            full = len(self._live()) == self.pool.num_blocks
            assert self.pool.append_block(table) is not full

    @rule(data=st.data(), name=st.sampled_from("abcdef"))
    def store(self, data: st.DataObject, name: str) -> None:
        if self.tables and (table := data.draw(st.sampled_from(self.tables))):
            self.pool.store(data.draw(st.sampled_from(table)), name.encode())

    @rule(names=st.lists(st.sampled_from("abcdef"), unique=True))
    def match(self, names: list[str]) -> None:
        blocks = self.pool.match_by_prefix_token(hashes(*names))
        known = set(self.pool.index_snapshot())
        wanted: Sequence[bytes] = hashes(*names)
        expected = next((i for i, h in enumerate(wanted) if h not in known), len(wanted))
        assert len(blocks) == len(set(blocks)) == expected
        self.tables.append(blocks)

    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        if self.tables:
            index = data.draw(st.integers(0, len(self.tables) - 1))
            self.pool.free(self.tables.pop(index))

    @rule(name=st.sampled_from("abcdef"))
    def forget(self, name: str) -> None:
        self.pool.forget(name.encode())
        assert name.encode() not in self.pool.index_snapshot()

    @rule()
    def drain(self) -> None:
        stored, removed = self.pool.drain_events()
        self.index -= set(removed)
        self.index |= set(stored)
        assert self.index == set(self.pool.index_snapshot())

    @invariant()
    def balanced(self) -> None:
        self.pool.check(self.tables)
        assert self.pool.ledger()["live"] == len(self._live())

    def _live(self) -> set[int]:
        return {block for table in self.tables for block in table}


PoolMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestPool = PoolMachine.TestCase
