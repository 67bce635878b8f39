"""The record of decisions."""

from __future__ import annotations

from services.cache.cost import Source, plan
from services.cache.decisions import RECORDS, Decisions


def test_a_decision_says_what_was_chosen_from_what() -> None:
    """The line names the runs, each offer with its price, and the price of computing."""
    decisions = Decisions()
    sources = [
        Source("arena", [True, False], 0, 1000),
        Source("remote:x", [False, True], 5000, 2000),
        Source("ssd", [False, False], 0, 1),
    ]
    made = plan(2, 20_000, sources)
    decision = decisions.add("te", "m", 2, sources, made, now=1.0)
    assert decision.why == (
        "#1 arena[0:1] remote:x[1:2]; arena 1 pages at 1.00 ms after 0.00 ms,"
        " remote:x 1 pages at 2.00 ms after 5.00 ms; to compute all: 40.0 ms"
    )
    nothing = decisions.add("te", "m", 2, [], plan(2, 20_000, []), now=2.0)
    assert "compute; nobody has them" in nothing.why
    (newest, oldest) = decisions.latest(5, now=3.0)
    assert (newest["why"], newest["age_s"]) == (nothing.why, 1.0)
    assert (oldest["predicted_ms"], oldest["outcome"]) == (8.0, "pending")


def test_only_the_latest_are_kept() -> None:
    """The record is bounded, newest first."""
    decisions = Decisions()
    for _ in range(RECORDS + 10):
        decisions.add("te", "m", 0, [], plan(0, 1, []), now=0.0)
    assert decisions.num_made == RECORDS + 10
    kept = decisions.latest(RECORDS + 10, now=0.0)
    assert len(kept) == RECORDS
    assert kept[0]["why"].startswith(f"#{RECORDS + 10} ")
