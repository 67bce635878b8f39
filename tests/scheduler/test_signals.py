"""The cluster manager's books: what is known of pod hosts, TEs and demand, and what is made of late or odd words."""

from __future__ import annotations

import math

import pytest

from services.scheduler.cluster.autoscaler import Observation
from services.scheduler.cluster.signals import DEMAND_S, POD_S, START_S, Signals
from shared.messages import TeBeat
from shared.scaling_messages import Demand, PodBeat, PodModel, PodTe, ScalingEntry, Start


def pod(id_: str = "p", **tes: str) -> PodBeat:
    """A pod host with these TEs of model "m", name -> state."""
    return PodBeat(
        kind="pod",
        id=id_,
        host="h",
        models=[PodModel(name="m", min_tes=1, max_tes=4, te_bytes=1, weights_bytes=1, num_slots=8)],
        tes=[PodTe(te=te, model="m", role="colocated", state=state) for te, state in tes.items()],
        max_tes=8,
        num_bytes=100,
        cores=2,
    )


def te(name: str, state: str = "ready", **load: int) -> TeBeat:
    """A TE of that pod host."""
    return TeBeat(id=name, model="m", pod="p", state=state, **load)  # type: ignore[arg-type]


def demand(je: str = "j", **counted: int) -> Demand:
    """What a JE says of the model."""
    return Demand(je=je, model="m", **counted)


def look(signals: Signals, now: float, entry: ScalingEntry | None = None) -> Observation:
    """What there is."""
    return signals.observe("m", entry, now)


def test_demand_is_what_came_since_one_last_looked() -> None:
    """Counters of several JEs, each from its own start; what one counted before it was heard of is the past, but for
    those who wait."""
    signals = Signals()
    assert signals.demand(demand(arrivals=100, work_ms=50_000, parked=2), 0.0)
    assert not signals.demand(demand("k", arrivals=40, answered=7), 0.0)
    seen = look(signals, 0.0)
    assert (seen.arrivals, seen.work_s, seen.parked, seen.answered) == (2, 1.0, 2, 0)
    assert signals.demand(demand(arrivals=103, work_ms=51_500, late=1, answered=1), 0.1)
    assert signals.demand(demand("k", arrivals=41, answered=9), 0.1)
    seen = look(signals, 0.1)
    assert (seen.arrivals, seen.work_s, seen.parked) == (4, 1.5, 0)
    assert (seen.answered, seen.late) == (3, 1)
    assert look(signals, 0.1).arrivals == 0


def test_a_je_that_counts_anew_is_heard() -> None:
    """It had to forget the model among too many others: its small numbers are news, not the past."""
    signals = Signals()
    signals.demand(demand(arrivals=5000, work_ms=1), 0.0)
    look(signals, 0.0)
    assert signals.demand(demand(arrivals=1, parked=1, work_ms=100), 0.1)
    assert look(signals, 0.1).arrivals == 1
    assert signals.demand(demand(arrivals=3, work_ms=300), 0.2)
    assert look(signals, 0.2).arrivals == 2


def test_those_who_wait_count_for_as_long_as_their_je_says_so() -> None:
    """The longest wait goes on between two words; a JE that fell silent has nobody who waits."""
    signals = Signals()
    signals.demand(demand(parked=3, waited_ms=400), 0.0)
    signals.demand(demand("k", parked=1), 1.0)
    seen = look(signals, 1.0)
    assert seen.parked == 4
    assert seen.parked_wait_s == pytest.approx(1.4)
    assert look(signals, DEMAND_S + 0.5).parked == 1
    assert look(signals, DEMAND_S + 1.5).parked == 0
    assert signals.demand(demand(parked=3), DEMAND_S + 1.6)  # again


def test_bounds_are_the_pod_hosts_together_unless_an_operator_set_them() -> None:
    """Each alone; the upper one holds where they cross. A pod host that drains has no say."""
    signals = Signals()
    assert look(signals, 0.0).max_tes == 0
    assert not signals.can_run("m")
    for name in ("p", "q"):
        signals.pod_beat(pod(name), 0.0)
    bounds = signals.bounds
    assert bounds("m", None) == (2, 8)
    assert bounds("m", ScalingEntry(model="m", max_tes=1)) == (1, 1)
    assert bounds("m", ScalingEntry(model="m", min_tes=0)) == (0, 8)
    assert bounds("m", ScalingEntry(model="m", min_tes=5, max_tes=100)) == (5, 100)
    leaving = PodBeat(kind="pod", id="q", host="h", draining=True, models=pod().models)
    signals.pod_beat(leaving, 0.1)
    assert bounds("m", None) == (1, 4)


def test_a_tes_own_word_is_fresher_than_its_pod_hosts() -> None:
    """But one whose beats nobody hears does not serve, and one that is made to leave is leaving."""
    signals = Signals()
    signals.pod_beat(pod(a="loading", b="ready", c="draining", d="ready", e="waiting"), 0.0)
    signals.tes([te("a", running=1), te("b", "draining"), te("c", running=5)], 0.0)
    fleet = signals.fleet("m")
    assert (fleet.ready, fleet.draining, fleet.starting) == (1, 2, 2)
    assert signals.packable({}, 0.0)[0].loads == {"m": [0, 0, 1]}


def test_a_pod_host_that_only_its_tes_speak_for_gets_nothing_more() -> None:
    """It is alive, and keeps what it has; with its TEs silent too it is lost, and all that was known of it."""
    signals = Signals()
    signals.pod_beat(pod(a="ready"), 0.0)
    now = 0.0
    while now < 2 * POD_S:
        now += 0.5
        signals.tes([te("a")], now)
        assert signals.lost(now) == []
    assert [one.closed for one in signals.packable({}, now)] == [True]
    signals.pod_beat(pod(a="ready"), now)
    assert [one.closed for one in signals.packable({}, now)] == [False]
    lost = []
    for step in range(1, 9):
        signals.tes([], now + step / 2)
        lost += signals.lost(now + step / 2)
    assert lost == ["p"]
    assert signals.pods == {}
    assert signals.packable({}, now) == []


@pytest.mark.parametrize("total_s", [math.nan, math.inf, -1.0])
def test_a_start_that_took_no_possible_time_teaches_nothing(total_s: float) -> None:
    """Expected times stay numbers that can be told."""
    signals = Signals()
    start = Start(
        te="t", model="m", role="colocated", process="fork", weights="dram", steps={}, total_s=0.0
    )
    beat = pod()
    for name, took_s in (("t", total_s), ("u", 0.25)):
        beat.starts.append(
            Start(
                te=name,
                model="m",
                role=start.role,
                process="fork",
                weights="dram",
                steps={},
                total_s=took_s,
            )
        )
        if name == "t":
            signals.pod_beat(beat, 0.0)
            assert signals.start_s("m") == START_S
    for now in (0.1, 0.2):  # told of again and again
        signals.pod_beat(beat, now)
    assert signals.start_s("m") == signals.start_s("other") == 0.25


def test_what_nobody_asks_for_is_forgotten() -> None:
    """A model is talked about while somebody can run it or has just asked; the books are bounded."""
    signals = Signals()
    signals.demand(demand(parked=1), 0.0)
    assert signals.models(1.0) == {"m"}
    assert signals.models(100.0) == set()
    signals.forget("m")
    assert signals._demands == {}
    signals.pod_beat(pod(), 100.0)
    assert signals.models(100.0) == {"m"}
