"""The block pool: references, prefix index, eviction, and its ledger."""

from __future__ import annotations

import pytest

from services.worker.flowserve.rtc.pool import BlockPool


def chain(path: str) -> list[bytes]:
    """The pages of a path: "ab" are the pages a, and b behind a."""
    return [path[: end + 1].encode() for end in range(len(path))]


def stored_table(pool: BlockPool, path: str) -> list[int]:
    """A referenced table whose pages are computed and offered to the index as this path."""
    table = pool.alloc_blocks(len(path))
    assert table is not None
    before = None
    for block, page_hash in zip(table, chain(path), strict=True):
        pool.store(block, page_hash, before)
        before = page_hash
    return table


def ledger(pool: BlockPool) -> tuple[int, int, int]:
    counts = pool.ledger()
    assert counts["leased"] == counts["moving"] == 0
    assert counts["total"] == counts["live"] + counts["cached"] + counts["free"]
    return counts["live"], counts["cached"], counts["free"]


def test_allocation_is_all_or_nothing() -> None:
    """A pool that cannot give all blocks asked for gives none and changes nothing."""
    pool = BlockPool(4)
    table = pool.alloc_blocks(3)
    assert table is not None
    assert len(set(table)) == 3
    assert pool.alloc_blocks(2) is None
    assert ledger(pool) == (3, 0, 1)
    assert pool.append_block(table)
    assert not pool.append_block(table)
    pool.check([table])


def test_a_match_shares_blocks_until_the_last_reference_goes() -> None:
    """Two tables may hold one block; it is cached only when both have given it back."""
    pool = BlockPool(4)
    first = stored_table(pool, "ab")
    second = pool.match_by_prefix_token(chain("abc"))
    assert second == first
    pool.free(first)
    assert ledger(pool) == (2, 0, 2)
    pool.check([second])
    pool.free(second)
    assert ledger(pool) == (0, 2, 2)
    pool.check([])


def test_a_match_ends_at_the_first_gap() -> None:
    """A page without the one before it is no part of a prefix, and is not even indexed."""
    pool = BlockPool(4)
    table = pool.alloc_blocks(2)
    assert table is not None
    pool.store(table[0], b"a", None)
    pool.store(table[1], b"abc", b"ab")
    assert pool.match_by_prefix_token(chain("abc")) == table[:1]
    assert pool.index_snapshot() == [b"a"]


def test_leaves_are_evicted_before_the_trunk() -> None:
    """A prefix outlives its continuations, the last pages of which go first."""
    pool = BlockPool(3)
    pool.free(stored_table(pool, "abc"))
    assert pool.alloc_blocks(2) is not None
    assert pool.index_snapshot() == [b"a"]


def test_the_least_recently_used_prefix_is_evicted_first() -> None:
    """A match renews a prefix."""
    pool = BlockPool(2)
    pool.free(stored_table(pool, "o"))
    pool.free(stored_table(pool, "n"))
    pool.free(pool.match_by_prefix_token([b"o"]))
    pool.alloc_blocks(1)
    assert pool.index_snapshot() == [b"o"]


def test_a_trunk_used_by_itself_outlives_what_was_used_since_its_branches() -> None:
    """When the last branch is evicted, a trunk that was in use after it is not next."""
    pool = BlockPool(3)
    pool.free(stored_table(pool, "tb"))
    pool.free(stored_table(pool, "x"))
    pool.free(pool.match_by_prefix_token([b"t"]))
    pool.alloc_blocks(2)
    assert pool.index_snapshot() == [b"t"]


def test_the_first_of_two_equal_pages_is_indexed() -> None:
    """A duplicate stays out of the index and is free, not cached, once unreferenced."""
    pool = BlockPool(4)
    first = stored_table(pool, "a")
    second = stored_table(pool, "a")
    assert pool.match_by_prefix_token([b"a"]) == first
    pool.free(second)
    assert ledger(pool) == (1, 0, 3)


def test_a_page_is_held_by_what_builds_on_it() -> None:
    """Who computed the same trunk too late holds the indexed one all the same, as long as its branch is in use."""
    pool = BlockPool(4)
    first = stored_table(pool, "t")
    second = stored_table(pool, "tb")
    pool.free(first)
    assert pool.num_available == 1
    pool.check([second])
    assert pool.alloc_blocks(2) is None
    pool.free(second)
    pool.check([])
    assert pool.match_by_prefix_token(chain("tb")) == [first[0], second[1]]


def test_a_forgotten_page_is_no_longer_found() -> None:
    """Forgetting frees a cached block, leaves a live one to its holder, and spares what others build on."""
    pool = BlockPool(4)
    live = stored_table(pool, "l")
    pool.free(stored_table(pool, "c"))
    pool.free(stored_table(pool, "tb"))
    for name in (b"l", b"c", b"t", b"unknown"):
        pool.forget(name)
    assert pool.index_snapshot() == chain("tb")
    assert ledger(pool) == (1, 2, 1)
    pool.check([live])


def test_events_tell_the_net_change() -> None:
    """Applying removed, then stored, keeps a copy of the index equal; what came and went is not announced."""
    pool = BlockPool(1)
    pool.free(stored_table(pool, "a"))
    assert pool.drain_events() == ([b"a"], [])
    pool.free(stored_table(pool, "b"))
    pool.free(stored_table(pool, "c"))
    assert pool.drain_events() == ([b"c"], [b"a"])
    assert pool.drain_events() == ([], [])


def test_an_imbalance_is_found() -> None:
    """The check fails when a table is missing or is held without a reference."""
    pool = BlockPool(2)
    table = pool.alloc_blocks(1)
    assert table is not None
    with pytest.raises(AssertionError, match="the tables hold"):
        pool.check([])
    with pytest.raises(AssertionError, match="the tables hold"):
        pool.check([table, table])
    with pytest.raises(AssertionError, match="1 references, but 2 holders"):
        pool.check([table], table)
