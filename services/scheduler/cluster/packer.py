"""Which pod host is to have how many TEs of which model. Pure: budgets and wishes in, a plan out.

A plan is made from the one before it, with as few moves as there can be: a TE goes only if its model is to have fewer,
or if somebody needs its room more; then the least valuable one yields. A new TE goes where the weights are, as long as
there is a core for it. Units are ranked: a model's minimum; the first TE of one that is asked for; what demand needs
beyond; what is merely kept. Of the latter two no pod host gets more than it has cores: TEs that share one do together
what one does. Only colocated TEs are planned: the others of a pod host take room, and stay. This module
must not know how a wish comes about, orders, or processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final

Plan = dict[str, dict[str, int]]  # pod host -> model -> TEs
_MUCH_MORE: Final = 2.0  # so many times the value per TE, and one in use yields to another


class Rank(IntEnum):
    """What is served first. A unit takes the room of one of a higher number."""

    MINIMUM = 0
    FIRST = 1
    NEEDED = 2
    KEPT = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Bytes of a model on one pod host; of the weights so many are in its page cache."""

    te_bytes: int
    weights_bytes: int
    resident_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pod:
    """A pod host: its budgets and what it has. `loads` holds what each TE that is up or coming has to do, idlest first.
    `fixed` are TEs that nobody plans. Of models in `caps` it can have so many at the most. One that is `closed` gets
    nothing more for now."""

    id: str
    max_tes: int
    num_bytes: int
    cores: int
    costs: Mapping[str, Cost]
    loads: Mapping[str, Sequence[int]] = field(default_factory=dict)
    fixed: Mapping[str, int] = field(default_factory=dict)
    caps: Mapping[str, int] = field(default_factory=dict)
    closed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """`target` TEs of a model, of which demand needs `needed` now. `value` is what they do, in any one unit."""

    model: str
    target: int
    min_tes: int = 0
    needed: int = 0
    value: float = 0.0
    may_shrink: bool = True  # there have been too many for long enough

    def rank(self, number: int) -> Rank:
        """Of its TE of this number, from 1."""
        if number <= self.min_tes:
            return Rank.MINIMUM
        if number > self.needed:
            return Rank.KEPT
        return Rank.FIRST if number == 1 else Rank.NEEDED


def pack(pods: Sequence[Pod], wishes: Sequence[Wish], before: Plan) -> Plan:
    """The plan after `before`; of pod hosts that it does not name, what they have is taken to have been planned."""
    packing = _Packing(pods, wishes, before)
    packing.shrink()
    packing.grow()
    return packing.plan


def planned(plan: Plan, model: str) -> int:
    """TEs of a model on all pod hosts."""
    return sum(numbers.get(model, 0) for numbers in plan.values())


class _Packing:
    def __init__(self, pods: Sequence[Pod], wishes: Sequence[Wish], before: Plan) -> None:
        self._pods = {pod.id: pod for pod in sorted(pods, key=lambda pod: pod.id)}
        self._wishes = {wish.model: wish for wish in wishes}
        self.plan: Plan = {}
        for pod in self._pods.values():
            has = {model: len(loads) for model, loads in pod.loads.items()}
            wanted = before.get(pod.id, has)
            self.plan[pod.id] = {
                model: most
                for model, num in wanted.items()
                if (most := min(num, pod.caps.get(model, num))) and model in pod.costs
            }

    # ----------------------------------------------------------------------------------------------------- fewer

    def shrink(self) -> None:
        """Takes away what no wish covers."""
        for model in sorted({model for numbers in self.plan.values() for model in numbers}):
            wish = self._wishes.get(model)
            if wish is not None and not wish.may_shrink:
                continue
            surplus = planned(self.plan, model) - (wish.target if wish is not None else 0)
            for _ in range(surplus):
                holders = [pod for pod in self._pods.values() if self._num(pod, model)]
                self._add(min(holders, key=lambda pod: self._loss(pod, model)), model, -1)

    def _loss(self, pod: Pod, model: str) -> tuple[int, int, float, str]:
        """What is lost with one TE there: work, then a host's share in the weights, then room."""
        return self._load(pod, model), self._num(pod, model), -self._crowd(pod), pod.id

    def _load(self, pod: Pod, model: str) -> int:
        """Of the TE that the pod host would let go next; one that is not there yet has none."""
        loads = pod.loads.get(model, ())
        num_gone = len(loads) - self._num(pod, model)
        return loads[num_gone] if 0 <= num_gone < len(loads) else 0

    # ------------------------------------------------------------------------------------------------------ more

    def grow(self) -> None:
        """Finds room for what is missing, the most needed first; again while that changes anything, for what came last
        may let others go elsewhere."""
        for _ in range(len(self._wishes) + 1):
            before = {pod: dict(numbers) for pod, numbers in self.plan.items()}
            self._grow()
            if self.plan == before:
                return

    def _grow(self) -> None:
        missing = [
            (wish.rank(number), -wish.value / number, wish.model, number)
            for wish in self._wishes.values()
            for number in range(planned(self.plan, wish.model) + 1, wish.target + 1)
        ]
        given_up: set[str] = set()
        for rank, _, model, number in sorted(missing):
            if model in given_up:
                continue
            pod = self._room(model, rank) or self._cleared(self._wishes[model], rank, number)
            if pod is None:
                given_up.add(model)
            else:
                self._add(pod, model, 1)

    def _room(self, model: str, rank: Rank) -> Pod | None:
        """The best pod host with room for one more TE."""
        found = [pod for pod in self._pods.values() if self._fits(pod, model, rank)]
        return min(found, key=lambda pod: self._distance(pod, model), default=None)

    def _cleared(self, wish: Wish, rank: Rank, number: int) -> Pod | None:
        """The pod host where the least is lost if others make room, once they have."""
        best: tuple[tuple[float, ...], str, list[str]] | None = None
        for pod in self._pods.values():
            if not self._takes(pod, wish.model):
                continue
            yielding = self._yielding(pod, wish, rank, number)
            if yielding is not None:
                cost, victims = yielding
                best = min(best or (cost, pod.id, victims), (cost, pod.id, victims))
        if best is None:
            return None
        pod = self._pods[best[1]]
        for victim in best[2]:
            self._add(pod, victim, -1)
        return pod

    def _yielding(
        self, pod: Pod, wish: Wish, rank: Rank, number: int
    ) -> tuple[tuple[float, ...], list[str]] | None:
        """Whose TEs on `pod` make room for one of `wish`, least valuable first, and what that costs. None: they
        cannot."""
        kept = dict(self.plan[pod.id])
        victims: list[str] = []
        cost: tuple[float, ...] = ()
        try:
            while not self._fits(pod, wish.model, rank):
                found = [
                    (self._worth(pod, model), model)
                    for model, num in self.plan[pod.id].items()
                    if num and model != wish.model and self._yields(model, wish, rank, number)
                ]
                if not found:
                    return None
                worth, victim = min(found)
                self._add(pod, victim, -1)
                victims.append(victim)
                cost = max(cost, worth)
        finally:
            self.plan[pod.id] = kept
        return (len(victims), *cost), victims

    def _yields(self, model: str, to: Wish, rank: Rank, number: int) -> bool:
        wish = self._wishes.get(model)
        if wish is None:
            return True
        last = planned(self.plan, model)
        other = wish.rank(last)
        if other is Rank.NEEDED and rank is Rank.NEEDED:
            return wish.value / last * _MUCH_MORE < to.value / number
        return other > rank

    def _worth(self, pod: Pod, model: str) -> tuple[float, ...]:
        wish = self._wishes.get(model)
        last = planned(self.plan, model)
        if wish is None:
            return -float(Rank.KEPT), 0.0, 0.0
        return -float(wish.rank(last)), float(self._load(pod, model)), wish.value / last

    # ------------------------------------------------------------------------------------------------------ room

    def _num(self, pod: Pod, model: str) -> int:
        return self.plan[pod.id].get(model, 0)

    def _add(self, pod: Pod, model: str, num: int) -> None:
        numbers = self.plan[pod.id]
        numbers[model] = numbers.get(model, 0) + num
        if not numbers[model]:
            del numbers[model]

    def _takes(self, pod: Pod, model: str) -> bool:
        """Whether it would have one more, if there were room."""
        num = self._num(pod, model)
        return model in pod.costs and not pod.closed and num < pod.caps.get(model, num + 1)

    def _fits(self, pod: Pod, model: str, rank: Rank) -> bool:
        if not self._takes(pod, model):
            return False
        held = dict(pod.fixed)
        for name, num in (*self.plan[pod.id].items(), (model, 1)):
            held[name] = held.get(name, 0) + num
        num = sum(held.values())
        if rank > Rank.FIRST and num > pod.cores > 0:
            return False
        return num <= pod.max_tes and taken(pod, held) <= pod.num_bytes

    def _crowd(self, pod: Pod) -> float:
        num_tes = sum(self.plan[pod.id].values()) + sum(pod.fixed.values())
        return num_tes / max(pod.cores, 1)

    def _distance(self, pod: Pod, model: str) -> tuple[bool, float, float, str]:
        """How far one more TE is from being up there: cores for all, weights at hand, company."""
        crowd = self._crowd(pod) + 1 / max(pod.cores, 1)
        cost = pod.costs[model]
        if self._num(pod, model) or pod.fixed.get(model):
            absent = 0.0
        else:
            absent = 1.0 - min(cost.resident_bytes / max(cost.weights_bytes, 1), 1.0)
        return crowd > 1.0, absent, crowd, pod.id


def taken(pod: Pod, held: Mapping[str, int]) -> int:
    """Bytes of so many TEs of each model."""
    return sum(
        pod.costs[model].te_bytes * num + pod.costs[model].weights_bytes
        for model, num in held.items()
        if num and model in pod.costs
    )
