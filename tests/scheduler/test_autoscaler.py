"""AUTOSCALER's rule: inside its bounds, up at once, down to the least in time, and still where the load is."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from services.scheduler.cluster.autoscaler import Autoscaler, Cause, Observation
from services.scheduler.cluster.keep_alive import KeepAlive
from services.scheduler.cluster.price import price
from services.scheduler.costs import Costs
from shared.messages import TeBeat

EMPTY = Observation(model="m", min_tes=0, max_tes=8, num_slots=64, start_s=1.0)
COUNT = st.integers(0, 1000)
SECONDS = st.floats(0, 1000)

OBSERVATIONS = st.builds(
    Observation,
    model=st.just("m"),
    min_tes=st.integers(0, 10),
    max_tes=st.integers(0, 10),
    ready=st.integers(0, 10),
    starting=st.integers(0, 10),
    num_slots=st.integers(0, 64),
    running=COUNT,
    waiting=COUNT,
    parked=COUNT,
    parked_wait_s=SECONDS,
    arrivals=COUNT,
    work_s=SECONDS,
    answered=COUNT,
    late=COUNT,
    start_s=st.floats(0.01, 60),
    keep_alive_s=st.none() | SECONDS,
)


@given(st.lists(st.tuples(OBSERVATIONS, st.floats(0, 30)), max_size=40))
@settings(max_examples=60, deadline=None)
def test_a_target_is_never_outside_its_bounds_and_always_has_a_reason(
    seen: list[tuple[Observation, float]],
) -> None:
    """Whatever is seen and whenever; where the bounds cross, the upper one holds."""
    scaler, now = Autoscaler(), 0.0
    for observation, step_s in seen:
        now += step_s
        verdict = scaler.observe(observation, now)
        assert min(observation.min_tes, observation.max_tes) <= verdict.target
        assert verdict.target <= observation.max_tes
        assert verdict.reason


@given(st.lists(st.tuples(OBSERVATIONS, st.floats(0, 30)), max_size=20), st.integers(0, 3))
@settings(max_examples=25, deadline=None)
def test_silence_ends_at_the_least_in_bounded_time(
    seen: list[tuple[Observation, float]], least: int
) -> None:
    """Zero is data: after an hour and a half without a request nothing is up beyond the minimum."""
    scaler, now = Autoscaler(), 0.0
    for observation, step_s in seen:
        now += step_s
        scaler.observe(replace(observation, keep_alive_s=None), now)
    target = -1
    for _ in range(540):
        now += 10.0
        target = scaler.observe(replace(EMPTY, min_tes=least, max_tes=10), now).target
    assert target == least


def test_what_is_found_at_first_is_kept_as_if_it_had_just_been_needed() -> None:
    """One that takes over has heard of no demand: it lets a fleet go no sooner than one that had."""
    scaler = Autoscaler()
    busy = replace(EMPTY, ready=4, starting=1, running=5)
    assert scaler.observe(busy, 1000.0).target == 5
    assert scaler.observe(busy, 1005.0).target == 5
    assert scaler.observe(busy, 1060.0).target == 1
    assert Autoscaler().observe(replace(busy, max_tes=3), 0.0).target == 3


@given(OBSERVATIONS, st.integers(1, 100))
@settings(max_examples=60, deadline=None)
def test_one_who_waits_wakes_a_te_at_once(before: Observation, num: int) -> None:
    """The first look after somebody was parked is enough, also right after another verdict."""
    scaler = Autoscaler()
    scaler.observe(before, 0.0)
    assert scaler.observe(replace(EMPTY, parked=num, arrivals=num), 0.001).target >= 1


@given(st.floats(0.05, 6.0), st.integers(2, 4))
@settings(max_examples=40, deadline=None)
def test_a_constant_load_has_a_constant_target(rate: float, per_te: int) -> None:
    """After two minutes nothing changes any more, and nothing flips between two numbers."""
    scaler, now, target = Autoscaler(), 0.0, 0
    targets = []
    for number in range(1000):
        now += 0.25
        seen = replace(
            EMPTY, ready=target, running=max(per_te * target, 1), arrivals=1, work_s=rate * 0.25
        )
        target = scaler.observe(seen, now).target
        if number > 480:
            targets.append(target)
    assert len(set(targets)) == 1
    assert 1 <= targets[0] <= max(2, 2 * rate + 1)
    assert targets[0] >= rate


def test_a_burst_is_answered_in_one_decision() -> None:
    """Forty requests at once: most of the TEs they take are wanted the first time they are seen."""
    scaler = Autoscaler()
    scaler.observe(EMPTY, 0.0)
    burst = replace(EMPTY, max_tes=64, parked=40, arrivals=40, work_s=20.0)
    verdict = scaler.observe(burst, 0.25)
    assert verdict.target >= 8
    assert verdict.cause is Cause.BACKLOG


def test_a_lone_request_never_wants_two() -> None:
    """However much work it is: a second TE would have nothing to do."""
    scaler = Autoscaler()
    scaler.observe(EMPTY, 0.0)
    first = replace(EMPTY, parked=1, arrivals=1, work_s=500.0)
    assert scaler.observe(first, 0.1).target == 1
    for number in range(20):
        assert scaler.observe(replace(EMPTY, ready=1, running=1), 0.2 + number).target == 1


def test_an_operators_keep_alive_counts_for_the_last_te() -> None:
    """0 gives it up at once; a minute keeps it for a minute."""
    for keep_s, idle_s, left in ((0.0, 1.0, 0), (60.0, 59.0, 1), (60.0, 61.0, 0)):
        scaler = Autoscaler()
        scaler.observe(replace(EMPTY, running=1, keep_alive_s=keep_s), 0.0)
        seen = replace(EMPTY, ready=1, keep_alive_s=keep_s)
        assert scaler.observe(seen, idle_s).target == left


def test_what_comes_again_and_again_is_expected() -> None:
    """A burst every two minutes: from the fifth on TEs are there before it, and not in between."""
    scaler, ready, before, between = Autoscaler(), 0, [], []
    for tick in range(8 * 480):
        now, at = tick * 0.25, tick % 480
        burst = replace(EMPTY, ready=ready, running=10, arrivals=4, work_s=1.0)
        seen = burst if at < 20 else replace(EMPTY, ready=ready)
        if at == 479:
            before.append(ready)
        elif at == 320:
            between.append(ready)
        ready = scaler.observe(seen, now).target
    assert before[0] < before[-1]
    assert before[-1] >= 3
    assert between[-1] <= 1


def test_lateness_wants_more_than_the_same_load_in_time() -> None:
    """An objective that is missed raises the target."""
    targets = []
    for late in (0, 4):
        scaler = Autoscaler()
        for tick in range(200):
            seen = replace(EMPTY, ready=3, running=9, arrivals=4, answered=4, late=late, work_s=0.5)
            target = scaler.observe(seen, tick * 0.25).target
        targets.append(target)
    assert targets[0] < targets[1]


def test_gaps_teach_how_long_to_keep() -> None:
    """Short gaps are bridged, long ones are not, and none is kept for beyond the bounds."""
    short, long = KeepAlive(), KeepAlive()
    for number in range(8):
        short.ended(18.0 + number % 2)
        long.ended(500.0 + number)
    assert 19.0 <= short.keep_s(15.0, 300.0) <= 25.0
    assert long.keep_s(15.0, 300.0) == 15.0
    assert KeepAlive().keep_s(15.0, 300.0) == 15.0
    habit = short.habit()
    assert habit is not None
    assert (habit.earliest_s, habit.latest_s) == (18.0, 19.0)
    short.ended(200.0)
    assert short.habit() is None


def test_a_request_is_priced_as_one_of_a_full_batch() -> None:
    """The batch of the moment does not count: a lone stream is no reason for a TE per stream."""
    lone = TeBeat(
        id="t", model="m", pod="p", state="ready", running=1, prefill_us=100.0, decode_us=20_000.0
    )
    full = replace(lone, running=16)
    assert price(0, 100, lone, Costs()) == price(0, 100, full, Costs())
    assert price(1000, 0, lone, Costs()) == 0.1
    assert price(1000, 100, None, Costs()) == 2.0
