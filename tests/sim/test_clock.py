"""Virtual time."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from deepflow.sim.clock import Clock, Process


@given(st.lists(st.floats(0.0, 100.0)))
def test_events_happen_in_the_order_of_their_times(times: list[float]) -> None:
    """Whatever the order in which they were set; those of one time in that order."""
    clock = Clock()
    seen: list[tuple[float, int]] = []
    for number, when in enumerate(times):
        clock.at(when, lambda n: seen.append((clock.now, n)), number)
    clock.run()
    assert seen == sorted((when, number) for number, when in enumerate(times))


def test_what_is_set_for_the_past_happens_now() -> None:
    """Time does not run backwards."""
    clock = Clock()
    seen: list[float] = []
    clock.at(5.0, clock.at, 1.0, lambda: seen.append(clock.now))
    clock.run()
    assert seen == [5.0]


def test_a_process_waits_without_anything_passing_outside() -> None:
    """It goes on as its delays pass, beside others; one that never waits is over at once."""
    clock = Clock()
    seen: list[tuple[str, float]] = []

    def process(name: str, delay_s: float, num: int) -> Process:
        for _ in range(num):
            yield delay_s
            seen.append((name, clock.now))

    clock.spawn(process("slow", 2.0, 2))
    clock.spawn(process("quick", 1.0, 3))
    clock.spawn(process("never", 1.0, 0))
    clock.run()
    # At one time, who waited first goes first.
    assert seen == [("quick", 1.0), ("slow", 2.0), ("quick", 2.0), ("quick", 3.0), ("slow", 4.0)]


def test_time_stops_where_it_is_told_to() -> None:
    """`run` ends at its limit or with `stop`, and can be taken up again."""
    clock = Clock()
    seen: list[float] = []
    for when in (1.0, 2.0, 3.0, 4.0):
        clock.at(when, lambda: seen.append(clock.now))
    clock.at(3.0, clock.stop)
    clock.run(until=1.5)
    assert (clock.now, seen) == (1.5, [1.0])
    clock.run()
    assert seen == [1.0, 2.0, 3.0]
    clock.run()
    assert seen == [1.0, 2.0, 3.0, 4.0]
