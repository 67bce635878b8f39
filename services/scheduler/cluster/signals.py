"""What the cluster manager knows: pod hosts and their TEs by their beats, demand by what the JEs say.

Every manager keeps these books, leading or not, so that one that takes over knows the recent past. A pod host that is
slow to beat while its TEs do is alive. Demand is told as counters that only grow; what a JE counted before it was first
heard of is the past, but for those who are parked. Pure: the clock is passed in; this module must not know the bus, or
what is made of the numbers.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Final

from services.scheduler.cluster.autoscaler import Observation
from services.scheduler.cluster.packer import Cost, Pod
from services.scheduler.policy.base import COLOCATED
from shared.liveness import Liveness
from shared.messages import TeBeat
from shared.scaling_messages import Demand, PodBeat, PodTe, ScalingEntry

POD_S: Final = (
    3.0  # without a beat of it or of its TEs: a host where many start at once is slow to speak
)
DEMAND_S: Final = (
    2.0  # for as long a JE's parked requests count: it repeats itself while it has any
)
START_S: Final = 1.0  # how long a start takes, until one was seen
_STARTS: Final = 8  # of a model, that the next one's time is taken from
_KEPT_STARTS: Final = 1024
_MAX_DEMANDS: Final = 16_384  # pairs of JE and model
_ASKED_S: Final = 60.0  # a model that no pod host runs is talked about for so long
_WANTED_S: Final = 600.0  # over which demand is remembered, for what is to be kept in memory
_COMING: Final = ("starting", "loading", "waiting")


@dataclass(slots=True)
class _Told:
    """The last `Demand` of a JE for a model."""

    demand: Demand
    when: float


@dataclass(slots=True)
class _Since:
    """What came since the last observation."""

    arrivals: int = 0
    work_s: float = 0.0
    answered: int = 0
    late: int = 0


@dataclass(slots=True)
class _Demanded:
    """One model's demand, of all JEs."""

    told: dict[str, _Told] = field(default_factory=dict)
    since: _Since = field(default_factory=_Since)
    wanted: float = 0.0  # arrivals, fading
    wanted_at: float = 0.0

    def fade(self, now: float) -> float:
        """How much the model was asked for of late."""
        self.wanted *= math.exp((self.wanted_at - now) / _WANTED_S)
        self.wanted_at = now
        return self.wanted

    def parked(self, now: float) -> tuple[int, float]:
        """How many wait, and how long the first of them has."""
        fresh = [told for told in self.told.values() if now - told.when <= DEMAND_S]
        waits = [
            told.demand.waited_ms / 1000 + now - told.when for told in fresh if told.demand.parked
        ]
        return sum(told.demand.parked for told in fresh), max(waits, default=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """The TEs of a model as they are; those of fixed roles are `fixed`."""

    ready: int = 0
    starting: int = 0
    draining: int = 0
    fixed: int = 0
    fixed_ready: int = 0
    progress: int = 0  # percent, of the one that is furthest on its way


class Signals:
    """The books. Bounded by the pod hosts that beat, and by the JEs and models that are talked about."""

    def __init__(self) -> None:
        self.pods: dict[str, PodBeat] = {}
        self._life = Liveness(POD_S)
        self._spoke: dict[str, float] = {}  # pod -> when it last did itself
        self._tes: dict[str, TeBeat] = {}
        self._demands: dict[str, _Demanded] = {}
        self._took: dict[str, deque[float]] = {}  # model -> seconds that its last starts took
        self._started: dict[str, None] = {}  # TEs whose start is counted
        self._fixed: dict[
            str, dict[tuple[str, str], int]
        ] = {}  # pod -> unplanned group -> most seen

    # ---------------------------------------------------------------------------------------------------- listening

    def demand(self, demand: Demand, now: float) -> bool:
        """What a JE was asked for; True if somebody waits who did not before."""
        demanded = self._demands.setdefault(demand.model, _Demanded(wanted_at=now))
        told = demanded.told.get(demand.je)
        if told is not None and demand.arrivals < told.demand.arrivals:
            told = None  # it had to forget the model, and counts anew
        before = told.demand if told is not None else _unheard(demand)
        since = demanded.since
        arrivals = max(0, demand.arrivals - before.arrivals)
        since.arrivals += arrivals
        since.work_s += max(0, demand.work_ms - before.work_ms) / 1000
        since.answered += max(0, demand.answered - before.answered)
        since.late += max(0, demand.late - before.late)
        demanded.wanted = demanded.fade(now) + arrivals
        demanded.told[demand.je] = _Told(demand, now)
        if sum(len(one.told) for one in self._demands.values()) > _MAX_DEMANDS:
            self._forget_oldest()
        was_parked = told is not None and now - told.when <= DEMAND_S and told.demand.parked > 0
        return (
            arrivals > 0 or demand.parked > before.parked or (demand.parked > 0 and not was_parked)
        )

    def _forget_oldest(self) -> None:
        model, je = min(
            ((model, je) for model, one in self._demands.items() for je in one.told),
            key=lambda pair: self._demands[pair[0]].told[pair[1]].when,
        )
        del self._demands[model].told[je]
        if not self._demands[model].told:
            del self._demands[model]

    def pod_beat(self, beat: PodBeat, now: float) -> bool:
        """A pod host lives; True if something is other than it was."""
        before = self.pods.get(beat.id)
        self._life.beat(beat.id, now)
        self._spoke[beat.id] = now
        self.pods[beat.id] = beat
        for start in beat.starts:
            if start.te not in self._started and 0.0 <= start.total_s < math.inf:
                self._started[start.te] = None
                self._took.setdefault(start.model, deque(maxlen=_STARTS)).append(start.total_s)
        while len(self._started) > _KEPT_STARTS:
            del self._started[next(iter(self._started))]
        groups = self._fixed.setdefault(beat.id, {})
        counted: dict[tuple[str, str], int] = {}
        for te in beat.tes:
            if te.role != COLOCATED and te.state != "draining":
                group = (te.model, te.role)
                counted[group] = counted.get(group, 0) + 1
        for group, num in counted.items():
            groups[group] = max(groups.get(group, 0), num)
        return before is None or _gist(before) != _gist(beat)

    def tes(self, beats: Iterable[TeBeat], now: float) -> None:
        """All TEs that are alive, by their last beats. They speak for their pod hosts, too."""
        self._tes = {beat.id: beat for beat in beats}
        for beat in self._tes.values():
            if beat.pod in self.pods and beat.state != "draining" and self._life.alive(beat.pod):
                self._life.beat(beat.pod, now)

    def down(self, pod: str) -> None:
        """A pod host is declared dead."""
        self._life.down(pod)
        self._forget(pod)

    def lost(self, now: float) -> list[str]:
        """Pod hosts that fell silent since the last call."""
        lost = self._life.lost(now)
        for pod in lost:
            self._forget(pod)
        return lost

    def _forget(self, pod: str) -> None:
        for book in (self.pods, self._spoke, self._fixed):
            book.pop(pod, None)

    def forget(self, model: str) -> None:
        """Nobody has run it or asked for it for long."""
        self._demands.pop(model, None)
        self._took.pop(model, None)

    def hold(self) -> None:
        """Our bus connection is away: nobody is judged."""
        self._life.hold()

    def resume(self, now: float) -> None:
        """It is back; what was parked will be told again."""
        self._life.resume(now)

    # --------------------------------------------------------------------------------------------------- what there is

    def models(self, now: float) -> set[str]:
        """Those that a pod host can run, or somebody has just asked for."""
        asked = {
            model
            for model, one in self._demands.items()
            if any(now - told.when <= _ASKED_S for told in one.told.values())
        }
        return {model.name for pod in self._live() for model in pod.models} | asked

    def fleet(self, model: str) -> Fleet:
        """A model's TEs."""
        states = [self._state(te) for te in self._places(model) if te.role == COLOCATED]
        others = [self._state(te) for te in self._places(model) if te.role != COLOCATED]
        progress = [
            te.progress for te in self._places(model) if self._state(te) in ("starting", "loading")
        ]
        return Fleet(
            ready=states.count("ready"),
            starting=sum(state in _COMING for state in states),
            draining=states.count("draining"),
            fixed=sum(state != "draining" for state in others),
            fixed_ready=others.count("ready"),
            progress=max(progress, default=0),
        )

    def can_run(self, model: str) -> bool:
        """Whether a pod host is there that could."""
        return any(one.name == model for pod in self._live() for one in pod.models)

    def bounds(self, model: str, entry: ScalingEntry | None) -> tuple[int, int]:
        """How few and how many TEs there may be: what an operator set, else what the pod hosts' settings come to."""
        known = [one for pod in self._live() for one in pod.models if one.name == model]
        low, high = sum(one.min_tes for one in known), sum(one.max_tes for one in known)
        if entry is not None:
            low = low if entry.min_tes is None else entry.min_tes
            high = high if entry.max_tes is None else entry.max_tes
        return min(low, high), high

    def observe(self, model: str, entry: ScalingEntry | None, now: float) -> Observation:
        """One model's numbers; those that are counted since the last call start anew."""
        fleet = self.fleet(model)
        low, high = self.bounds(model, entry)
        beats = [
            beat
            for beat in self._tes.values()
            if beat.model == model and beat.role == COLOCATED and beat.state != "draining"
        ]
        slots = [one.num_slots for pod in self._live() for one in pod.models if one.name == model]
        demanded = self._demands.get(model)
        since, parked = _Since(), (0, 0.0)
        if demanded is not None:
            since, demanded.since = demanded.since, _Since()
            parked = demanded.parked(now)
        return Observation(
            model=model,
            min_tes=low,
            max_tes=high,
            ready=fleet.ready,
            starting=fleet.starting,
            draining=fleet.draining,
            num_slots=max(slots, default=0),
            running=sum(beat.running for beat in beats),
            waiting=sum(beat.waiting for beat in beats),
            parked=parked[0],
            parked_wait_s=parked[1],
            arrivals=since.arrivals,
            work_s=since.work_s,
            answered=since.answered,
            late=since.late,
            start_s=self.start_s(model),
            keep_alive_s=entry.keep_alive_s if entry is not None else None,
        )

    def start_s(self, model: str) -> float:
        """How long a start takes, as far as one has seen: of this model, else of any."""
        took = self._took.get(model) or [s for one in self._took.values() for s in one]
        return median(took) if took else START_S

    def wanted(self, now: float) -> list[str]:
        """The models that pod hosts can run, the one that was asked for most of late first."""
        known = {model.name for pod in self._live() for model in pod.models}
        scores = {
            model: one.fade(now) if (one := self._demands.get(model)) is not None else 0.0
            for model in known
        }
        return sorted(known, key=lambda model: (-scores[model], model))

    def fixed(self, pod: str) -> dict[tuple[str, str], int]:
        """The TEs of a pod host that are not planned, by model and role."""
        return dict(self._fixed.get(pod, {}))

    # ----------------------------------------------------------------------------------------------------- for packing

    def packable(self, caps: Mapping[str, Mapping[str, int]], now: float) -> list[Pod]:
        """The pod hosts that TEs can be put on; `caps`: of some models one can have so many at the most. One that only
        its TEs speak for may not hear of anything new."""
        return [
            self._packable(pod, caps.get(pod.id, {}), closed=now - self._spoke[pod.id] > POD_S)
            for pod in self._live()
        ]

    def elsewhere(self, pod: str) -> set[str]:
        """The models that another pod host could run."""
        return {model.name for one in self._live() if one.id != pod for model in one.models}

    def _packable(self, pod: PodBeat, caps: Mapping[str, int], *, closed: bool) -> Pod:
        loads: dict[str, list[int]] = {}
        for te in pod.tes:
            if te.role == COLOCATED and self._state(te) != "draining":
                beat = self._tes.get(te.te)
                load = beat.running + beat.waiting if beat is not None else 0
                loads.setdefault(te.model, []).append(load)
        fixed: dict[str, int] = {}
        for (model, _), num in self._fixed.get(pod.id, {}).items():
            fixed[model] = fixed.get(model, 0) + num
        return Pod(
            id=pod.id,
            max_tes=pod.max_tes,
            num_bytes=pod.num_bytes,
            cores=pod.cores,
            costs={
                model.name: Cost(
                    te_bytes=model.te_bytes,
                    weights_bytes=model.weights_bytes,
                    resident_bytes=model.resident_bytes,
                )
                for model in pod.models
            },
            loads={model: sorted(numbers) for model, numbers in loads.items()},
            fixed=fixed,
            caps=caps,
            closed=closed,
        )

    def _live(self) -> list[PodBeat]:
        return [pod for pod in self.pods.values() if not pod.draining]

    def _places(self, model: str) -> Iterator[PodTe]:
        for pod in self._live():
            for te in pod.tes:
                if te.model == model:
                    yield te

    def _state(self, te: PodTe) -> str:
        """Of a TE: its own word is fresher than its pod host's, but for what its pod host does to it."""
        beat = self._tes.get(te.te)
        if te.state == "draining" or beat is None:
            return "loading" if te.state == "ready" else te.state
        return beat.state


def _gist(beat: PodBeat) -> tuple[object, ...]:
    """What others decide by."""
    tes = sorted((te.te, te.model, te.role, te.state) for te in beat.tes)
    models = sorted((one.name, one.min_tes, one.max_tes) for one in beat.models)
    return beat.draining, beat.term, beat.max_tes, beat.num_bytes, tes, models


def _unheard(demand: Demand) -> Demand:
    """What to compare a JE's first word with: of all it ever counted, only those who wait are new."""
    old = max(0, demand.arrivals - demand.parked)
    return Demand(
        je=demand.je,
        model=demand.model,
        arrivals=old,
        work_ms=demand.work_ms * old // max(demand.arrivals, 1),
        answered=demand.answered,
        late=demand.late,
    )
