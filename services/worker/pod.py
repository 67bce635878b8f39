"""The pod host: one per machine or container. It starts Task Executors, watches over them, and says so when one dies.

The rim around `child` (a process), `restarts` (when to try again), `meters` (what they report) and `trainer` (other
processes, which learn something and end). A TE is watched in three ways: its process (the death of it is known at
once), its beats (silence or no progress is death), and the time it takes to load. It must not know what a TE computes,
and imports no torch: it is what stays up.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from typing import TYPE_CHECKING, Final

from services.worker.child import Child
from services.worker.flowserve.device.pick import pick
from services.worker.meters import Meters
from services.worker.recipe import model_entry, pick_backend, served_context
from services.worker.registrar import Registrar
from services.worker.settings import WorkerSettings, for_te
from services.worker.trainer import Trainer
from services.worker.visible import present, visible
from shared.catalog import open_model
from shared.errors import DeepFlowError
from shared.liveness import Liveness
from shared.messages import Down, Registration, TeBeat
from shared.restarts import Restarts
from shared.service import Service, host_name

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

_JUDGE_S: Final = 0.25
# No beat for so long, or no progress for so long beyond the predicted step: the TE hangs. On purpose more patient than
# gateways and JEs (1.5 s). If they are wrong about a TE that is merely slow, requests move; if we are, weights are
# loaded again, on a machine that is slow already. It also covers a TE that finds the bus again later than we do.
HUNG_S: Final = 5.0
_LAST_WORDS_S: Final = 5.0  # beyond its grace, what a TE gets to say its last words


class Place:
    """Where one TE of a model lives, one process after the other."""

    def __init__(self, model: str, label: str, role: str) -> None:
        self.model = model
        self.label = label  # on metrics
        self.role = role
        self.devices: dict[str, str] = {}  # the variable that shows it its accelerators
        self.restarts = Restarts()
        self.child: Child | None = None
        self.te = ""  # the present instance, once it told its name
        # Then a TE's own: loading, ready, draining; "waiting" between two TEs.
        self.state = "starting"
        self.started_at = 0.0
        self.verdict = ""  # why we killed it


class Pod:
    """Supervises the TEs of each model, of every role, until the service stops."""

    def __init__(self, service: Service[WorkerSettings], env: Mapping[str, str]) -> None:
        self._service = service
        self._settings = service.settings
        self._env = env
        self._bus = service.bus
        self._log = service.log
        self._meters = Meters(service.metrics)
        self._registrar = Registrar(service.bus, service.log)
        self._liveness = Liveness(HUNG_S)
        settings = self._settings
        roles = (
            ["colocated"] * settings.num_colocated
            + ["prefill"] * settings.num_prefill
            + ["decode"] * settings.num_decode
        )
        self._places = [
            Place(model, str(number), role)
            for model in settings.models
            for number, role in enumerate(roles)
        ]
        self._keepers: list[asyncio.Task[None]] = []
        self._trainer = Trainer(service, env)

    async def open(self) -> None:
        """Announce the models and start everything. Raises ModelNotFound, ModelError, Unavailable."""
        service, settings = self._service, self._settings
        device = pick(settings.device).name
        num_present = present(device)
        for number, place in enumerate(self._places):
            place.devices = visible(
                device,
                self._env,
                num_present=num_present,
                place=number,
                num_ranks=settings.tp * settings.pp,
            )
        for name in settings.models:
            folder = open_model(settings.cache_dir, name)
            backend = pick_backend(folder, settings)
            entry = model_entry(folder, backend, context=served_context(backend, settings))
            self._registrar.put("models", name, entry)
        registration = Registration(kind="pod", id=service.id, host=host_name(), pid=os.getpid())
        self._registrar.put("registrations", service.id, registration)
        self._bus.on_disconnect(self._liveness.hold)
        self._bus.on_reconnect(lambda: self._liveness.resume(time.monotonic()))
        service.status(self._status)
        service.on_drain(self._drain)
        service.beat()
        service.tasks.create_task(self._registrar.keep(), name="registrar")
        service.tasks.create_task(self._judge(), name="judge")
        for place in self._places:
            name = f"{place.model}/{place.label}"
            self._keepers.append(service.tasks.create_task(self._keep(place), name=name))
        await self._trainer.open()

    # ------------------------------------------------------------------------------------------------ a TE's life

    async def _keep(self, place: Place) -> None:
        """Have a TE in `place` until the service stops, or starting one again has proved to be no use."""
        while not self._service.stopping.is_set():
            reason = await self._live(place)
            if self._service.stopping.is_set():
                return
            delay_s = place.restarts.died(time.monotonic())
            if delay_s is None:
                self._service.stop(f"a TE of {place.model} died five times in a minute: {reason}")
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay_s):
                    await self._service.stopping.wait()
                return
            self._meters.restarted(place.model, place.label)

    async def _live(self, place: Place) -> str:
        """One TE from its start to its end; how it ended."""
        env = for_te(
            self._env,
            self._settings,
            model=place.model,
            pod=self._service.id,
            role=place.role,
            devices=place.devices,
        )
        place.te, place.verdict, place.state = "", "", "starting"
        place.started_at = time.monotonic()
        child = place.child = await Child.start("services.worker.te", env)
        beats = None
        try:
            if self._service.stopping.is_set():  # the signal came while it was being started
                child.terminate()
            te = place.te = await child.name()
            if te:
                self._log.info("te_started", te=te, model=place.model, pid=child.pid)
                subject = self._bus.subjects.beat("te", te)
                beats = await self._bus.listen(
                    subject, (TeBeat,), lambda beat: self._beat(place, beat)
                )
            ending = await child.wait()
        finally:
            child.kill()
            if beats is not None:
                await beats.stop()
        place.state = "waiting"
        reason = f"{place.verdict} ({ending})" if place.verdict else ending
        if te:
            await self._bury(place, te, reason)
        return reason

    async def _bury(self, place: Place, te: str, reason: str) -> None:
        """Tell everybody that `te` is dead, first of all those who wait for its tokens."""
        self._log.warning("te_died", te=te, model=place.model, reason=reason)
        self._liveness.down(te)
        self._say_ready()
        if not place.verdict:
            await self._say_down(te, reason)
        self._meters.died(place.model, place.label, te)
        await self._registrar.remove("registrations", te)

    async def _say_down(self, te: str, reason: str) -> None:
        try:
            down = Down(kind="te", id=te, reason=reason)
            await self._bus.publish(self._bus.subjects.down("te", te), down)
        except DeepFlowError as error:  # the bus is away: silence will tell them
            self._log.warning("death_not_told", te=te, error=error.message)

    # --------------------------------------------------------------------------------------------------- watching

    def _beat(self, place: Place, beat: TeBeat) -> None:
        if beat.id != place.te or place.verdict:
            return
        self._meters.beat(place.label, beat)
        changed, place.state = place.state != beat.state, beat.state
        if beat.state != "loading":
            # The beat proves life as of the progress it reports, less what the step may take.
            late_s = max(0, beat.progress_ms - beat.step_ms) / 1000
            self._liveness.beat(beat.id, time.monotonic() - late_s)
        if changed:
            self._say_ready()

    async def _judge(self) -> None:
        """Declare dead what hangs, and kill it; its keeper starts another."""
        while True:
            await asyncio.sleep(_JUDGE_S)
            now = time.monotonic()
            lost = set(self._liveness.lost(now))
            for place in self._places:
                if place.te in lost:
                    await self._condemn(place, "no beat or no progress")
                elif (
                    place.state in ("starting", "loading")
                    and now - place.started_at > self._settings.load_timeout_s
                ):
                    await self._condemn(
                        place, f"not loaded after {self._settings.load_timeout_s:g} s"
                    )

    async def _condemn(self, place: Place, verdict: str) -> None:
        if place.child is None or not place.child.running or place.verdict:
            return
        place.verdict = verdict
        if place.te:
            await self._say_down(place.te, verdict)
        place.child.kill()

    def _say_ready(self) -> None:
        """Ready: every model has a TE that is."""
        ready = {place.model for place in self._places if place.state == "ready"}
        self._service.ready(ready == set(self._settings.models))

    def _status(self) -> dict[str, Any]:
        return {
            "tes": [
                {
                    "id": place.te,
                    "model": place.model,
                    "role": place.role,
                    "state": place.state,
                    "pid": place.child.pid if place.child is not None else None,
                }
                for place in self._places
            ]
        }

    # --------------------------------------------------------------------------------------------------- draining

    async def _drain(self) -> None:
        """Let the TEs finish what they have (they know their own grace), then end them."""
        for place in self._places:
            if place.child is not None:
                place.child.terminate()
        await self._trainer.leave()
        _, late = await asyncio.wait(self._keepers, timeout=self._settings.grace_s + _LAST_WORDS_S)
        for place in self._places:
            if place.child is not None and place.child.running:
                place.verdict = "not drained in time"
                place.child.kill()
        if late:
            await asyncio.wait(late, timeout=_LAST_WORDS_S)
        await self._registrar.remove("registrations", self._service.id)


async def open_pod(service: Service[WorkerSettings]) -> None:
    """A pod host's `main` for `service.run`."""
    await Pod(service, os.environ).open()
