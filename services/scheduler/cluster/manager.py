"""The cluster manager's rim: hears of demand and of what there is, and while it leads, tells pod hosts what to have.

Every scheduler has one; all keep the books and follow the AUTOSCALER, so that any of them can take over, and one leads
by lease. A new leader's first plan is what it finds. It decides at once when somebody comes to wait or a pod host
changes, else four times a second, and its orders are repeated, so nothing hangs on any one message. Without a leader
everything stays as it is. This module must not hold any rule of how many TEs there are to be, or where.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Final

from services.scheduler.cluster import packer
from services.scheduler.cluster.autoscaler import Autoscaler, Cause, Observation, Verdict
from services.scheduler.cluster.chain import sources
from services.scheduler.cluster.lease import Lease
from services.scheduler.cluster.meters import Meters
from services.scheduler.cluster.orders import REPEAT_S, Orders
from services.scheduler.cluster.scaling import MAX_TES, Scaling
from services.scheduler.cluster.shortage import Shortages
from services.scheduler.cluster.signals import Signals
from services.scheduler.policy.base import COLOCATED
from services.scheduler.settings import SchedulerSettings
from shared.errors import DeepFlowError
from shared.messages import Down, TeBeat
from shared.scaling_messages import Demand, Fleet, PodBeat, ScaleOrder, Target
from shared.service import REST_BEAT_S, Service
from shared.table import heed_cancellation

_LEASE: Final = "cluster"
_TICK_S: Final = 0.25
_BREATH_S: Final = 0.05  # between two decisions: where dozens start, each has news every few ms
_LISTEN_S: Final = REST_BEAT_S + 0.2  # every pod host that lives has beaten by then
_SURPLUS_S: Final = (
    2.0  # so long there are too many before one goes: a pod host may be dead and not known to be
)
_REMEMBER_S: Final = 3600.0
_VALUE_S: Final = 10.0  # over which a model's value is smoothed
# Causes for which a target is what demand needs now, and not what is kept in spite of it.
_NEEDED: Final = (Cause.PARKED, Cause.BACKLOG, Cause.LOAD, Cause.SLOTS, Cause.LATE)


@dataclass(slots=True)
class _Model:
    """What is thought of one model."""

    autoscaler: Autoscaler = field(default_factory=Autoscaler)
    observation: Observation | None = None
    verdict: Verdict = field(default_factory=lambda: Verdict(0, "not seen yet"))
    seen: float = -math.inf
    value: float = 0.0
    surplus_since: float | None = None
    told: Fleet | None = None  # what everybody heard last
    told_at: float = -math.inf


class ClusterManager:
    """One scheduler's. `tes` gives the last beats of all TEs alive, `knows` whether the catalogue has a model."""

    def __init__(
        self,
        service: Service[SchedulerSettings],
        *,
        tes: Callable[[], Iterable[TeBeat]],
        knows: Callable[[str], Awaitable[bool]],
    ) -> None:
        bus = service.bus
        self._service = service
        self._bus = bus
        self._log = service.log
        self._tes = tes
        self._signals = Signals()
        self._shortages = Shortages()
        self._models: dict[str, _Model] = {}
        self._current: list[str] = []  # of these, those that can be run or are asked for
        self._plan: packer.Plan = {}
        self._led = 0  # the term of the last decision that counted
        self._wake = asyncio.Event()
        self._deaf_until = 0.0
        self._lease = Lease(
            bus,
            _LEASE,
            service.id,
            service.log,
            ttl_s=service.settings.cluster_lease_s,
            changed=self._wake.set,
        )
        self._scaling = Scaling(
            bus,
            service.log,
            knows=knows,
            default_max=self._default_max,
            changed=self._wake.set,
        )
        self._orders = Orders(
            bus,
            service.tasks,
            service.log,
            is_allowed=lambda term: term == self._lease.term,
            is_refused=self._on_refused,
        )
        self._meters = Meters(service.metrics, is_leading=lambda: self._lease.term > 0)

    async def start(self) -> None:
        """Listen, and want the lease. Raises Unavailable."""
        bus, subjects, tasks = self._bus, self._bus.subjects, self._service.tasks
        bus.on_disconnect(self._signals.hold)
        bus.on_reconnect(self._on_reconnect)
        self._deaf_until = time.monotonic() + _LISTEN_S
        await bus.listen(subjects.beat("pod", "*"), (PodBeat,), self._on_pod_beat)
        await bus.listen(subjects.demand("*"), (Demand,), self._on_demand)
        await bus.listen(subjects.down("pod", "*"), (Down,), self._on_pod_down)
        await self._scaling.start(tasks)
        tasks.create_task(self._lease.run(), name="lease")
        tasks.create_task(self._decide_loop(), name="decide")

    async def leave(self) -> None:
        """Lead no more: somebody else can at once."""
        self._orders.forget()
        try:
            await self._lease.leave()
        except DeepFlowError as error:
            self._log.warning("lease_kept", error=error.message)

    # ---------------------------------------------------------------------------------------------------- listening

    def on_te_ready(self) -> None:
        """A TE is up that was not."""
        self._wake.set()

    def _on_demand(self, demand: Demand) -> None:
        if self._signals.demand(demand, time.monotonic()):
            self._wake.set()

    def _on_pod_beat(self, beat: PodBeat) -> None:
        now, term = time.monotonic(), self._lease.term
        self._lease.outranked(beat.term)
        if term and beat.term <= term == self._led and self._orders.answered(beat.id):
            others = self._signals.elsewhere(beat.id)
            self._shortages.saw(beat, self._plan.get(beat.id, {}), now, others=others)
        if self._signals.pod_beat(beat, now):
            self._wake.set()

    def _on_pod_down(self, down: Down) -> None:
        self._signals.down(down.id)
        self._gone(down.id)

    def _gone(self, pod: str) -> None:
        self._shortages.forget(pod)
        self._orders.forget(pod)
        self._plan.pop(pod, None)
        self._wake.set()

    def _on_refused(self, pod: str) -> None:
        """It has had orders of a later leader."""
        known = self._signals.pods.get(pod)
        self._log.warning("order_refused", pod=pod, term=self._lease.term)
        self._lease.outranked(max(self._led + 1, known.term if known is not None else 0))

    def _on_reconnect(self) -> None:
        now = time.monotonic()
        self._signals.resume(now)
        self._deaf_until = now + _LISTEN_S
        self._wake.set()

    # ------------------------------------------------------------------------------------------------------ deciding

    async def _decide_loop(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):  # the usual case: nothing called for it earlier
                async with asyncio.timeout(_TICK_S):
                    await self._wake.wait()
            self._wake.clear()
            for fleet in self._decide(time.monotonic()):
                # A full buffer means the bus is away; it is told again.
                with contextlib.suppress(DeepFlowError):
                    await self._bus.publish(self._bus.subjects.fleet(fleet.model), fleet)
            heed_cancellation()
            await asyncio.sleep(_BREATH_S)

    def _decide(self, now: float) -> list[Fleet]:
        """Brings the books up to date and, if we lead, the plan; the orders are on their way. What is to be told."""
        signals = self._signals
        for pod in signals.lost(now):
            self._log.warning("pod_lost", pod=pod)
            self._gone(pod)
        if now < self._deaf_until:  # nothing is learned from what one could not hear
            return []
        signals.tes(self._tes(), now)
        self._current = sorted(signals.models(now))
        for model in self._current:
            self._observe(model, now)
        # What was learned of a model outlives its pod hosts' restarts.
        for gone in [name for name, one in self._models.items() if now - one.seen > _REMEMBER_S]:
            del self._models[gone]
            signals.forget(gone)
            self._meters.forget(gone)
        term = self._lease.term
        if not term or not self._bus.connected:
            return []
        if term != self._led:  # what somebody else has planned is seen in what there is
            self._led, self._plan, self._shortages = term, {}, Shortages()
            self._orders.forget()
        self._pack(now)
        self._order(term, now)
        return [fleet for model in self._current if (fleet := self._fleet(model, term, now))]

    def _observe(self, name: str, now: float) -> None:
        model = self._models.setdefault(name, _Model())
        observation = self._signals.observe(name, self._scaling.entries.get(name), now)
        verdict = model.autoscaler.observe(observation, now)
        if verdict.target != model.verdict.target:
            self._meters.decided(verdict.cause, more=verdict.target > model.verdict.target)
        load = observation.running + observation.waiting + observation.parked
        share = 1.0 - math.exp(min(0.0, model.seen - now) / _VALUE_S)
        model.value += (load - model.value) * share
        model.observation, model.verdict, model.seen = observation, verdict, now
        self._meters.saw(name, observation, verdict)

    def _pack(self, now: float) -> None:
        pods = self._signals.packable(self._shortages.caps(now), now)
        wishes = []
        for name in self._current:
            model = self._models[name]
            observation, verdict = model.observation, model.verdict
            assert observation is not None  # a decision looks first
            if packer.planned(self._plan, name) <= verdict.target:
                model.surplus_since = None
            elif model.surplus_since is None:
                model.surplus_since = now
            since = model.surplus_since
            wishes.append(
                packer.Wish(
                    model=name,
                    target=verdict.target,
                    min_tes=observation.min_tes,
                    needed=_needed(observation, verdict),
                    value=model.value,
                    may_shrink=since is not None and now - since >= _SURPLUS_S,
                )
            )
        plan = packer.pack(pods, wishes, self._plan)
        for pod, numbers in plan.items():
            if numbers != self._plan.get(pod):
                self._log.info("planned", pod=pod, tes=numbers, before=self._plan.get(pod))
        self._plan = plan

    def _order(self, term: int, now: float) -> None:
        pods = self._signals.pods
        preload = self._signals.wanted(now)
        givers = {model: sources(model, pods.values()) for model in self._current}
        for pod, numbers in self._plan.items():
            targets = [
                Target(
                    model=model,
                    role=COLOCATED,
                    num=num,
                    sources=givers.get(model, {}).get(pod, []),
                )
                for model, num in sorted(numbers.items())
            ]
            targets += [
                Target(model=model, role=role, num=num)
                for (model, role), num in sorted(self._signals.fixed(pod).items())
            ]
            known = {model.name for model in pods[pod].models}
            order = ScaleOrder(
                by=self._service.id,
                term=term,
                targets=targets,
                preload=[model for model in preload if model in known],
            )
            self._orders.give(pod, order, now)

    def _fleet(self, name: str, term: int, now: float) -> Fleet | None:
        """What everybody is to hear about a model, if that is new or was last told a while ago."""
        model = self._models[name]
        observation = model.observation
        assert observation is not None
        there, planned = self._signals.fleet(name), packer.planned(self._plan, name)
        fixed = there.fixed
        coming = there.starting + there.fixed - there.fixed_ready
        fleet = Fleet(
            model=name,
            term=term,
            target=model.verdict.target + fixed,
            ready=there.ready + there.fixed_ready,
            starting=max(coming, planned + fixed - there.ready - there.fixed_ready, 0),
            progress=there.progress,
            eta_ms=self._eta_ms(name, there.progress if coming else 0, planned - there.ready),
            reason=model.verdict.reason,
            short=planned < model.verdict.target,
            min_tes=observation.min_tes + fixed,
            # Where the one pod host was killed a moment ago nobody has said that there may be none.
            max_tes=observation.max_tes + fixed if self._is_bounded(name) else -1,
        )
        if (
            model.told is not None
            and now - model.told_at < REPEAT_S
            and _gist(model.told) == _gist(fleet)
        ):
            return None
        model.told, model.told_at = fleet, now
        return fleet

    def _default_max(self, name: str) -> int:
        """How many TEs there may be where nothing is set; where no pod host is heard of just now, nobody can tell."""
        return self._signals.bounds(name, None)[1] if self._signals.can_run(name) else MAX_TES

    def _is_bounded(self, name: str) -> bool:
        entry = self._scaling.entries.get(name)
        is_set = entry is not None and entry.max_tes is not None
        return is_set or self._signals.can_run(name)

    def _eta_ms(self, name: str, progress: int, coming: int) -> int:
        """When the next TE is expected to be ready; -1: none is on its way."""
        if coming <= 0 and not progress:
            return -1
        return round(self._signals.start_s(name) * (100 - min(progress, 100)) * 10)

    # --------------------------------------------------------------------------------------------------- what is told

    def status(self) -> dict[str, Any]:
        """For people: who leads, and what this one thinks."""
        signals = self._signals
        return {
            "leading": self._lease.term > 0,
            "leader": self._lease.holder,
            "term": self._lease.term or max((pod.term for pod in signals.pods.values()), default=0),
            "models": {name: self._explain(name) for name in self._current},
            "pods": {
                pod.id: {
                    "host": pod.host,
                    "tes": len(pod.tes),
                    "warm": pod.num_warm,
                    "term": pod.term,
                    "planned": self._plan.get(pod.id) if self._lease.term else None,
                }
                for pod in signals.pods.values()
            },
        }

    def _explain(self, name: str) -> dict[str, Any]:
        model, there = self._models[name], self._signals.fleet(name)
        observation = model.observation
        assert observation is not None
        return {
            "target": model.verdict.target,
            "reason": model.verdict.reason,
            "cause": model.verdict.cause.value,
            "ready": there.ready,
            "starting": there.starting,
            "draining": there.draining,
            "parked": observation.parked,
            "parked_wait_s": round(observation.parked_wait_s, 1),
            "min": observation.min_tes,
            "max": observation.max_tes,
            "planned": packer.planned(self._plan, name) if self._lease.term else None,
            "start_s": round(observation.start_s, 3),
        }


def _needed(observation: Observation, verdict: Verdict) -> int:
    """How many TEs demand needs at this moment; the others of the target are kept for later."""
    if verdict.cause in _NEEDED:
        return verdict.target
    num = observation.running + observation.waiting + observation.parked
    if not num:
        return 0
    return min(verdict.target, math.ceil(num / max(observation.num_slots, 1)))


def _gist(fleet: Fleet) -> Fleet:
    """What makes it news."""
    return replace(fleet, progress=fleet.progress // 20, eta_ms=int(fleet.eta_ms < 0), reason="")
