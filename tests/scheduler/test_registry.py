"""The registry of TEs: life from beats alone, load from beats and from what was dispatched since."""

from __future__ import annotations

from typing import Any

from services.scheduler.registry import SETTLE_S, Registry
from shared.liveness import Liveness
from shared.messages import Registration, TeBeat


def beat(te: str, **fields: Any) -> TeBeat:
    """A beat of a TE that is ready for model `m`."""
    return TeBeat(**{"id": te, "model": "m", "pod": "pod-1", "state": "ready", **fields})


def names(registry: Registry, now: float = 0.0) -> set[str]:
    """The candidates for model `m`."""
    return {candidate.te for candidate in registry.candidates("m", now)}


def test_only_ready_tes_of_the_model_are_candidates() -> None:
    """Loading and draining TEs and those of other models are none, but belong to the group."""
    registry = Registry(Liveness())
    assert registry.beat(beat("a"), 0.0)
    assert not registry.beat(beat("b", state="loading"), 0.0)
    registry.beat(beat("c", state="draining"), 0.0)
    registry.beat(beat("d", model="other"), 0.0)
    assert names(registry) == {"a"}
    assert {te.id for te in registry.group("m")} == {"a", "b", "c"}
    assert registry.ready("m")
    assert not registry.ready("none")
    assert registry.beat(beat("b"), 0.1)  # loaded: a new candidate
    assert names(registry) == {"a", "b"}


def test_room_counts_what_was_reserved_and_dispatched() -> None:
    """The KV use of a TE is what it uses, what it has promised, and what it was given since, in pages of its own."""
    registry = Registry(Liveness())
    registrations = [Registration(kind="te", id="a", host="h", pid=1, page=32)]
    registry.registrations(registrations)
    registry.beat(
        beat("a", role="decode", blocks_total=100, blocks_used=10, blocks_reserved=5), 0.0
    )
    registry.beat(beat("b", blocks_total=100), 0.0)
    registry.dispatched("a", "t", 1.0, 0.0, num_tokens=33)
    registry.dispatched("b", "t", 1.0, 0.0, num_tokens=33)
    found = {c.te: (c.role, c.kv_use) for c in registry.candidates("m", 0.0)}
    assert found == {"a": ("decode", 0.17), "b": ("colocated", 0.03)}


def test_silence_is_death_after_a_while() -> None:
    """A TE without beats is lost once, and a later beat brings it back."""
    registry = Registry(Liveness(1.5))
    registry.beat(beat("a"), 0.0)
    assert [registry.lost(t / 2) for t in range(1, 4)] == [[], [], []]
    assert registry.lost(2.0) == ["a"]
    assert names(registry) == set()
    assert registry.beat(beat("a"), 2.1)
    assert names(registry) == {"a"}


def test_a_hung_te_is_lost_although_it_beats() -> None:
    """Beats without progress beyond the predicted step do not keep a TE alive, nor bring it back."""
    registry = Registry(Liveness(1.5))
    registry.beat(beat("a", progress_ms=1900, step_ms=500), 0.0)
    lost = []
    for step in range(1, 9):
        now = step * 0.25
        registry.beat(beat("a", progress_ms=2001 + step * 250, step_ms=500), now)
        lost += registry.lost(now)
    assert lost == ["a"]
    registry.beat(beat("a", progress_ms=9000, step_ms=500), 2.25)
    assert names(registry) == set()
    registry.beat(beat("a", progress_ms=10, step_ms=500), 2.5)
    assert names(registry) == {"a"}


def test_down_is_final() -> None:
    """A TE declared dead is gone at once, and a beat still under way does not raise it."""
    registry = Registry(Liveness())
    registry.beat(beat("a"), 0.0)
    assert registry.down("a")
    assert not registry.down("a")
    assert not registry.beat(beat("a"), 0.1)
    assert names(registry) == set()


def test_nobody_is_judged_while_the_bus_is_away() -> None:
    """The last view stands while held, and every clock starts again afterwards."""
    registry = Registry(Liveness(1.5))
    registry.beat(beat("a"), 0.0)
    registry.hold()
    assert [registry.lost(t / 2) for t in range(1, 21)] == [[]] * 20
    assert names(registry) == {"a"}
    registry.resume(10.0)
    assert registry.lost(10.5) == []
    assert registry.lost(11.0) == []
    assert registry.lost(11.5) == []
    assert registry.lost(12.0) == ["a"]


def test_dispatched_work_counts_until_a_beat_contains_it() -> None:
    """Own dispatches add to the score, survive a beat that may be older, and end with the task or a later beat."""
    registry = Registry(Liveness())
    registry.beat(beat("a", outstanding_s=1.0), 0.0)
    registry.dispatched("a", "t1", 0.5, 0.05)
    registry.dispatched("a", "t2", 0.25, 0.19)
    (candidate,) = registry.candidates("m", 0.19)
    assert candidate.score == 1.75
    registry.beat(beat("a", outstanding_s=1.5), 0.05 + SETTLE_S + 0.01)
    (candidate,) = registry.candidates("m", 0.2)
    assert candidate.score == 1.75  # t1 is in the beat, t2 not yet
    registry.ended("a", "t2")
    (candidate,) = registry.candidates("m", 0.2)
    assert candidate.score == 1.5


def test_unreachable_until_the_next_beat_and_suspect_for_a_while() -> None:
    """A TE nobody answers for is no candidate until it beats; one that left a task unanswered comes last."""
    registry = Registry(Liveness())
    registry.beat(beat("a"), 0.0)
    registry.unreachable("a")
    assert names(registry) == set()
    assert registry.beat(beat("a"), 0.2)
    registry.suspect("a", 0.2)
    assert [c.avoid for c in registry.candidates("m", 0.3)] == [True]
    assert [c.avoid for c in registry.candidates("m", 5.0)] == [False]
    assert [c.avoid for c in registry.candidates("m", 5.0, avoid=["a"])] == [True]


def test_registrations_are_a_hint() -> None:
    """A registered TE that does not beat is named as silent and is no candidate."""
    registry = Registry(Liveness())
    registry.registrations(
        [
            Registration(kind="te", id="a", host="h", pid=1, model="m"),
            Registration(kind="te", id="b", host="h", pid=2, model="m"),
            Registration(kind="pod", id="p", host="h", pid=3),
        ]
    )
    registry.beat(beat("b"), 0.0)
    assert registry.silent() == ["a"]
    assert names(registry) == {"b"}
