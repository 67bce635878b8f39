"""The registry of TEs: life from beats alone, load from beats and from what was dispatched since."""

from __future__ import annotations

import math
from typing import Any

import pytest

from services.scheduler.registry import SETTLE_S, Given, Registry
from shared.liveness import Liveness
from shared.messages import Band, Registration, TeBeat


def beat(te: str, **fields: Any) -> TeBeat:
    """A beat of a TE that is ready for model `m`."""
    return TeBeat(**{"id": te, "model": "m", "pod": "pod-1", "state": "ready", **fields})


def names(registry: Registry, now: float = 0.0) -> set[str]:
    """The candidates for model `m`."""
    return {candidate.te for candidate in registry.candidates("m", now)}


def load(registry: Registry, now: float) -> float:
    """Of the one candidate."""
    [candidate] = registry.candidates("m", now)
    return round(candidate.load_s, 9)


def recent(registry: Registry, now: float) -> dict[str, float]:
    """The share of late of each."""
    return {c.te: c.recent_s for c in registry.candidates("m", now)}


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
    registry.give("a", "t", Given(when=0.0, num_tokens=33))
    registry.give("b", "t", Given(when=0.0, num_tokens=33))
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


def test_given_work_counts_until_a_beat_contains_it() -> None:
    """What was given adds to the load, survives a beat that may be older, and ends with the task or a later beat."""
    registry = Registry(Liveness())
    registry.beat(beat("a", outstanding_s=1.0), 0.0)
    registry.give("a", "t1", Given(when=0.05, prefill_s=0.3, decode_s=0.2))
    registry.give("a", "t2", Given(when=0.19, prefill_s=0.25))
    assert load(registry, 0.0) == 1.75
    assert load(registry, 0.5) == 1.25  # half a second of it is done, as far as one can tell
    now = 0.05 + SETTLE_S + 0.01
    registry.beat(beat("a", outstanding_s=1.5), now)
    assert load(registry, now) == 1.75  # t1 is in the beat, t2 not yet
    registry.ended("a", "t2")
    assert load(registry, now) == 1.5
    assert load(registry, now + 9.0) == 0.0  # without beats: it will have been done


def test_an_overtaken_beat_changes_nothing_but_life() -> None:
    """A beat of an earlier step that comes late does not bring its load back."""
    registry = Registry(Liveness(1.5))
    registry.beat(beat("a", step=9, outstanding_s=1.0), 0.0)
    registry.beat(beat("a", step=8, outstanding_s=7.0), 1.0)
    assert load(registry, 0.0) == 1.0
    assert registry.lost(1.0) == []
    assert registry.lost(2.0) == []


def test_other_job_executors_give_as_much() -> None:
    """What no beat contains yet is counted once for each JE; work of band BATCH only for its own."""
    registry = Registry(Liveness())
    registry.beat(beat("a", outstanding_s=3.0, outstanding_batch_s=2.0), 0.0)
    registry.give("a", "t", Given(when=0.0, prefill_tokens=100, prefill_s=0.5))
    registry.num_peers = 3
    assert load(registry, 0.0) == 1.0 + 3 * 0.5
    [batch] = registry.candidates("m", 0.0, band=Band.BATCH)
    assert batch.load_s == 3.0 + 3 * 0.5
    assert batch.queued_tokens == 300


def test_the_share_of_late() -> None:
    """What was given counts for a minute, what was refused does not, and a new TE starts level with the others."""
    registry = Registry(Liveness())
    registry.beat(beat("a"), 0.0)
    registry.did("a", 2000, 0.0)
    registry.did("a", 3000, 30.0)
    registry.did("a", 1000, 30.5)
    registry.did("a", -1000, 31.0)
    registry.beat(beat("b"), 40.0)
    assert recent(registry, 59.0) == {"a": 5.0, "b": 5.0}
    assert recent(registry, 61.0) == {"a": 3.0, "b": 5.0}
    assert recent(registry, 200.0) == {"a": 0.0, "b": 0.0}


def test_a_refusal_heard_in_the_next_second() -> None:
    """What it takes back may outlast what it takes back from, and still nobody was given less than nothing."""
    registry = Registry(Liveness())
    registry.beat(beat("a"), 0.0)
    registry.did("a", 2000, 0.9)
    registry.did("a", -2000, 1.1)
    assert [recent(registry, now)["a"] for now in (2.0, 60.5, 62.0)] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("time_us", [0.0, -5.0, 1e-320, math.inf, math.nan])
def test_times_that_cannot_be(time_us: float) -> None:
    """A TE that measured nonsense is taken to be as quick as one that has measured nothing."""
    registry = Registry(Liveness())
    registry.beat(beat("a", running=2), 0.0)
    odd = beat("b", running=2, prefill_us=time_us, decode_us=time_us, outstanding_s=math.nan)
    registry.beat(odd, 0.0)
    one, other = registry.candidates("m", 1.0)
    assert (one.token_s, one.decode_token_s) == (other.token_s, other.decode_token_s)
    assert (other.load_s, other.queued_tokens) == (0.0, 0.0)


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


def test_a_te_with_its_share_has_no_room() -> None:
    """A share counts what its last beat tells, less what has ended since, and what it was given; free slots do not
    help it."""
    registry = Registry(Liveness())
    registry.beat(beat("a", running=2, free_slots=8), 0.0)
    registry.beat(beat("b", free_slots=8), 0.0)
    registry.give("b", "t", Given(when=0.0))
    assert registry.num_tasks("m") == 3
    assert registry.full("m", 2) == ["a"]
    assert registry.has_room("m", 2)
    assert not registry.has_room("m", 1)
    registry.ended("a", "of that beat")
    assert registry.full("m", 2) == []
    assert registry.full("m") == []


def test_an_idle_te_is_not_shunned_for_what_it_measured_in_a_bad_hour() -> None:
    """Without work it costs at most what the TE in the middle of its group does; with work, what it measures."""
    registry = Registry(Liveness())
    for te, prefill_us in (("a", 1000.0), ("b", 1200.0), ("slow", 9000.0)):
        registry.beat(beat(te, prefill_us=prefill_us, decode_us=prefill_us), 0.0)
    costs = {one.te: one.token_s for one in registry.candidates("m", 0.0)}
    assert costs == {"a": 1e-3, "b": 1.2e-3, "slow": 1.2e-3}
    registry.beat(beat("slow", prefill_us=9000.0, running=1), 0.1)
    costs = {one.te: one.token_s for one in registry.candidates("m", 0.1)}
    assert costs["slow"] == 9e-3


def test_a_te_that_just_came_up_is_as_fast_as_its_group() -> None:
    """What it has not measured is what the fastest TE of the group measured; the prior where none has."""
    registry = Registry(Liveness())
    for te in ("a", "b"):
        registry.beat(beat(te), 0.0)
    prior, other = (one.token_s for one in registry.candidates("m", 0.0))
    assert prior == other == 1e-3
    registry.beat(beat("a", prefill_us=5000.0), 2.0)
    registry.beat(beat("slow", prefill_us=9000.0, running=1), 2.0)
    registry.beat(beat("b"), 2.0)
    costs = {one.te: one.token_s for one in registry.candidates("m", 2.0)}
    assert costs == {"a": 5e-3, "b": 5e-3, "slow": 9e-3}
