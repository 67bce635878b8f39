"""Which TEs a pod host starts and lets go: properties of the plan, and of plans carried out while TEs come and go."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from services.worker.budget import Budget, Cost
from services.worker.groups import Group, Seat, reconcile

GROUPS = [Group("a", "colocated"), Group("b", "colocated"), Group("b", "prefill")]
COSTS = {"a": Cost(te_bytes=10, weights_bytes=50), "b": Cost(te_bytes=30, weights_bytes=5)}

orders = st.dictionaries(st.sampled_from(GROUPS), st.integers(0, 6))
budgets = st.builds(Budget, st.integers(1, 12), st.integers(0, 400), st.just(COSTS))


@st.composite
def seatings(draw: st.DrawFn) -> list[Seat]:
    """TEs that there are, in any state."""
    return [
        Seat(
            number=number,
            group=draw(st.sampled_from(GROUPS)),
            ready=draw(st.booleans()),
            leaving=draw(st.booleans()),
            running=draw(st.booleans()),
            load=draw(st.integers(0, 3)),
            age=number,
        )
        for number in range(draw(st.integers(0, 12)))
    ]


class Host:
    """TEs as a pod host would have them: plans are carried out, TEs come up, leave and die as a die falls."""

    def __init__(self, seats: list[Seat], budget: Budget, random: Random) -> None:
        self.seats = {seat.number: seat for seat in seats}
        self.budget = budget
        self._random = random
        self._age = len(seats)

    def obey(self, wanted: dict[Group, int]) -> tuple[int, int]:
        """Carry out what an order takes; how many were started and let go."""
        plan = reconcile(wanted, list(self.seats.values()), self.budget)
        for number in plan.leave:
            assert not self.seats[number].leaving
            self.seats[number] = replace(self.seats[number], leaving=True)
        for group in plan.start:
            number = next(n for n in range(100) if n not in self.seats)
            self._age += 1
            self.seats[number] = Seat(number=number, group=group, age=self._age)
        return len(plan.start), len(plan.leave)

    def staying(self) -> Counter[Group]:
        return Counter(seat.group for seat in self.seats.values() if not seat.leaving)

    def held(self) -> Counter[str]:
        return Counter(seat.group.model for seat in self.seats.values())

    def live(self) -> None:
        """Something happens to each TE: one that leaves may be gone, another may come up, die, or get work."""
        for number, seat in list(self.seats.items()):
            if seat.leaving and self._random.random() < 0.5:
                del self.seats[number]
            else:
                self.seats[number] = replace(
                    seat,
                    ready=self._random.random() < 0.7,
                    running=self._random.random() < 0.8,
                    load=self._random.randrange(3),
                )

    def settle(self) -> None:
        """Everything that leaves is gone."""
        self.seats = {number: seat for number, seat in self.seats.items() if not seat.leaving}


@given(seatings(), orders, budgets)
def test_one_order_brings_what_is_wanted_and_never_more(
    seats: list[Seat], wanted: dict[Group, int], budget: Budget
) -> None:
    """Those on their way up count: no group passes its number, and one stays below it only where the plan says so."""
    host = Host(seats, budget, Random(0))
    before = host.held()
    plan = reconcile(wanted, seats, budget)
    host.obey(wanted)
    staying = host.staying()
    for group in GROUPS:
        assert staying[group] == wanted.get(group, 0) - plan.short.get(group, 0)
    if plan.start:
        assert sum(host.held().values()) <= budget.max_tes
        assert budget.taken(host.held()) <= budget.num_bytes
    else:
        assert host.held() == before


@given(seatings(), orders, budgets)
def test_the_same_order_again_changes_nothing(
    seats: list[Seat], wanted: dict[Group, int], budget: Budget
) -> None:
    """A repeated order starts nothing twice and lets nothing more go, whatever order its groups are named in."""
    host = Host(seats, budget, Random(0))
    host.obey(wanted)
    assert host.obey(wanted) == (0, 0)
    assert host.obey(dict(reversed(wanted.items()))) == (0, 0)


@given(seatings(), st.lists(orders, min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_it_converges_whatever_was_ordered_and_died_before(
    seats: list[Seat], course: list[dict[Group, int]], random: Random
) -> None:
    """After any course of orders, deaths and departures, repeating the last order ends at its numbers and stays there;
    on the way there are never more TEs than the largest of numbers."""
    host = Host(seats, Budget(100, 10_000, COSTS), random)
    for wanted in course:
        for _ in range(random.randrange(1, 4)):
            host.obey(wanted)
            staying = host.staying()
            assert all(staying[group] == wanted.get(group, 0) for group in GROUPS)
            host.live()
    host.obey(course[-1])
    host.settle()
    assert host.obey(course[-1]) == (0, 0)
    assert host.staying() == Counter(course[-1])


@given(seatings(), orders)
def test_the_idlest_and_newest_leave_first(seats: list[Seat], wanted: dict[Group, int]) -> None:
    """Whoever stays has at least as much to do as whoever leaves; among equals the one that stays is the older."""
    plan = reconcile(wanted, seats, Budget(100, 10_000, COSTS))
    gone = [seat for seat in seats if seat.number in plan.leave]
    assert len(gone) == len(plan.leave)
    for left in gone:
        for kept in seats:
            if kept.group != left.group or kept.leaving or kept.number in plan.leave:
                continue
            assert (kept.running, kept.load, kept.ready) >= (left.running, left.load, left.ready)
            if (kept.running, kept.load, kept.ready) == (left.running, left.load, left.ready):
                assert kept.age < left.age


def test_one_that_leaves_takes_room_until_it_is_gone() -> None:
    """Its memory is not given to another while it finishes what it has."""
    one = Group("a", "colocated")
    budget = Budget(max_tes=8, num_bytes=60, costs=COSTS)
    leaving = Seat(number=0, group=one, ready=True, leaving=True, load=1)
    plan = reconcile({one: 1}, [leaving], budget)
    assert (plan.start, plan.short) == ([], {one: 1})
    assert reconcile({one: 1}, [], budget).start == [one]


def test_scarce_room_is_dealt_out_in_turn() -> None:
    """Two groups that want more than there is get the same number each, and the plan says what is missing."""
    cheap = {"a": Cost(1, 0), "b": Cost(1, 0)}
    wanted = {Group("a", "colocated"): 9, Group("b", "colocated"): 9}
    plan = reconcile(wanted, [], Budget(6, 1000, cheap))
    assert Counter(plan.start) == dict.fromkeys(wanted, 3)
    assert plan.short == dict.fromkeys(wanted, 6)
