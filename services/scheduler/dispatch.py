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

Where a role has no TE, or none with room, the next role's are asked (`policy.order_for`); a decode task that no decode
TE takes goes back to the TE that prefilled it, which has the pages.

This module must not know parking, plans, or clients.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from random import Random
from typing import Any, Final

from services.scheduler.policy import DECODE, Costs, Decision, order_for, shortlist
from services.scheduler.registry import Registry
from shared.bus import Bus
from shared.errors import DeepFlowError, InvalidRequest, NotFound, Overloaded, TooLarge, Unavailable
from shared.messages import Accepted, Cancel, Handover, Request, Task, TaskKind
from shared.metrics import Metrics

_DECISION_BUCKETS_S: Final = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.3, 1.0)
_RETRY_AFTER_S: Final = (1.0, 30.0)
_CANDIDATES_SHOWN: Final = 8


class Dispatcher:
    """Finds a TE for one task at a time; keeps the latest decisions for whoever asks why."""

    def __init__(
        self,
        bus: Bus,
        registry: Registry,
        metrics: Metrics,
        *,
        je: str,
        timeout_s: float,
        decisions_kept: int,
        random: Random,
        costs: Costs | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._bus = bus
        self._registry = registry
        self._je = je
        self._timeout_s = timeout_s
        self._random = random
        self._costs = costs or Costs()
        self._clock = clock
        self._decisions: deque[Decision] = deque(maxlen=decisions_kept)
        self._seconds = metrics.histogram(
            "deepflow_scheduler_decision_seconds",
            "From the choice of candidates to the answer that settled it.",
            buckets=_DECISION_BUCKETS_S,
        )
        self._answers = metrics.counter(
            "deepflow_scheduler_dispatched_total", "Answers of TEs to tasks.", ["outcome"]
        )

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
        candidates = self._registry.candidates(request.model, started, request.avoid)
        ordered = order_for(kind, candidates, self._random)
        if handover is not None:
            ordered += [c for c in candidates if c.te == handover.te and c.role != DECODE]
        decision = Decision(
            request=request.request,
            attempt=request.attempt,
            model=request.model,
            kind=kind,
            work_s=self._costs.work_s(request, kind),
            candidates=ordered,
        )
        self._decisions.append(decision)
        message = Task(
            task=task, job=job, je=self._je, kind=kind, request=request, handover=handover
        )
        try:
            return await self._ask(decision, message)
        finally:
            self._seconds.observe(self._clock() - started)

    async def _ask(self, decision: Decision, task: Task) -> str | None:
        request = task.request
        # What a prefill leaves behind is not held for long.
        num_tokens = 0 if task.kind is TaskKind.PREFILL else self._costs.num_tokens(request)
        full: list[Overloaded] = []
        for te in (candidate.te for candidate in shortlist(decision.candidates)):
            # Counted from the question on, not from the answer: a burst must not find the same TE idle.
            self._registry.dispatched(te, task.task, decision.work_s, self._clock(), num_tokens)
            try:
                await self._bus.request(
                    self._bus.subjects.task(te), task, Accepted, timeout_s=self._timeout_s
                )
            except Overloaded as error:
                self._refused(decision, te, task, error)
                full.append(error)
            except (Unavailable, NotFound) as error:
                self._refused(decision, te, task, error)
                self._registry.unreachable(te)
            except (InvalidRequest, TooLarge) as error:
                self._refused(decision, te, task, error)
                raise
            except DeepFlowError as error:
                self._refused(decision, te, task, error)
                self._registry.suspect(te, self._clock())
                await self.cancel(te, Cancel(request=request.request, attempt=request.attempt))
                raise Unavailable(
                    "a replica left the request without an answer", retry_after_s=0.0
                ) from error
            else:
                decision.answers.append((te, "accepted"))
                decision.chosen = te
                self._answers.labels("accepted").inc()
                # Again: beats that left the TE before it knew of the task have not settled it.
                self._registry.dispatched(te, task.task, decision.work_s, self._clock(), num_tokens)
                return te
        if full:
            raise Overloaded(
                f"every replica of model {request.model!r} is full",
                retry_after_s=self._retry_after_s(decision, full),
            )
        return None

    async def cancel(self, te: str, cancel: Cancel) -> None:
        """Tells a TE to drop a request; one that cannot be told drops it when its client goes silent."""
        await self._bus.publish(self._bus.subjects.cancel(te), cancel)

    def _refused(self, decision: Decision, te: str, task: Task, error: DeepFlowError) -> None:
        decision.answers.append((te, error.code))
        self._answers.labels(error.code).inc()
        self._registry.ended(te, task.task)

    def _retry_after_s(self, decision: Decision, full: list[Overloaded]) -> float:
        """The shortest wait a full TE named, else the least work one of the candidates has before it."""
        named = [error.retry_after_s for error in full if error.retry_after_s is not None]
        low, high = _RETRY_AFTER_S
        return min(max(min(named or [c.score for c in decision.candidates]), low), high)

    def explain(self) -> list[dict[str, Any]]:
        """The latest decisions, newest first: candidates with their scores, what each answered, who was chosen."""
        return [
            {
                "request": decision.request,
                "attempt": decision.attempt,
                "model": decision.model,
                "kind": decision.kind.value,
                "work_s": round(decision.work_s, 4),
                "candidates": [
                    {
                        "te": c.te,
                        "role": c.role,
                        "kv_use": round(c.kv_use, 3),
                        "outstanding_s": round(c.outstanding_s, 4),
                        "dispatched_s": round(c.dispatched_s, 4),
                        "avoid": c.avoid,
                        "matched_pages": c.matched_pages,
                    }
                    for c in decision.candidates[:_CANDIDATES_SHOWN]
                ],
                "num_candidates": len(decision.candidates),
                "answers": decision.answers,
                "chosen": decision.chosen,
            }
            for decision in reversed(self._decisions)
        ]
