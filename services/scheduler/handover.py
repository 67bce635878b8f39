"""Prefill on one TE, decode on another: which requests are split, and who decodes what was prefilled.

A split request is a pair of tasks. The prefill TE sends the first token (`Delta.moves`), holds the pages under a lease
and says `Prefilled`; only then is a decode TE chosen, the one with the most room for KV, for only now is it known what
it gets. It is told who holds the pages (`Handover`) and takes them from the arena or from there; what does not come it
computes. If no decode TE has room the prefill TE goes on itself. The client is told who speaks next.

Where a failure on the way is noticed, and what becomes of it (only the gateway resubmits):
- the prefill TE dies before `Prefilled`: by the gateway, which waits for its token: next attempt.
- it dies after `Prefilled`: by the decode TE, whose fetch fails: it computes the pages itself.
- a decode TE refuses: here, the next one is asked, then the prefill TE. None at all, or one that stays silent: here;
  the gateway is told that the attempt failed and makes the next one, which may be split again.
- the decode TE dies: by the gateway, as with any TE: next attempt.
- `Prefilled` or this JE is lost: by the gateway, to which within two seconds nobody has spoken on: next attempt. The
  lease at the prefill TE is dropped by the gateway's cancel, or else ends by itself.
- the prefill TE's lease: released by the decode TE once it has the pages; where it never wanted them, by this JE when
  the decode task is over; by every cancel; and by time.
- the client leaves: its cancel goes to the TEs it knows of and, between the two, to this JE, which passes it on to
  both; a decode TE that took the task meanwhile is told as soon as it has answered.

This module must not know parking, subscriptions, or how a TE is chosen.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from services.scheduler.clients import Clients
from services.scheduler.dispatch import Dispatcher
from services.scheduler.job import JobKind, Plan, State, Task, split
from shared import log
from shared.bus import failure
from shared.errors import DeadlineExceeded, DeepFlowError, Overloaded, Unavailable
from shared.messages import Cancel, Handover, Prefilled, Request, TaskEnded
from shared.metrics import Metrics

MAX_SPLIT_ATTEMPTS: Final = 3  # a request that was lost this often is served in one place
_KINDS: Final = (JobKind.CHAT, JobKind.COMPLETION)


@dataclass(slots=True, kw_only=True)
class Active:
    """A request this JE answers for: on its way to a TE, parked, or at a TE until that says it ended."""

    plan: Plan
    client: str
    until: float
    cancelled: bool = False  # while a TE was being asked: to be told to whoever accepts
    request: Request | None = None  # only while it is split and nobody decodes it yet
    since: float = 0.0  # when the request was as it is here

    @property
    def task(self) -> Task:
        """The task that is next or under way; the last one when all are over."""
        tasks = self.plan.jobs[0].tasks
        return next((task for task in tasks if not task.state.terminal), tasks[-1])

    def tes(self) -> list[str]:
        """Every TE that has accepted a task of it, each once."""
        return list(dict.fromkeys(t.te for t in self.plan.jobs[0].tasks if t.te is not None))


class Handovers:
    """Decides and places the split requests of one JE."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        clients: Clients,
        metrics: Metrics,
        *,
        je: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._dispatcher = dispatcher
        self._clients = clients
        self._clock = clock
        self._log = log.get(service="scheduler", id=je)
        self._outcomes = metrics.counter(
            "deepflow_scheduler_handovers_total",
            "Prefilled requests by who goes on: a decode TE (moved), the prefill TE (kept), nobody any more (dropped)"
            " or nobody yet (failed).",
            ["outcome"],
        )

    # ----------------------------------------------------------------------------------------------------- splitting

    def worthwhile(self, request: Request) -> bool:
        """Whether to split it: it can be, it was not lost too often, and the paper's algorithm 1 says so."""
        return (
            request.kind in _KINDS
            and request.attempt <= MAX_SPLIT_ATTEMPTS
            and not request.chunks  # spliced pages are no one else's prefix
            and self._dispatcher.is_split(request)
        )

    async def prefill(self, request: Request, active: Active) -> str | None:
        """Has a prefill TE take the first of a pair of tasks; None (and the plan is as before) if none can.

        Raises as `Dispatcher.dispatch` does, but not Overloaded.
        """
        whole = active.plan
        active.plan = split(JobKind(request.kind), request.request, request.attempt)
        active.request, active.since = request, self._clock()
        te = None
        try:
            te = await self.ask(request, active)
        except Overloaded:
            pass  # the others may have room
        except BaseException:
            active.cancelled = True  # should it have been accepted: nobody wants what comes of it
            raise
        finally:
            if te is None:
                active.plan, active.request = whole, None
        return te

    async def ask(
        self, request: Request, active: Active, handover: Handover | None = None
    ) -> str | None:
        """Places the task that is next. Raises as `Dispatcher.dispatch` does."""
        task = active.task
        te = await self._dispatcher.dispatch(
            request,
            job=active.plan.jobs[0].id,
            task=task.id,
            kind=task.kind,
            handover=handover,
        )
        if te is not None:
            if task.state is State.READY:  # else its end overtook the answer
                active.plan.start(task.id, te)
            if active.cancelled:  # meanwhile, and nobody else knows which TE to tell
                await self.cancel(te, Cancel(request=request.request, attempt=request.attempt))
        return te

    # -------------------------------------------------------------------------------------------------- handing over

    def done(self, prefilled: Prefilled, active: Active) -> bool:
        """Notes that the prefill task of this attempt is done; False if it was known, or is not part of the plan."""
        task = active.plan.jobs[0].tasks[0]
        if active.request is None or task.id != prefilled.task or task.state.terminal:
            return False
        if task.state is State.READY:  # overtook the TE's answer, which is still under way
            active.plan.start(task.id, prefilled.handover.te)
        active.plan.finish(task.id)
        return True

    async def place(self, prefilled: Prefilled, active: Active, request: Request) -> bool:
        """Finds the TE that goes on with `request`; False if the attempt ends here, as its client has been told."""
        handover = prefilled.handover
        if active.cancelled:
            await self.drop(prefilled)
            return False
        request = self._continued(request, handover, self._clock() - active.since)
        te, why = None, None
        try:
            if request.deadline_ms <= 0:
                raise DeadlineExceeded("the deadline passed before the request was decoded")
            te = await self.ask(request, active, handover)
        except (DeadlineExceeded, Overloaded) as error:
            why = failure(error)
        except DeepFlowError as error:
            self._log.warning("handover_failed", request=request.request, error=error.message)
        if te is not None:
            active.request = None
            self._outcomes.labels("kept" if te == handover.te else "moved").inc()
            self._log.debug("handed_over", request=request.request, of=handover.te, to=te)
            await self._clients.progress(request, "moved", te)
            return True
        self._outcomes.labels("failed").inc()
        active.plan.cancel()
        if not active.cancelled:
            await self._clients.end(request, "failed", why or failure(_NOBODY))
        return False

    def _continued(self, request: Request, handover: Handover, waited_s: float) -> Request:
        """The request as the decode TE gets it: with the first tokens, and less time."""
        have = request.output[0] if request.output else []
        return replace(
            request,
            output=[[*have, *handover.ids]],
            deadline_ms=max(0, request.deadline_ms - int(waited_s * 1000)),
        )

    async def drop(self, prefilled: Prefilled) -> None:
        """Nobody wants what was prefilled: its TE need not hold it."""
        self._outcomes.labels("dropped").inc()
        cancel = Cancel(request=prefilled.request, attempt=prefilled.attempt)
        await self.cancel(prefilled.handover.te, cancel)

    def ended(self, ended: TaskEnded) -> None:
        """A TE is done with a task."""
        self._dispatcher.ended(ended)

    async def cancel(self, te: str, cancel: Cancel) -> None:
        """Tells a TE to drop a request, as far as the bus is there."""
        try:
            await self._dispatcher.cancel(te, cancel)
        except DeepFlowError as error:
            # The gateway cancels as well, and its silence counts too.
            self._log.warning("cancel_lost", te=te, request=cancel.request, error=error.message)


_NOBODY: Final = Unavailable("no replica goes on with what was prefilled", retry_after_s=0.0)
