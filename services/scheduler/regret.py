"""What was predicted against what came: the latest decisions explained, and whether another TE would have been better.

Regret of a placement is what it cost beyond the best other candidate of the type that was neither full nor to be
avoided, as far as one can know: the other's part stays a prediction. In tokens: prompt tokens that were computed
although another TE was thought to hold them. In seconds: how much later the first token came than another TE was
predicted to bring it. Load-aware placement regrets tokens on purpose; what it must not do is regret seconds.

This module must not know how a TE is chosen.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from itertools import count
from typing import Any, Final

from services.scheduler.placer import Decision
from services.scheduler.policy.base import Candidate
from shared.messages import TaskEnded, TaskKind
from shared.metrics import Metrics

MAX_TOLD: Final = 512  # decisions in one answer: a message on the bus is bounded
_PER_REQUEST: Final = 16  # decisions: tasks of all its attempts
_BUCKETS_S: Final = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Regret:
    """Of one placement that has ended; `None` where there was no other candidate, or no first token."""

    predicted_hit_tokens: int
    hit_tokens: int
    hit_regret_tokens: int | None
    predicted_ttft_s: float
    ttft_s: float | None
    ttft_regret_s: float | None

    @classmethod
    def of(cls, chosen: Candidate, others: list[Candidate], ended: TaskEnded) -> Regret:
        """From what was known of the chosen one and of `others`, and what the chosen one says it did."""
        ttft_s = ended.first_token_ms / 1000 if ended.first_token_ms >= 0 else None
        best_s = min((c.ttft_s for c in others), default=None)
        most = max((_hit_tokens(c) for c in others), default=None)
        return cls(
            predicted_hit_tokens=_hit_tokens(chosen),
            hit_tokens=ended.cached_tokens,
            hit_regret_tokens=None if most is None else max(0, most - ended.cached_tokens),
            predicted_ttft_s=chosen.ttft_s,
            ttft_s=ttft_s,
            ttft_regret_s=None if ttft_s is None or best_s is None else max(0.0, ttft_s - best_s),
        )


def _hit_tokens(candidate: Candidate) -> int:
    return candidate.matched_pages * candidate.page


class Regrets:
    """The decisions about the latest `max_requests` requests, oldest forgotten first."""

    def __init__(self, metrics: Metrics, *, max_requests: int) -> None:
        self._max_requests = max_requests
        self._decisions: OrderedDict[str, list[tuple[str, Decision]]] = OrderedDict()
        self._tokens = metrics.counter(
            "deepflow_scheduler_prompt_tokens_total",
            "Tokens of placed prompts (all), and those of them that were predicted to be cached (predicted), were"
            " (hit), or were not although another TE was thought to hold them (regret).",
            ["of"],
        )
        self._regret = metrics.histogram(
            "deepflow_scheduler_regret_seconds",
            "How much later the first token came than the best other TE was predicted to bring it.",
            buckets=_BUCKETS_S,
        )
        self._error = metrics.histogram(
            "deepflow_scheduler_ttft_error_seconds",
            "How far the first token was off its predicted time.",
            buckets=_BUCKETS_S,
        )

    def placing(self, task: str, decision: Decision) -> None:
        """TEs are being asked to take a task."""
        decisions = self._decisions.setdefault(decision.request, [])
        self._decisions.move_to_end(decision.request)
        decisions.append((task, decision))
        del decisions[:-_PER_REQUEST]
        if len(self._decisions) > self._max_requests:
            self._decisions.popitem(last=False)

    def placed(self, decision: Decision, te: str | None) -> None:
        """A TE took the task, or none; its end may have come before its answer."""
        decision.chosen = te
        if decision.ended is not None:
            self._count(decision, decision.ended)

    def ended(self, ended: TaskEnded) -> None:
        """A TE is done with a task."""
        for task, decision in self._decisions.get(ended.request, ()):
            if task == ended.task and decision.ended is None:
                decision.ended = ended
                self._count(decision, ended)

    def _count(self, decision: Decision, ended: TaskEnded) -> None:
        regret = _regret(decision)
        if regret is None or decision.kind is TaskKind.DECODE or ended.first_token_ms < 0:
            return
        self._tokens.labels("all").inc(ended.prompt_tokens)
        self._tokens.labels("predicted").inc(regret.predicted_hit_tokens)
        self._tokens.labels("hit").inc(regret.hit_tokens)
        self._tokens.labels("regret").inc(regret.hit_regret_tokens or 0)
        if regret.ttft_s is not None:
            self._error.observe(abs(regret.ttft_s - regret.predicted_ttft_s))
        if regret.ttft_regret_s is not None:
            self._regret.observe(regret.ttft_regret_s)

    # ------------------------------------------------------------------------------------------------------ explained

    def of(self, name: str) -> list[dict[str, Any]]:
        """The decisions about a request, or about all requests `<name>-0`, `<name>-1`, ... of one answer, in order; the
        first `MAX_TOLD` of them."""
        decisions = self._decisions.get(name, [])
        for number in count():
            more = self._decisions.get(f"{name}-{number}")
            if more is None or len(decisions) >= MAX_TOLD:
                break
            decisions = decisions + more
        return [explain(decision) for _, decision in decisions[:MAX_TOLD]]

    def latest(self, num: int) -> list[dict[str, Any]]:
        """The latest decisions, newest first."""
        found: list[dict[str, Any]] = []
        for decisions in reversed(self._decisions.values()):
            found += [explain(decision) for _, decision in reversed(decisions)]
            if len(found) >= num:
                break
        return found[:num]


def _regret(decision: Decision) -> Regret | None:
    chosen = decision.of(decision.chosen)
    if chosen is None or decision.ended is None:
        return None
    asked = {te for te, _ in decision.answers}  # the others of them have refused
    others = [
        c
        for c in decision.candidates
        if c.te not in asked and c is not chosen and c.role == chosen.role and not c.avoid
    ]
    return Regret.of(chosen, others, decision.ended)


def explain(decision: Decision) -> dict[str, Any]:
    """A decision for people: what was known, what was asked, who was chosen, and what really came."""
    body: dict[str, Any] = {
        "request": decision.request,
        "attempt": decision.attempt,
        "model": decision.model,
        "kind": decision.kind.value,
        "policy": decision.policy,
        "prompt_tokens": decision.num_known,
        "prompt_pages": decision.num_pages,
        "output_tokens": decision.output_tokens,
        "candidates": [_candidate(candidate) for candidate in decision.candidates],
        "num_candidates": decision.num_candidates,
        "answers": decision.answers,
        "chosen": decision.chosen,
    }
    ended, regret = decision.ended, _regret(decision)
    if ended is not None:
        body["actual"] = {
            "finish": ended.finish,
            "cached_tokens": ended.cached_tokens,
            "output_tokens": ended.output_tokens,
            "ttft_s": ended.first_token_ms / 1000 if ended.first_token_ms >= 0 else None,
            "total_s": ended.total_ms / 1000,
        }
    if regret is not None:
        body["regret"] = {
            "tokens": regret.hit_regret_tokens,
            "seconds": regret.ttft_regret_s,
        }
    return body


def _candidate(candidate: Candidate) -> dict[str, Any]:
    return {
        "te": candidate.te,
        "role": candidate.role,
        "avoid": candidate.avoid,
        "score": round(candidate.score, 4),
        "matched_pages": candidate.matched_pages,
        "cached_tokens": _hit_tokens(candidate),
        "outstanding_s": round(candidate.outstanding_s, 4),
        "dispatched_s": round(candidate.dispatched_s, 4),
        "recent_s": round(candidate.recent_s, 4),
        "queued_tokens": round(candidate.queued_tokens),
        "kv_use": round(candidate.kv_use, 3),
        "ttft_s": round(candidate.ttft_s, 4),
    }
