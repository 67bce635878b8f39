"""Which TEs a pod host starts and which it lets go, so that it has what it is to have. Pure: numbers in, a plan out.

An order is the whole state that is wanted, so the plan depends on nothing but that state and what there is: the same
order twice changes nothing, one that was lost is made up for by the next. This module must not know processes, the bus
or who gives orders.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from services.worker.budget import Budget


class Group(NamedTuple):
    """The TEs of one model in one role."""

    model: str
    role: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """A TE of this pod host, on its way up, up, or on its way out; or the place of one that died and is to come back.

    `load` is the number of choices that it runs or that wait in it; `age` grows with every TE that is started.
    """

    number: int
    group: Group
    ready: bool = False
    leaving: bool = False
    running: bool = True  # a process, or one that is being made
    load: int = 0
    age: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do now: groups that get one more TE each time they are named, seats that are to leave, and how many TEs
    of a group there is no room for."""

    start: list[Group] = field(default_factory=list)
    leave: list[int] = field(default_factory=list)
    short: dict[Group, int] = field(default_factory=dict)


def reconcile(wanted: Mapping[Group, int], seats: Sequence[Seat], budget: Budget) -> Plan:
    """What brings `seats` to `wanted`.

    What is on its way up counts as there, what is on its way out does not, though it takes room until it is gone. Room
    that does not suffice for all is dealt out in turn, one TE to each group.
    """
    plan = Plan()
    there: dict[Group, list[Seat]] = {}
    for seat in seats:
        if not seat.leaving:
            there.setdefault(seat.group, []).append(seat)
    for group, staying in there.items():
        surplus = len(staying) - wanted.get(group, 0)
        plan.leave.extend(seat.number for seat in sorted(staying, key=_worth)[: max(0, surplus)])
    held = Counter(seat.group.model for seat in seats)
    missing = deque(
        (group, number - len(there.get(group, ())))
        for group, number in wanted.items()
        if number > len(there.get(group, ()))
    )
    while missing:
        group, number = missing.popleft()
        if not budget.fits(held, group.model):
            plan.short[group] = number
            continue
        held[group.model] += 1
        plan.start.append(group)
        if number > 1:
            missing.append((group, number - 1))
    return plan


def _worth(seat: Seat) -> tuple[bool, int, bool, int]:
    """What goes first sorts first: what does not run, then what has the least to do, then the newest."""
    return seat.running, seat.load, seat.ready, -seat.age
