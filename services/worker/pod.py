"""The pod host: one per machine or container. It has the Task Executors that it is to have, and says which it has.

What it is to have comes from its settings until the first order, then from orders; `groups` compares it with what there
is, `place` watches over each TE, `budget` says for how many there is room, `stock` knows the models, and `trainer` has
other processes, which learn something and end. It must not know what a TE computes, and imports no torch: it is what
stays up.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import time
from collections import Counter
from typing import TYPE_CHECKING, Final

from services.worker.budget import Budget, default_bytes, memory_bytes
from services.worker.flowserve.device.pick import pick
from services.worker.groups import Group, reconcile
from services.worker.meters import Meters
from services.worker.place import Place, Surroundings
from services.worker.registrar import Registrar
from services.worker.settings import WorkerSettings, default_threads, num_cores
from services.worker.starter import Starter
from services.worker.starts import Starts
from services.worker.stock import Stock
from services.worker.tie import Assignment
from services.worker.trainer import Trainer
from services.worker.visible import num_places, present, visible
from shared.errors import Forbidden, ModelNotFound, Unavailable
from shared.liveness import Liveness
from shared.messages import Registration
from shared.restarts import Restarts
from shared.scaling_messages import PodBeat, Scaled, ScaleOrder, Start
from shared.service import Service, host_name

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

_JUDGE_S: Final = 0.25
_TURNS: Final = 4  # processes that are being made at once
_NEWS_S: Final = 0.1  # what changes within this time is told in one beat
# No beat for so long, or no progress for so long beyond the predicted step: the TE hangs. On purpose more patient than
# gateways and JEs (1.5 s). If they are wrong about a TE that is merely slow, requests move; if we are, weights are
# loaded again, on a machine that is slow already. It also covers a TE that finds the bus again later than we do.
HUNG_S: Final = 5.0
_LAST_WORDS_S: Final = 5.0  # beyond the grace, what TEs get to say their last words
COLOCATED: Final = "colocated"


class Pod:
    """Has the TEs of each model, of every role, until the service stops. Raises ModelNotFound, ModelError, Unavailable
    where there can be none."""

    def __init__(self, service: Service[WorkerSettings], env: Mapping[str, str]) -> None:
        settings = service.settings
        self._service = service
        self._settings = settings
        self._env = env
        self._bus = service.bus
        self._log = service.log
        self._liveness = Liveness(HUNG_S)
        self._meters = Meters(service.metrics)
        self._starter = Starter(service, env)
        self._starts = Starts()
        self._trainer = Trainer(service, env)
        self._registrar = Registrar(service.bus, service.log)
        self._around = Surroundings(
            service=service,
            starter=self._starter,
            turns=asyncio.Semaphore(_TURNS),
            meters=self._meters,
            registrar=self._registrar,
            liveness=self._liveness,
            assignment=self._assignment,
            changed=self._change,
            came_up=self._came_up,
            gave_up=self._gave_up,
        )
        self._device = pick(settings.device).name
        self._num_present = present(self._device)
        self._stock = Stock(settings)
        roles = {"prefill": settings.num_prefill, "decode": settings.num_decode}
        # Fixed: orders are about colocated TEs.
        self._fixed = {
            Group(model, role): number
            for model in settings.models
            for role, number in roles.items()
            if number
        }
        self._wanted = self._fixed | {
            Group(model, COLOCATED): settings.min_tes for model in settings.models
        }
        self._fleet = Counter[str]()  # what is always to be up, by model
        for group, number in self._wanted.items():
            self._fleet[group.model] += number
        self._budget = self._make_budget()
        self._sources: dict[Group, list[str]] = {}
        self._asked: dict[Group, float] = {}  # when more of a group were last asked for
        self._term = 0
        self._short: dict[Group, int] = {}
        self._places: dict[int, Place] = {}
        self._restarts: dict[tuple[Group, int], Restarts] = {}
        self._keepers: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()

    async def open(self) -> None:
        """Announce the models and start everything. Raises ModelError, Unavailable."""
        service = self._service
        self._visible(0)  # too few devices for one TE are told of before it is started
        for entry in self._stock.entries:
            self._registrar.put("models", entry.name, entry)
        registration = Registration(kind="pod", id=service.id, host=host_name(), pid=os.getpid())
        self._registrar.put("registrations", service.id, registration)
        self._bus.on_disconnect(self._liveness.hold)
        self._bus.on_reconnect(lambda: self._liveness.resume(time.monotonic()))
        service.status(self._status)
        service.on_drain(self._drain)
        self._reconcile()
        self._say_ready()
        await self._starter.open()
        service.beat(self._beat)
        for name, work in (
            ("registrar", self._registrar.keep()),
            ("judge", self._judge()),
            ("news", self._tell_news()),
            ("stock", self._stock.keep()),
        ):
            service.tasks.create_task(work, name=name)
        await self._bus.serve(self._bus.subjects.scale(service.id), (ScaleOrder,), self._order)
        await self._trainer.open()

    def _make_budget(self) -> Budget:
        settings, fleet, costs = self._settings, self._fleet, self._stock.costs
        ranks = settings.tp * settings.pp
        own = num_places(self._device, self._env, num_present=self._num_present, num_ranks=ranks)
        # TEs share accelerators only where so many are asked for by name.
        max_tes = (
            settings.pod_tes if own is None else min(settings.pod_tes, max(own, fleet.total()))
        )
        num_bytes = settings.pod_bytes or default_bytes(costs, fleet, memory_bytes())
        return Budget(max_tes, num_bytes, costs)

    # ------------------------------------------------------------------------------------------ what there is to be

    async def _order(self, order: ScaleOrder) -> Scaled:
        """Answers `scale.<pod>`. Raises Forbidden for one of an earlier term, ModelNotFound, Unavailable."""
        if self._service.stopping.is_set():
            raise Unavailable("the pod host leaves")
        if order.term < self._term:
            raise Forbidden(f"an order of term {order.term} after one of term {self._term}")
        for target in order.targets:
            if target.model not in self._stock:
                raise ModelNotFound(f"model {target.model!r} is not one of this pod host")
        self._term = order.term
        colocated = {
            Group(target.model, target.role): target
            for target in order.targets
            if target.role == COLOCATED
        }
        wanted = self._fixed | {group: target.num for group, target in colocated.items()}
        now = time.monotonic()
        for group, number in wanted.items():
            if number > self._wanted.get(group, 0):
                self._asked[group] = now
        if wanted != self._wanted:
            told = {f"{model}/{role}": number for (model, role), number in wanted.items()}
            self._log.info("order_taken", by=order.by, term=order.term, wanted=told)
        self._wanted = wanted
        self._sources = {group: list(target.sources) for group, target in colocated.items()}
        self._stock.preload(order.preload)
        self._reconcile()
        return Scaled(pod=self._service.id, term=order.term)

    def _reconcile(self) -> None:
        """Start what is missing and let go what is too much."""
        if self._service.stopping.is_set():
            return
        seats = [place.seat() for place in self._places.values()]
        plan = reconcile(self._wanted, seats, self._budget)
        for number in plan.leave:
            self._places[number].leave(self._settings.migrate_after_s)
        for group in plan.start:
            self._have(group)
        if plan.short and plan.short != self._short:
            held = Counter(place.group.model for place in self._places.values())
            self._log.warning(
                "no_room",
                missing={f"{model}/{role}": number for (model, role), number in plan.short.items()},
                num_tes=len(self._places),
                max_tes=self._budget.max_tes,
                num_bytes=self._budget.taken(held),
                max_bytes=self._budget.num_bytes,
                remedy="DEEPFLOW_POD_TES, DEEPFLOW_POD_BYTES, DEEPFLOW_KV_TOKENS",
            )
        self._short = plan.short
        if plan.start or plan.leave:
            self._say_ready()

    def _have(self, group: Group) -> None:
        """One more TE of a group."""
        number = next(index for index in range(self._budget.max_tes) if index not in self._places)
        restarts = self._restarts.setdefault((group, number), Restarts())
        asked = self._asked.get(group, time.monotonic())
        place = self._places[number] = Place(number, group, restarts, self._around, asked=asked)
        keeper = self._service.tasks.create_task(
            self._keep(place), name=f"{group.model}/{group.role}/{number}"
        )
        self._keepers.add(keeper)
        keeper.add_done_callback(self._keepers.discard)

    async def _keep(self, place: Place) -> None:
        try:
            await place.keep()
        finally:
            del self._places[place.number]
        self._change()
        self._reconcile()  # there may be room now for what there was none for

    def _assignment(self, place: Place) -> Assignment:
        """What the next TE in a place is to be."""
        model, role = place.group
        return Assignment(
            model=model,
            role=role,
            devices=self._visible(place.number),
            threads=self._threads(model),
            sources=self._sources.get(place.group, []),
        )

    def _visible(self, number: int) -> dict[str, str]:
        ranks = self._settings.tp * self._settings.pp
        return visible(
            self._device, self._env, num_present=self._num_present, place=number, num_ranks=ranks
        )

    def _threads(self, model: str) -> int:
        """A share of the cores, unless it is set."""
        ranks = self._settings.tp * self._settings.pp
        num_tes = max(1, sum(self._wanted.values())) * ranks
        native = self._stock.is_native(model)
        return self._settings.threads or default_threads(num_cores(), num_tes, native=native)

    # ------------------------------------------------------------------------------------------------- what there is

    def _came_up(self, place: Place, start: Start) -> None:
        """A TE is up, and everybody who listens has heard so."""
        self._starts.add(start, time.monotonic())
        self._meters.started(start)
        self._log.info(
            "te_up",
            te=start.te,
            model=start.model,
            process=start.process,
            weights=start.weights,
            total_s=start.total_s,
            **start.steps,
        )
        if place.child is not None:
            work = self._measure(start.model, place.child.pid)
            self._service.tasks.create_task(work, name=f"measure {start.te}")
        self._change()

    async def _measure(self, model: str, pid: int) -> None:
        if await self._stock.measure(model, pid):
            self._budget = self._make_budget()
            self._reconcile()

    def _gave_up(self, place: Place, reason: str) -> None:
        """TEs of a place die again and again. Where nothing else runs or may be asked for, so does the pod host."""
        model, settings = place.group.model, self._settings
        others = any(
            other.state == "ready" and other.group.model != model for other in self._places.values()
        )
        why = f"a TE of {model} died five times in a minute: {reason}"
        if settings.min_tes == settings.max_tes and not others:
            self._service.stop(why)
        else:
            self._log.error("te_rests", model=model, role=place.group.role, reason=why)

    async def _judge(self) -> None:
        """Have what hangs killed; its keeper starts another."""
        while True:
            await asyncio.sleep(_JUDGE_S)
            now = time.monotonic()
            lost = set(self._liveness.lost(now))
            for place in list(self._places.values()):
                await place.judge(now, lost=place.te in lost)

    def _change(self) -> None:
        self._say_ready()
        self._changed.set()

    async def _tell_news(self) -> None:
        """Beat at once when something has changed."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            await self._service.beat_now()
            await asyncio.sleep(_NEWS_S)

    def _say_ready(self) -> None:
        """Ready: of every model that is always to be up there is a TE that is. An order that lets it go is no fault."""
        ready = {place.group.model for place in self._places.values() if place.state == "ready"}
        wanted = Counter[str]()
        for group, number in self._wanted.items():
            if group in self._fixed or self._settings.min_tes:
                wanted[group.model] += number
        self._service.ready(all(model in ready for model, number in wanted.items() if number))

    def _beat(self) -> PodBeat:
        now = time.monotonic()
        places = self._places.values()
        return PodBeat(
            kind="pod",
            id=self._service.id,
            host=host_name(),
            draining=self._service.stopping.is_set(),
            in_flight=sum(place.state in ("starting", "loading", "draining") for place in places),
            term=self._term,
            models=self._stock.describe(),
            tes=[place.beat(now) for place in places],
            num_warm=self._starter.num_warm,
            max_tes=self._budget.max_tes,
            num_bytes=self._budget.num_bytes,
            cores=num_cores(),
            starts=self._starts.recent(now),
        )

    def _status(self) -> dict[str, Any]:
        held = Counter(place.group.model for place in self._places.values())
        return {
            "tes": [place.status() for place in self._places.values()],
            "starts": [dataclasses.asdict(start) for start in self._starts.all()],
            "term": self._term,
            "num_warm": self._starter.num_warm,
            "taken_bytes": self._budget.taken(held),
            "num_bytes": self._budget.num_bytes,
            "resident_bytes": dict(self._stock.resident),
        }

    # --------------------------------------------------------------------------------------------------- draining

    async def _drain(self) -> None:
        """Let the TEs finish what they have (they know their own grace), then end them."""
        for place in self._places.values():
            place.leave(None)
        await self._trainer.leave()
        if self._keepers:
            grace_s = self._settings.grace_s + _LAST_WORDS_S
            _, late = await asyncio.wait(self._keepers, timeout=grace_s)
            for place in self._places.values():
                place.kill()
            if late:
                await asyncio.wait(late, timeout=_LAST_WORDS_S)
        await self._starter.close()
        await self._registrar.remove("registrations", self._service.id)


async def open_pod(service: Service[WorkerSettings]) -> None:
    """A pod host's `main` for `service.run`."""
    await Pod(service, os.environ).open()
