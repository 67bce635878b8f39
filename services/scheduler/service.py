"""The rim of a Job Executor: what it listens to, what it serves, its clocks, and the order in which it leaves."""

from __future__ import annotations

import asyncio
import time
from random import Random
from typing import Any

from services.scheduler.clients import Clients
from services.scheduler.dispatch import Dispatcher
from services.scheduler.executor import JobExecutor
from services.scheduler.handover import Handovers
from services.scheduler.parking import ParkingLot
from services.scheduler.registry import Registry
from services.scheduler.settings import SchedulerSettings
from shared.bus import Subscription, Table
from shared.errors import DeepFlowError
from shared.liveness import Liveness
from shared.messages import (
    Accepted,
    Beat,
    Cancel,
    Down,
    ModelEntry,
    Prefilled,
    Registration,
    Request,
    TaskEnded,
    TeBeat,
)
from shared.service import Service
from shared.subjects import QUEUE_SCHEDULER
from shared.table import keep_read

_TICK_S = 0.25
_REFRESH_S = 5.0


class Scheduler:
    """Wires a JobExecutor to the bus."""

    def __init__(
        self, service: Service[SchedulerSettings], models: Table, registrations: Table
    ) -> None:
        settings = service.settings
        self._service = service
        self._models = models
        self._registrations = registrations
        self._catalogue: dict[str, ModelEntry] = {}
        self._refresh_now = asyncio.Event()
        self._registry = Registry(Liveness())
        self._clients = Liveness()
        self._dispatcher = Dispatcher(
            service.bus,
            self._registry,
            service.metrics,
            je=service.id,
            timeout_s=settings.task_timeout_s,
            decisions_kept=settings.decisions_kept,
            random=Random(settings.seed),
        )
        self._lot = ParkingLot(
            max_requests=settings.park_max_requests,
            max_bytes=settings.park_max_bytes,
            max_park_s=settings.park_max_s,
        )
        clients = Clients(service.bus, service.id)
        handovers = Handovers(
            service.bus,
            self._registry,
            self._dispatcher,
            clients,
            service.metrics,
            je=service.id,
            min_tokens=settings.pd_min_tokens,
            find_model=self._find_model,
        )
        self._executor = JobExecutor(
            self._registry,
            handovers,
            clients,
            self._lot,
            service.tasks,
            je=service.id,
            find_model=self._find_model,
        )
        metrics = service.metrics
        self._requests = metrics.counter(
            "deepflow_scheduler_requests_total", "Requests by their first answer.", ["outcome"]
        )
        self._ended = metrics.counter(
            "deepflow_scheduler_tasks_ended_total", "Tasks by how they ended.", ["finish"]
        )
        metrics.gauge("deepflow_scheduler_parked", "Requests parked.").set_function(
            lambda: len(self._lot)
        )
        metrics.gauge("deepflow_scheduler_parked_bytes", "Memory of them.").set_function(
            lambda: self._lot.num_bytes
        )
        metrics.gauge("deepflow_scheduler_active", "Requests answered for.").set_function(
            lambda: len(self._executor)
        )
        metrics.gauge("deepflow_scheduler_tes", "TEs that count as alive.").set_function(
            lambda: len(self._registry.beats())
        )

    async def start(self) -> None:
        """Listen first, so that beats are under way when the first request comes; then serve."""
        service, bus, subjects = self._service, self._service.bus, self._service.bus.subjects
        bus.on_disconnect(self._on_disconnect)
        bus.on_reconnect(self._on_reconnect)
        await bus.listen(subjects.beat("te", "*"), (TeBeat,), self._on_te_beat)
        await bus.listen(subjects.beat("gateway", "*"), (Beat,), self._on_client_beat)
        await bus.listen(subjects.down("*", "*"), (Down,), self._on_down)
        await bus.listen(subjects.cancel(service.id), (Cancel,), self._executor.on_cancel)
        await bus.listen(subjects.events(service.id), (TaskEnded, Prefilled), self._on_event)
        await self._refresh()
        intake = await bus.serve(
            subjects.request("*"),
            (Request,),
            self._admit,
            queue=QUEUE_SCHEDULER,
            limit=service.settings.max_in_flight,
        )
        service.tasks.create_task(self._tick_loop(), name="tick")
        reading = keep_read(self._refresh, self._refresh_now, _REFRESH_S)
        service.tasks.create_task(reading, name="refresh")
        service.status(self._status)
        service.on_drain(lambda: self._leave(intake))
        service.beat(self._beat)
        service.ready()

    # ---------------------------------------------------------------------------------------------------- listening

    async def _admit(self, request: Request) -> Accepted:
        try:
            accepted = await self._executor.admit(request)
        except DeepFlowError as error:
            self._requests.labels(error.code).inc()
            raise
        self._requests.labels("parked" if accepted.te is None else "accepted").inc()
        return accepted

    def _on_te_beat(self, beat: TeBeat) -> None:
        if self._registry.beat(beat, time.monotonic()):
            self._executor.unpark(beat.model)

    def _on_client_beat(self, beat: Beat) -> None:
        self._clients.beat(beat.id, time.monotonic())

    def _on_down(self, down: Down) -> None:
        if down.kind == "te":
            self._registry.down(down.id)
            self._executor.on_te_lost(down.id)
        elif self._clients.down(down.id):
            self._executor.on_client_lost(down.id)

    def _on_event(self, event: object) -> None:
        if isinstance(event, Prefilled):
            self._executor.on_prefilled(event)
        elif isinstance(event, TaskEnded):
            self._ended.labels(event.finish).inc()
            self._executor.on_ended(event)

    def _on_disconnect(self) -> None:
        self._registry.hold()
        self._clients.hold()

    def _on_reconnect(self) -> None:
        now = time.monotonic()
        self._registry.resume(now)
        self._clients.resume(now)
        self._refresh_now.set()

    # -------------------------------------------------------------------------------------------------------- clocks

    async def _tick_loop(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            now = time.monotonic()
            for te in self._registry.lost(now):
                self._service.log.warning("te_lost", te=te)
                self._executor.on_te_lost(te)
            for client in self._clients.lost(now):
                self._service.log.warning("client_lost", client=client)
                self._executor.on_client_lost(client)
            await self._executor.tick()

    async def _refresh(self) -> None:
        """Reads both tables; without them the last view stands, and beats keep the JE going."""
        try:
            self._catalogue = await self._models.all(ModelEntry)
            self._registry.registrations((await self._registrations.all(Registration)).values())
        except DeepFlowError as error:
            self._service.log.warning("tables_unread", error=error.message)

    async def _find_model(self, name: str) -> ModelEntry | None:
        """From the last view; a name that is not in it is looked up, it may be new."""
        return self._catalogue.get(name) or await self._models.get(name, ModelEntry)

    # ------------------------------------------------------------------------------------------------------- leaving

    async def _leave(self, intake: Subscription) -> None:
        await intake.drain()
        await self._executor.leave(self._service.settings.grace_s)
        await self._service.bus.flush()

    # --------------------------------------------------------------------------------------------------- what is told

    def _beat(self) -> Beat:
        return Beat(
            kind="scheduler",
            id=self._service.id,
            draining=self._service.stopping.is_set(),
            in_flight=len(self._executor),
        )

    def _status(self) -> dict[str, Any]:
        return {
            "active": len(self._executor),
            "parked": len(self._lot),
            "parked_bytes": self._lot.num_bytes,
            "models": sorted(self._catalogue),
            "tes": [
                {
                    "id": beat.id,
                    "model": beat.model,
                    "role": beat.role,
                    "state": beat.state,
                    "running": beat.running,
                    "waiting": beat.waiting,
                    "outstanding_s": beat.outstanding_s,
                }
                for beat in self._registry.beats()
            ],
            "registered_but_silent": self._registry.silent(),
            "decisions": self._dispatcher.explain(),
        }


async def main(service: Service[SchedulerSettings]) -> None:
    """Sets the JE up; raises Unavailable if JetStream does not come up."""
    bus = service.bus
    scheduler = Scheduler(service, await bus.table("models"), await bus.table("registrations"))
    await scheduler.start()
