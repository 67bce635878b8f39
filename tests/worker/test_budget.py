"""What a host has room for, and what a TE takes of it."""

from __future__ import annotations

import os
from pathlib import Path

from services.worker.budget import Budget, Cost, default_bytes, memory_bytes, own_bytes

GIB = 1 << 30


def test_weights_are_paid_for_once_and_kv_by_each_te() -> None:
    """TEs of one model share their weights; another model's come on top."""
    costs = {"a": Cost(te_bytes=10, weights_bytes=100), "b": Cost(te_bytes=20, weights_bytes=50)}
    budget = Budget(max_tes=9, num_bytes=200, costs=costs)
    assert budget.taken({}) == budget.taken({"a": 0}) == 0
    assert budget.taken({"a": 3, "b": 1}) == 130 + 70
    assert budget.fits({"a": 2, "b": 1}, "a")
    assert not budget.fits({"a": 3, "b": 1}, "a")
    assert not Budget(4, 1000, costs).fits({"a": 3, "b": 1}, "a")


def test_what_is_always_to_be_up_fits_into_a_budget_that_nobody_set() -> None:
    """Four fifths of the memory, or what was asked for by name."""
    costs = {"a": Cost(te_bytes=GIB, weights_bytes=GIB), "b": Cost(0, 9 * GIB)}
    assert default_bytes(costs, {"a": 2}, 20 * GIB) == 16 * GIB
    assert default_bytes(costs, {"a": 20}, 20 * GIB) == 21 * GIB
    assert default_bytes(costs, {}, 2 * GIB) == 9 * GIB


def test_a_container_has_its_limit_and_a_machine_its_memory(tmp_path: Path) -> None:
    """The smaller of both, by either version of control groups; no limit is none."""
    machine = memory_bytes(tmp_path)
    assert machine == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    (tmp_path / "memory.max").write_text("max\n")
    assert memory_bytes(tmp_path) == machine
    (tmp_path / "memory.max").write_text("123456\n")
    assert memory_bytes(tmp_path) == 123456
    (tmp_path / "memory.max").unlink()
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text(f"{1 << 62}\n")
    assert memory_bytes(tmp_path) == machine


def test_what_a_te_takes_is_read_from_its_process() -> None:
    """This process has some memory of its own; one that is gone has none."""
    assert 1 << 20 < own_bytes(os.getpid(), 1 << 62) < 1 << 36
    assert own_bytes(2**22 + 1, 0) == 0
