"""The rim of a Job Executor: what it listens to, what it serves, its clocks, and the order in which it leaves."""

from __future__ import annotations

import asyncio
import time
from random import Random
from typing import Any

from services.scheduler.background import Background
from services.scheduler.clients import Clients
from services.scheduler.cluster.manager import ClusterManager
from services.scheduler.costs import Costs
from services.scheduler.demand import DemandMeter
from services.scheduler.dispatch import Dispatcher
from services.scheduler.executor import JobExecutor
from services.scheduler.handover import Handovers
from services.scheduler.heatmap import Heatmaps
from services.scheduler.jobs import Jobs
from services.scheduler.lengths import Lengths
from services.scheduler.parking import ParkingLot
from services.scheduler.placer import Placer
from services.scheduler.policy.roster import make
from services.scheduler.predictor import Predictors
from services.scheduler.prompt_feed import PromptFeed
from services.scheduler.prompt_tree import PromptTrees
from services.scheduler.registry import Registry
from services.scheduler.regret import Regrets
from services.scheduler.settings import SchedulerSettings
from shared.bus import Subscription, Table
from shared.errors import DeepFlowError
from shared.job_messages import TrainingEnded
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
from shared.scaling_messages import Fleet
from shared.service import Service
from shared.subjects import QUEUE_SCHEDULER
from shared.table import keep_read

_TICK_S = 0.25
_REFRESH_S = 5.0
_DECISIONS_SHOWN = 64


class Scheduler:
    """Wires a JobExecutor to the bus."""

    def __init__(
        self,
        service: Service[SchedulerSettings],
        models: Table,
        registrations: Table,
        predictors: Table,
        jobs: Jobs,
    ) -> None:
        settings = service.settings
        self._service = service
        self._models = models
        self._registrations = registrations
        self._catalogue: dict[str, ModelEntry] = {}
        self._refresh_now = asyncio.Event()
        costs = Costs()
        self._registry = Registry(Liveness(), costs=costs)
        self._clients = Liveness()
        self._peers = Liveness()  # other JEs
        trees = PromptTrees(max_bytes=settings.tree_bytes)
        self._prompts = PromptFeed(
            service, trees, alive=lambda te: self._registry.last_beat(te) is not None
        )
        self._regrets = Regrets(service.metrics, max_requests=settings.decisions_kept)
        self._heatmaps = Heatmaps()
        lengths = Lengths()
        self._predictors = Predictors(service, lengths, jobs, predictors, pods=self._pods)
        placer = Placer(
            policy=make(settings.policy),
            registry=self._registry,
            trees=trees,
            heatmaps=self._heatmaps,
            lengths=lengths,
            costs=costs,
            random=Random(settings.seed),
            min_split_tokens=settings.pd_min_tokens,
        )
        dispatcher = Dispatcher(
            service.bus,
            placer,
            self._regrets,
            service.metrics,
            je=service.id,
            timeout_s=settings.task_timeout_s,
        )
        self._lot = ParkingLot(
            max_requests=settings.park_max_requests,
            max_bytes=settings.park_max_bytes,
            max_park_s=settings.park_max_s,
        )
        self._demand = DemandMeter(service.id, self._lot, lengths, costs, slo_s=settings.slo_ttft_s)
        self._cluster = ClusterManager(service, tes=self._registry.beats, knows=self._knows)
        clients = Clients(service.bus, service.id)
        handovers = Handovers(
            dispatcher,
            clients,
            service.metrics,
            je=service.id,
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
        await bus.listen(subjects.fleet("*"), (Fleet,), self._executor.on_fleet)
        await bus.listen(subjects.beat("gateway", "*"), (Beat,), self._on_client_beat)
        await bus.listen(subjects.beat("scheduler", "*"), (Beat,), self._on_peer_beat)
        await bus.listen(subjects.down("*", "*"), (Down,), self._on_down)
        await self._prompts.start()
        await bus.listen(subjects.cancel(service.id), (Cancel,), self._executor.on_cancel)
        events = (TaskEnded, Prefilled, TrainingEnded)
        await bus.listen(subjects.events(service.id), events, self._on_event)
        await self._predictors.start(service.tasks)
        await self._refresh()
        await self._cluster.start()
        intake = await bus.serve(
            subjects.request("*"),
            (Request,),
            self._admit,
            queue=QUEUE_SCHEDULER,
            limit=service.settings.max_in_flight,
        )
        service.tasks.create_task(self._tick_loop(), name="tick")
        service.tasks.create_task(self._demand.run(bus), name="demand")
        reading = keep_read(self._refresh, self._refresh_now, _REFRESH_S)
        service.tasks.create_task(reading, name="refresh")
        service.status(self._status)
        service.verb("placement", lambda request: {"decisions": self._regrets.of(request)})
        service.on_drain(self._cluster.leave)
        service.on_drain(lambda: self._leave(intake))
        service.beat(self._beat)
        service.ready()

    # ---------------------------------------------------------------------------------------------------- listening

    async def _admit(self, request: Request) -> Accepted:
        try:
            accepted = await self._executor.admit(request)
        except DeepFlowError as error:
            self._requests.labels(error.code).inc()
            self._demand.refused(request, error)
            raise
        self._requests.labels("parked" if accepted.te is None else "accepted").inc()
        self._demand.accepted(request, accepted.te)
        self._predictors.on_accepted(request)
        return accepted

    def _on_te_beat(self, beat: TeBeat) -> None:
        newly_ready = self._registry.beat(beat, time.monotonic())
        self._prompts.seen(beat)
        self._demand.beat(beat)
        self._executor.on_beat(beat, newly_ready=newly_ready)
        if newly_ready:
            self._cluster.on_te_ready()

    def _on_client_beat(self, beat: Beat) -> None:
        self._clients.beat(beat.id, time.monotonic())

    def _on_peer_beat(self, beat: Beat) -> None:
        if beat.draining:
            self._peers.down(beat.id)
        elif beat.id != self._service.id:
            self._peers.beat(beat.id, time.monotonic())
        self._registry.num_peers = 1 + len(self._peers.all())

    def _on_down(self, down: Down) -> None:
        if down.kind == "te":
            self._registry.down(down.id)
            self._prompts.gone(down.id)
            self._executor.on_te_lost(down.id)
        elif down.kind == "scheduler":
            self._peers.down(down.id)
        elif self._clients.down(down.id):
            self._executor.on_client_lost(down.id)

    def _on_event(self, event: object) -> None:
        if isinstance(event, Prefilled):
            self._executor.on_prefilled(event)
        elif isinstance(event, TaskEnded):
            self._ended.labels(event.finish).inc()
            self._demand.ended(event)
            self._executor.on_ended(event)
            self._predictors.on_ended(event)
        elif isinstance(event, TrainingEnded):
            self._predictors.on_trained(event)

    def _on_disconnect(self) -> None:
        self._registry.hold()
        self._clients.hold()
        self._peers.hold()

    def _on_reconnect(self) -> None:
        now = time.monotonic()
        self._registry.resume(now)
        self._clients.resume(now)
        self._peers.resume(now)
        self._prompts.doubt()
        self._refresh_now.set()

    # -------------------------------------------------------------------------------------------------------- clocks

    async def _tick_loop(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            now = time.monotonic()
            for te in self._registry.lost(now):
                self._service.log.warning("te_lost", te=te)
                self._prompts.gone(te)
                self._executor.on_te_lost(te)
            for client in self._clients.lost(now):
                self._service.log.warning("client_lost", client=client)
                self._executor.on_client_lost(client)
            if self._peers.lost(now):
                self._registry.num_peers = 1 + len(self._peers.all())
            self._prompts.tick()
            await self._executor.tick()

    async def _refresh(self) -> None:
        """Reads both tables; without them the last view stands, and beats keep the JE going. Also the heatmaps."""
        for wrong in self._heatmaps.load(self._service.settings.heatmaps_dir):
            self._service.log.warning("heatmap_unread", error=wrong.message)
        try:
            self._catalogue = await self._models.all(ModelEntry)
            self._registry.registrations((await self._registrations.all(Registration)).values())
        except DeepFlowError as error:
            self._service.log.warning("tables_unread", error=error.message)

    async def _find_model(self, name: str) -> ModelEntry | None:
        """From the last view; a name that is not in it is looked up, it may be new."""
        return self._catalogue.get(name) or await self._models.get(name, ModelEntry)

    async def _knows(self, name: str) -> bool:
        return await self._find_model(name) is not None

    def _pods(self, model: str) -> list[str]:
        """The pod hosts that serve a model, the idlest first."""
        beats = sorted(self._registry.group(model), key=lambda beat: beat.outstanding_s)
        return list(dict.fromkeys(beat.pod for beat in beats))

    # ------------------------------------------------------------------------------------------------------- leaving

    async def _leave(self, intake: Subscription) -> None:
        await intake.drain()
        await self._executor.leave(self._service.settings.grace_s)
        await self._predictors.leave()
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
            "policy": self._service.settings.policy,
            "jes": self._registry.num_peers,
            "registered_but_silent": self._registry.silent(),
            "prompts": self._prompts.status(),
            "predictors": self._predictors.status(),
            "cluster": self._cluster.status(),
            "decisions": self._regrets.latest(_DECISIONS_SHOWN),
        }


async def main(service: Service[SchedulerSettings]) -> None:
    """Sets the JE up; raises Unavailable if JetStream does not come up."""
    bus = service.bus
    background = await Background.open(service)
    models, registrations, predictors = [
        await bus.table(name) for name in ("models", "registrations", "predictors")
    ]
    scheduler = Scheduler(service, models, registrations, predictors, background.jobs)
    service.on_drain(background.leave)  # first: lines of batches come back to the JEs as requests
    await scheduler.start()
    await background.start()
