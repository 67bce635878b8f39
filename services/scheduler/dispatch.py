"""Asks TEs to take a task, best first, and records why. A TE's own answer is the admission, so JEs need no agreement.

What an answer means:
- `Accepted`: the TE owes the client the end of every choice from now on.
- `Overloaded`: it is full; the next candidate is asked, `MAX_TRIES` of each role in all.
- `Unavailable` (nobody listens, or it drains) and `NotFound` (it does not run the model): nothing was accepted, next
  candidate, and none for this JE until the TE beats again.
- silence, or a fault inside the TE: **ambiguous**, it may have accepted. Giving the same attempt to another TE could
  then produce it twice, and on devices whose arithmetic depends on the batch the two would diverge under one
  (request, attempt). So the JE cancels the attempt at that TE and fails it with `Unavailable(retry_after_s=0)`: the
  gateway resubmits as the next attempt, which makes whatever the silent TE still sends stale everywhere.
- any other failure (too long, malformed): every TE would say the same, so it goes to the client as it is.

Where a role has no TE, or none with room, the next role's are asked (`placer`); a decode task that no decode TE takes
goes back to the TE that prefilled it, which has the pages.

This module must not know parking, plans, or clients.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from services.scheduler.placer import Decision, Placer
from services.scheduler.policy.base import Candidate
from services.scheduler.regret import Regrets
from services.scheduler.work import Work
from shared.bus import Bus
from shared.errors import DeepFlowError, InvalidRequest, NotFound, Overloaded, TooLarge, Unavailable
from shared.messages import Accepted, Cancel, Handover, Request, Task, TaskEnded, TaskKind
from shared.metrics import Metrics

_DECISION_BUCKETS_S: Final = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.3, 1.0)
_RETRY_AFTER_S: Final = (1.0, 30.0)


class Dispatcher:
    """Finds a TE for one task at a time."""

    def __init__(
        self,
        bus: Bus,
        placer: Placer,
        regrets: Regrets,
        metrics: Metrics,
        *,
        je: str,
        timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._bus = bus
        self._placer = placer
        self._regrets = regrets
        self._je = je
        self._timeout_s = timeout_s
        self._clock = clock
        self._seconds = metrics.histogram(
            "deepflow_scheduler_decision_seconds",
            "From the choice of candidates to the answer that settled it.",
            buckets=_DECISION_BUCKETS_S,
        )
        self._answers = metrics.counter(
            "deepflow_scheduler_dispatched_total", "Answers of TEs to tasks.", ["outcome"]
        )

    def is_split(self, request: Request) -> bool:
        """Whether a pair of TEs is to take the request."""
        work = self._placer.work(request, TaskKind.GENERATE)
        return self._placer.is_split(work, self._clock())

    async def dispatch(
        self,
        request: Request,
        *,
        job: str,
        task: str,
        kind: TaskKind,
        handover: Handover | None = None,
    ) -> str | None:
        """The TE that accepted the task, or None if no candidate could be reached (the request may be parked).

        Raises Overloaded if every candidate asked was full, Unavailable with `retry_after_s` 0 if one left the
        matter open, or the error with which a TE refused the request itself.
        """
        started = self._clock()
        work = self._placer.work(request, kind)
        holder = handover.te if handover is not None else None
        decision = self._placer.place(work, started, holder=holder)
        message = Task(
            task=task,
            job=job,
            je=self._je,
            kind=kind,
            request=request,
            handover=handover,
            expected_output=work.length.mid,
        )
        self._regrets.placing(task, decision)
        chosen = None
        try:
            chosen = await self._ask(decision, work, message)
        finally:
            self._regrets.placed(decision, chosen)
            self._seconds.observe(self._clock() - started)
        return chosen

    async def _ask(self, decision: Decision, work: Work, task: Task) -> str | None:
        request = task.request
        full: list[Overloaded] = []
        for candidate in decision.shortlist():
            te = candidate.te
            self._placer.asked(candidate, work, task.task, self._clock())
            try:
                await self._bus.request(
                    self._bus.subjects.task(te), task, Accepted, timeout_s=self._timeout_s
                )
            except Overloaded as error:
                self._refused(decision, candidate, task, error)
                full.append(error)
            except (Unavailable, NotFound) as error:
                self._refused(decision, candidate, task, error)
                self._placer.registry.unreachable(te)
            except (InvalidRequest, TooLarge) as error:
                self._refused(decision, candidate, task, error)
                raise
            except DeepFlowError as error:
                self._refused(decision, candidate, task, error)
                self._placer.registry.suspect(te, self._clock())
                await self.cancel(te, Cancel(request=request.request, attempt=request.attempt))
                raise Unavailable(
                    "a replica left the request without an answer", retry_after_s=0.0
                ) from error
            else:
                decision.answers.append((te, "accepted"))
                self._answers.labels("accepted").inc()
                self._placer.accepted(candidate, work, task.task, self._clock())
                return te
        if full:
            raise Overloaded(
                f"every replica of model {request.model!r} is full",
                retry_after_s=self._retry_after_s(decision, full),
            )
        return None

    def ended(self, ended: TaskEnded) -> None:
        """A TE is done with a task."""
        self._placer.ended(ended.te, ended.task)
        self._regrets.ended(ended)

    async def cancel(self, te: str, cancel: Cancel) -> None:
        """Tells a TE to drop a request; one that cannot be told drops it when its client goes silent."""
        await self._bus.publish(self._bus.subjects.cancel(te), cancel)

    def _refused(self, decision: Decision, te: Candidate, task: Task, error: DeepFlowError) -> None:
        decision.answers.append((te.te, error.code))
        self._answers.labels(error.code).inc()
        self._placer.refused(te, task.task, self._clock())

    def _retry_after_s(self, decision: Decision, full: list[Overloaded]) -> float:
        """The shortest wait a full TE named, else the least work one of the candidates has before it."""
        named = [error.retry_after_s for error in full if error.retry_after_s is not None]
        low, high = _RETRY_AFTER_S
        return min(max(min(named or [c.load_s for c in decision.candidates]), low), high)
