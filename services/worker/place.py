"""The life of the TEs of one place: one process after the other, until the place is given up.

A TE is watched in three ways: its process (the death of it is known at once), its beats (silence or no progress is
death), and the time it takes to load. This module must not know how many TEs there are to be, nor what a TE computes.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from services.worker.groups import Group, Seat
from services.worker.starts import Starting
from services.worker.tie import Assignment, TeEvent
from shared.errors import DeepFlowError
from shared.messages import Down, TeBeat
from shared.restarts import WINDOW_S, Restarts
from shared.scaling_messages import PodTe, Start

if TYPE_CHECKING:
    from services.worker.child import Child
    from services.worker.meters import Meters
    from services.worker.registrar import Registrar
    from services.worker.settings import WorkerSettings
    from services.worker.starter import Starter
    from shared.liveness import Liveness
    from shared.service import Service

REST_S: Final = WINDOW_S  # after deaths that show that starting again does not help
_LAST_WORDS_S: Final = 5.0  # beyond its grace, what a TE gets to say its last words


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What the places of a pod host have in common. `assignment` says what the next TE of a place is to be; `turns`
    keeps short the line of those that nobody can take back any more."""

    service: Service[WorkerSettings]
    starter: Starter
    turns: asyncio.Semaphore
    meters: Meters
    registrar: Registrar
    liveness: Liveness
    assignment: Callable[[Place], Assignment]
    changed: Callable[[], None]
    came_up: Callable[[Place, Start], None]
    gave_up: Callable[[Place, str], None]


class Place:
    """Where one TE of a group lives. `number` is the lowest that was free: on metrics, and for its devices."""

    def __init__(
        self, number: int, group: Group, restarts: Restarts, around: Surroundings, *, asked: float
    ) -> None:
        self.number = number
        self.group = group
        self.te = ""  # the present instance, once it told its name
        self.child: Child | None = None
        # Then a TE's own: loading, ready, draining; "waiting" between two TEs.
        self.state = "starting"
        self.reason = ""  # how the last TE ended
        self._around = around
        self._log = around.service.log
        self._bus = around.service.bus
        self._restarts = restarts
        self._since = self._started = time.monotonic()
        self._start: Starting = Starting(asked)
        self._is_up = False
        self._verdict = ""  # why we killed it
        self._load = 0
        self._left = asyncio.Event()
        self._deadline: float | None = None  # of a TE that leaves

    # ------------------------------------------------------------------------------------------- what the pod host sees

    @property
    def leaving(self) -> bool:
        """Whether it was given up."""
        return self._left.is_set()

    def seat(self) -> Seat:
        """This place, for planning."""
        return Seat(
            number=self.number,
            group=self.group,
            ready=self.state == "ready",
            leaving=self.leaving,
            running=self.state != "waiting",
            load=self._load,
            age=int(self._started * 1000),
        )

    def beat(self, now: float) -> PodTe:
        """This place, in the pod host's beat."""
        return PodTe(
            te=self.te,
            model=self.group.model,
            role=self.group.role,
            state=self.state,
            progress=100 if self._is_up else self._start.progress,
            since_ms=round((now - self._since) * 1000),
        )

    def status(self) -> dict[str, Any]:
        """This place, for people."""
        return {
            "id": self.te,
            "model": self.group.model,
            "role": self.group.role,
            "state": self.state,
            "pid": self.child.pid if self.child is not None and self.child.running else None,
            "last_end": self.reason,
        }

    # ------------------------------------------------------------------------------------------------------- its life

    async def keep(self) -> None:
        """Have a TE here until the place is given up."""
        while not self._left.is_set():
            self.reason = await self._live()
            if self._left.is_set():
                break
            now = time.monotonic()
            delay_s = self._restarts.died(now)
            if delay_s is None:
                delay_s = REST_S
                self._around.gave_up(self, self.reason)
            self._is_up, self._start = False, Starting(now)
            self._turn("waiting")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay_s):
                    await self._left.wait()
                break
            self._around.meters.restarted(self.group.model, str(self.number))
            self._start = Starting(time.monotonic())

    def leave(self, migrate_after_s: float | None) -> None:
        """Give the place up: its TE takes nothing new, finishes what it has (within its grace; or lets it go on
        elsewhere after `migrate_after_s`), and ends."""
        if self.leaving:
            if migrate_after_s is None and self.child is not None:
                self.child.terminate()  # the pod host leaves too: no longer than its grace
            return
        self._left.set()
        grace_s = self._around.service.settings.grace_s
        self._deadline = time.monotonic() + (migrate_after_s or 0.0) + grace_s + _LAST_WORDS_S
        if self.child is not None:  # one that is not up has nothing to let go on
            self.child.terminate(migrate_after_s if self._is_up else None)
        self._turn("draining")

    async def judge(self, now: float, *, lost: bool) -> None:
        """Kill what hangs, what does not load, and what does not leave. `lost`: its beats say so."""
        load_timeout_s = self._around.service.settings.load_timeout_s
        if lost:
            await self._condemn("no beat or no progress")
        elif self._deadline is not None and now > self._deadline:
            await self._condemn("not drained in time")
        elif self.state in ("starting", "loading") and now - self._started > load_timeout_s:
            await self._condemn(f"not loaded after {load_timeout_s:g} s")

    def kill(self) -> None:
        """Without another word."""
        if self.child is not None:
            self._verdict = self._verdict or "not drained in time"
            self.child.kill()

    async def _live(self) -> str:
        """One TE from its start to its end; how it ended."""
        self.te, self._verdict, self._is_up, self._load = "", "", False, 0
        self._started = time.monotonic()
        self._turn("starting")
        try:
            async with self._around.turns:
                if self._left.is_set():
                    return "no longer wanted"
                child = await self._around.starter.start(self._around.assignment(self))
        except (DeepFlowError, OSError) as error:
            return f"no process for it: {error}"
        self.child = child
        self._start.made(child.process, time.monotonic())
        beats = None
        try:
            if self.leaving:  # that was decided while it was being started
                child.terminate()
            if te := await child.name():
                self.te = te
                self._log.info("te_started", te=te, model=self.group.model, pid=child.pid)
                beats = await self._bus.listen(
                    self._bus.subjects.beat("te", te), (TeBeat,), self._hear_beat
                )
                async for event in child.events():
                    self._hear(event)
            ending = await child.wait()
        finally:
            child.kill()
            if beats is not None:
                await beats.stop()
        reason = f"{self._verdict} ({ending})" if self._verdict else ending
        if self.te:
            await self._bury(reason)
        return reason

    async def _bury(self, reason: str) -> None:
        """Tell everybody that the TE is dead, first of all those who wait for its tokens."""
        te, around = self.te, self._around
        say = self._log.info if self.leaving and not self._verdict else self._log.warning
        say("te_died", te=te, model=self.group.model, reason=reason)
        around.liveness.down(te)
        self.te = ""
        self._turn("draining" if self.leaving else "waiting")
        if not self._verdict:
            await self._say_down(te, reason)
        around.meters.died(self.group.model, str(self.number), te)
        await around.registrar.remove("registrations", te)

    async def _condemn(self, verdict: str) -> None:
        if self.child is None or not self.child.running or self._verdict:
            return
        self._verdict = verdict
        if self.te:
            await self._say_down(self.te, verdict)
        self.child.kill()

    async def _say_down(self, te: str, reason: str) -> None:
        try:
            down = Down(kind="te", id=te, reason=reason)
            await self._bus.publish(self._bus.subjects.down("te", te), down)
        except DeepFlowError as error:  # the bus is away: silence will tell them
            self._log.warning("death_not_told", te=te, error=error.message)

    # ------------------------------------------------------------------------------------------- what the TE says

    def _hear(self, event: TeEvent) -> None:
        """On the tie."""
        before = self._start.progress
        self._start.take(event, time.monotonic())
        if self.state == "starting":
            self._turn("loading")
        elif self._start.progress != before:
            self._around.changed()
        self._look_up()

    def _hear_beat(self, beat: TeBeat) -> None:
        """On the bus."""
        if beat.id != self.te or self._verdict:
            return
        now = time.monotonic()
        self._around.meters.beat(str(self.number), beat)
        self._load = beat.running + beat.waiting
        if beat.state != "loading":
            # The beat proves life as of the progress it reports, less what the step may take.
            late_s = max(0, beat.progress_ms - beat.step_ms) / 1000
            self._around.liveness.beat(beat.id, now - late_s)
        if beat.state == "ready":
            self._start.heard(now)
        self._turn("draining" if self.leaving else beat.state)
        self._look_up()

    def _look_up(self) -> None:
        if self._is_up:
            return
        start = self._start.done(self.te, *self.group)
        if start is not None:
            self._is_up = True
            self._around.came_up(self, start)

    def _turn(self, state: str) -> None:
        if state != self.state:
            self.state, self._since = state, time.monotonic()
            self._around.changed()
