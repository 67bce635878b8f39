"""The Job Executor proper: what becomes of each request this JE was handed, from admission to its end.

A request is decided at once (a TE accepts it, or it is refused), or parked while no TE of its model is up and then
dispatched, cancelled or failed: exactly one terminal frame per choice in every case. It is parked as well while the TEs
that are up run all they can and more are about to come (`outlook`): a herd wakes one and is shared by all. The newest
attempt of a request wins; older ones are cancelled wherever they are. A parked request whose TE stays ambiguous, or
whose JE leaves, is failed with `Unavailable(retry_after_s=0)`, which tells its gateway to resubmit at once; what cannot
be served within its budget fails with `NotReady`, whose hint is meant for the client. A request may be split over two
TEs (`handover`). This module must not know subscriptions, signals, or how a TE is chosen.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any, Final

from services.scheduler.clients import Clients
from services.scheduler.handover import Active, Handovers
from services.scheduler.job import JobKind, State, serve
from services.scheduler.outlook import WARM, Outlook
from services.scheduler.parking import Parked, ParkingLot
from services.scheduler.registry import Registry
from shared import log
from shared.bus import failure
from shared.errors import (
    DeadlineExceeded,
    DeepFlowError,
    InvalidRequest,
    ModelNotFound,
    NotReady,
    Overloaded,
    Unavailable,
)
from shared.messages import (
    Accepted,
    Cancel,
    Failure,
    ModelEntry,
    Prefilled,
    Request,
    TaskEnded,
    TeBeat,
)
from shared.scaling_messages import Fleet

PROGRESS_S: Final = 1.0
_SERVED: Final = (JobKind.CHAT, JobKind.COMPLETION, JobKind.CACHE)
_MAX_ACTIVE: Final = 65_536
_OVERDUE_S: Final = 60.0  # an active request this far past its deadline has ended unheard
_HANDED_S: Final = 10.0  # a prefill whose pages nobody was told of so long after its end is the gateway's to repeat


class JobExecutor:
    """All requests of one JE. Methods named `on_*` are synchronous and hand off to `tasks`."""

    def __init__(
        self,
        registry: Registry,
        handovers: Handovers,
        clients: Clients,
        lot: ParkingLot,
        tasks: asyncio.TaskGroup,
        *,
        je: str,
        find_model: Callable[[str], Coroutine[Any, Any, ModelEntry | None]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.je = je
        self.lot = lot
        self.outlook = Outlook()
        self._registry = registry
        self._handovers = handovers
        self._clients = clients
        self._tasks = tasks
        self._find_model = find_model
        self._clock = clock
        self._log = log.get(service="scheduler", id=je)
        self._active: dict[str, Active] = {}  # by request id, oldest first
        self._unparking: dict[str, asyncio.Task[None]] = {}  # a loop per model that has both
        self._leaving = False
        self._forgot = asyncio.Event()

    def __len__(self) -> int:
        return len(self._active)

    # ---------------------------------------------------------------------------------------------------- admission

    async def admit(self, request: Request) -> Accepted:
        """Answers `request.<model>`. Raises any DeepFlowError; then nothing is owed."""
        if request.kind not in _SERVED:
            raise InvalidRequest(f"kind {request.kind!r} is not served", param="kind")
        if request.deadline_ms <= 0:
            raise DeadlineExceeded("the request came after its deadline")
        known = self._active.get(request.request)
        if known is not None and known.plan.attempt >= request.attempt:
            return self._repeat(request, known)
        if len(self._active) >= _MAX_ACTIVE:
            raise Overloaded("this job executor has its hands full", retry_after_s=1.0)
        active = Active(
            plan=serve(JobKind(request.kind), request.request, request.attempt),
            client=request.client,
            until=self._clock() + request.deadline_ms / 1000 + _OVERDUE_S,
        )
        self._active[request.request] = active
        try:
            if known is not None:
                old = Cancel(request=request.request, attempt=known.plan.attempt)
                await self._cancel(old, known)
            te = None
            if self._registry.ready(request.model) and not self._is_held(request):
                te = await self._dispatch(request, active)
            if te is None:
                await self._park(request, active)
        except BaseException:
            self._forget(request.request, active)
            raise
        return Accepted(request=request.request, attempt=request.attempt, by=self.je, te=te)

    def _repeat(self, request: Request, known: Active) -> Accepted:
        """The answer to an attempt that is known already, or older than the known one."""
        same = known.plan.attempt == request.attempt
        placing = known.task.te is None and request.request not in self.lot
        if not same or placing:
            raise Unavailable("this or a newer attempt is being placed", retry_after_s=0.0)
        return Accepted(
            request=request.request, attempt=request.attempt, by=self.je, te=known.task.te
        )

    async def _dispatch(self, request: Request, active: Active) -> str | None:
        """Places the first task, split or whole; None if no TE could be reached. Raises as the dispatcher does."""
        if self.outlook.is_spreading(request.model, self._clock()):
            full = self._registry.full(request.model, self._share(request.model))
            request = replace(request, avoid=[*request.avoid, *full])
        if self._handovers.worthwhile(request):
            te = await self._handovers.prefill(request, active)
            if te is not None:
                return te
        return await self._handovers.ask(request, active)

    # ------------------------------------------------------------------------------------------------------ parking

    async def _park(self, request: Request, active: Active) -> None:
        exists = self._registry.group(request.model) or await self._find_model(request.model)
        if not exists:
            raise ModelNotFound(f"the model {request.model!r} does not exist", param="model")
        if self._leaving or active.cancelled:
            raise Unavailable("this attempt has no place here any more", retry_after_s=0.0)
        now, model = self._clock(), request.model
        budget_s = self.lot.budget_s(request)
        if budget_s <= 0:
            raise NotReady(
                f"no replica of model {model!r} is up", retry_after_s=self._retry_after_s(model)
            )
        num_ahead = self.lot.num_waiting(model)
        is_asleep = not self._registry.ready(model)
        if is_asleep:
            is_alive = bool(self._registry.group(model))
            refusal = self.outlook.refusal(
                model, budget_s=budget_s, num_ahead=num_ahead, is_alive=is_alive, now=now
            )
            if refusal is not None:
                raise refusal
        try:
            parked = self.lot.park(request, active.plan, now)
        except Overloaded as error:
            raise Overloaded(error.message, retry_after_s=self._retry_after_s(model)) from error
        if is_asleep and not num_ahead:
            self.outlook.waits(model, now)
        self._log.info("request_parked", request=request.request, model=model)
        await self._tell_progress(parked, "parked")
        self.unpark(model)  # a TE may have come up while the catalogue was read

    def _is_held(self, request: Request) -> bool:
        """Whether more TEs come so soon that it does better to wait for them than in the queue of one."""
        model = request.model
        return (
            self.outlook.is_spreading(model, self._clock())
            and (
                self.lot.num_waiting(model) > 0
                or not self._registry.has_room(model, self._share(model, num_more=1))
            )
            and self.lot.budget_s(request) > 0
            and self.lot.has_room(request)
        )

    def _may_leave(self, model: str) -> bool:
        """Whether one that is parked may be given to a TE now."""
        is_spreading = self.outlook.is_spreading(model, self._clock())
        return self._registry.ready(model) and (
            not is_spreading or self._registry.has_room(model, self._share(model))
        )

    def _share(self, model: str, num_more: int = 0) -> int | None:
        """What one TE is to have of all that runs and waits, while others are about to come."""
        num_tasks = self._registry.num_tasks(model) + self.lot.num_waiting(model) + num_more
        return self.outlook.share(model, num_tasks, self._clock())

    def unpark(self, model: str) -> None:
        """Places the model's parked requests, one after another, while it has a TE with room."""
        if self.lot.num_waiting(model) and model not in self._unparking and not self._leaving:
            self._unparking[model] = self._tasks.create_task(
                self._unpark(model), name=f"unpark-{model}"
            )

    async def _unpark(self, model: str) -> None:
        try:
            while self._may_leave(model) and (parked := self.lot.next(model)) is not None:
                if not await self._place(parked):
                    return
        finally:
            del self._unparking[model]

    async def _place(self, parked: Parked) -> bool:
        """Gives one request, taken out of the lot, to a TE; False (and it is back inside) if none has room."""
        request = parked.remaining(self._clock())
        active = self._active[request.request]
        try:
            te = await self._dispatch(request, active)
        except Overloaded:
            te = None
        except DeepFlowError as error:
            await self._end(parked, "failed", failure(error))
            return True
        if te is not None:
            is_last = not self.lot.num_waiting(request.model)
            self.outlook.left(request.model, self._clock(), is_last=is_last)
            await self._tell_progress(parked, "dispatched", te)
            return True
        if active.cancelled:
            await self._end(parked, "cancelled")
        elif self._leaving:
            await self._end(parked, "failed", _LEAVING)
        else:
            self.lot.put_back(parked)
        return False

    async def tick(self) -> None:
        """Several times a second: fails what has waited too long, tells the others, and tries to place them."""
        now = self._clock()
        for parked in self.lot.take_expired(now):
            late = now - parked.since >= parked.request.deadline_ms / 1000
            why = _TOO_LATE if late else self._not_ready(parked.request.model)
            await self._end(parked, "failed", why)
        for model in self.lot.models():
            is_alive = bool(self._registry.group(model))
            if self.outlook.is_off(model, is_alive=is_alive, now=now):
                for parked in self.lot.take_model(model):
                    await self._end(parked, "failed", self._not_ready(model))
            elif self._registry.ready(model):
                self.unpark(model)
        await self._tell_all(now)
        for request, active in list(self._active.items()):
            if active.until < now and request not in self.lot:
                self._forget(request, active)

    async def _tell_all(self, now: float) -> None:
        """Those who wait hear once a second what for, and at once when that is something else."""
        stages = {
            model: self.outlook.stage(model, self._registry.group(model), now)
            for model in self.lot.models()
        }
        for parked in self.lot:
            stage = stages.get(parked.request.model, parked.stage)  # it may be another lot by now
            is_due = stage != parked.stage or now - parked.told >= PROGRESS_S
            if is_due and parked.request.request in self.lot:
                await self._tell_progress(parked, "parked")

    # ------------------------------------------------------------------------------------------------ what one hears

    def on_beat(self, beat: TeBeat, *, newly_ready: bool) -> None:
        """A TE lives, and may have room for somebody who waits."""
        if newly_ready:
            self.outlook.woke(beat.model, self._clock())
        if newly_ready or (beat.state == "ready" and beat.free_slots):
            self.unpark(beat.model)

    def on_fleet(self, fleet: Fleet) -> None:
        """What the cluster manager is about."""
        self.outlook.heard(fleet, self._clock())

    def on_cancel(self, cancel: Cancel) -> None:
        """`cancel.<je>`: for a request whose TE the gateway does not know yet."""
        active = self._active.get(cancel.request)
        if active is not None and active.plan.attempt <= cancel.attempt:
            self._tasks.create_task(self._cancel(cancel, active), name="cancel")

    def on_ended(self, ended: TaskEnded) -> None:
        """`events.<je>`: a TE is done with a task of ours."""
        self._handovers.ended(ended)
        beat = self._registry.last_beat(ended.te)
        if beat is not None:
            self.unpark(beat.model)
        active = self._active.get(ended.request)
        if active is None or active.plan.attempt != ended.attempt:
            return
        plan, task = active.plan, active.task
        if task.id != ended.task or task.state.terminal:
            return
        if ended.finish == "handed":  # what matters is told by `Prefilled`, unless that is lost
            active.until = min(active.until, self._clock() + _HANDED_S)
            return
        if task.state is State.READY:  # overtook the TE's answer, which is still under way
            plan.start(task.id, ended.te)
        if ended.finish == "failed":
            plan.fail(task.id)
        elif ended.finish != "cancelled":
            plan.finish(task.id)
        plan.cancel()  # after a first token that was the last one, the decode task
        self._forget(ended.request, active)
        # The first TE of a pair holds its pages until the second has them, which may not have wanted them.
        done = Cancel(request=ended.request, attempt=ended.attempt)
        for te in active.tes():
            if te != ended.te:
                self._tasks.create_task(self._handovers.cancel(te, done), name="release")

    def on_prefilled(self, prefilled: Prefilled) -> None:
        """`events.<je>`: a prefill task of ours is done, and its request goes on somewhere."""
        active = self._active.get(prefilled.request)
        if active is None or active.plan.attempt != prefilled.attempt:
            self._tasks.create_task(self._handovers.drop(prefilled), name="drop")
            return
        request = active.request
        if request is not None and self._handovers.done(prefilled, active):
            active.until = self._clock() + request.deadline_ms / 1000 + _OVERDUE_S
            self._tasks.create_task(self._hand_over(prefilled, active, request), name="hand-over")

    async def _hand_over(self, prefilled: Prefilled, active: Active, request: Request) -> None:
        if not await self._handovers.place(prefilled, active, request):
            self._forget(prefilled.request, active)
        self._forgot.set()

    def on_te_lost(self, te: str) -> None:
        """Its requests are resubmitted by their gateways, not by us; what it has prefilled is computed again."""
        for request, active in list(self._active.items()):
            if active.task.te == te:
                self._forget(request, active)

    def on_client_lost(self, client: str) -> None:
        """Nobody waits for its parked requests any more; the TEs drop the others by themselves."""
        self.lot.take_client(client)
        for request, active in list(self._active.items()):
            if active.client == client:
                active.cancelled = True
                self._forget(request, active)
        self._clients.forget(client)

    async def leave(self, grace_s: float) -> None:
        """No more requests come: what is parked goes back to its gateways, which ask another JE, and what is being
        prefilled is handed over, if it comes within the grace."""
        self._leaving = True
        if self._unparking:
            await asyncio.wait(self._unparking.values())
        for parked in list(self.lot):
            self.lot.take(parked.request.request)
            await self._end(parked, "failed", _LEAVING)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                while any(active.request is not None for active in self._active.values()):
                    self._forgot.clear()
                    await self._forgot.wait()

    # ------------------------------------------------------------------------------------------------------- endings

    async def _cancel(self, cancel: Cancel, active: Active) -> None:
        """Ends an attempt wherever it is: at its TE, in the lot, or between the two."""
        between = active.request is not None  # two TEs, of which only we shall know the second
        active.cancelled = active.cancelled or between
        tes = active.tes()
        for te in tes:
            await self._handovers.cancel(te, cancel)
        if tes or between:
            return
        if cancel.choice is not None:
            self._cancel_choice(cancel)
        elif (parked := self.lot.take(cancel.request)) is not None:
            await self._end(parked, "cancelled")
        else:
            active.cancelled = True

    def _cancel_choice(self, cancel: Cancel) -> None:
        """One choice of a parked request: it is not generated; its end is the gateway's, who asked for it."""
        for parked in self.lot:
            request = parked.request
            if request.request == cancel.request and cancel.choice not in request.ended:
                assert cancel.choice is not None
                parked.request = replace(request, ended=[*request.ended, cancel.choice])

    async def _end(self, parked: Parked, finish: str, why: Failure | None = None) -> None:
        """The terminal frame of a parked request: one delta for every choice that is not over."""
        request = parked.request
        parked.plan.cancel()  # whatever ended it, nobody works on it any more
        active = self._active.get(request.request)
        if active is not None and active.plan is parked.plan:
            self._forget(request.request, active)
        self._log.info("parked_request_ended", request=request.request, finish=finish)
        await self._clients.end(request, finish, why)

    def _forget(self, request: str, active: Active) -> None:
        if self._active.get(request) is active:
            del self._active[request]
            self._forgot.set()

    async def _tell_progress(self, parked: Parked, state: str, te: str | None = None) -> None:
        model = parked.request.model
        parked.told = now = self._clock()
        parked.stage = WARM
        if te is None:
            parked.stage = self.outlook.stage(model, self._registry.group(model), now)
        await self._clients.progress(parked.request, state, te, now - parked.since, parked.stage)

    def _retry_after_s(self, model: str) -> float:
        return self.outlook.retry_after_s(
            model,
            num_ahead=self.lot.num_waiting(model),
            is_ready=self._registry.ready(model),
            now=self._clock(),
        )

    def _not_ready(self, model: str) -> Failure:
        return Failure(
            code=NotReady.code,
            message=f"no replica of model {model!r} could take the request in time",
            retry_after_s=self._retry_after_s(model),
        )


_LEAVING: Final = Failure(
    code=Unavailable.code, message="this job executor is leaving", retry_after_s=0.0
)
_TOO_LATE: Final = Failure(
    code=DeadlineExceeded.code, message="the deadline passed before a replica was up"
)
