"""What a placement policy sees and answers. Pure: no bus, no clock, no random state of its own.

A policy scores the TEs of one type for one piece of work; the placer sorts, draws ties and tries one type after
another. This module must not know where candidates come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from services.scheduler.work import Work

COLOCATED: Final = "colocated"
PREFILL: Final = "prefill"
DECODE: Final = "decode"


@dataclass(slots=True)
class Candidate:
    """A TE that is ready for the model, as this JE sees it now. Fields by name, but in the registry's loop."""

    te: str
    role: str = COLOCATED
    avoid: bool = False  # the client asked to, or it left this JE without an answer lately
    page: int = 16  # tokens
    outstanding_s: float = 0.0  # predicted work before this one: its last beat, less the time since
    dispatched_s: float = 0.0  # given to it since, and not in that beat
    recent_s: float = 0.0  # prefill given to it in the last minute, done or not
    queued_tokens: float = 0.0  # to be computed before this prompt
    num_running: int = 0  # requests in its batch or its queue
    pages_active: int = 0  # in use, reserved, or given to it since
    pages_cached: int = 0
    pages_total: int = 0
    token_s: float = 0.0  # to compute a token of a prompt there
    decode_token_s: float = 0.0  # machine time of a token of output there
    decode_row_s: float = 0.0  # by which one more sequence lengthens a decode step there
    # What depends on the work, from here on: the placer's.
    matched_pages: int = 0  # leading pages of the prompt that it holds and can use
    prefill_tokens: int = 0  # of the prompt that it would have to compute: see `computes`
    prefill_s: float = 0.0  # what these take
    ttft_s: float = 0.0  # predicted time to the first token, were the task given now
    decode_s: float = 0.0  # machine time of the predicted output
    score: float = 0.0  # the policy's; the lowest is asked first

    def computes(self, prefill_tokens: int) -> None:
        """So many tokens of the prompt are to be computed there."""
        self.prefill_tokens = prefill_tokens
        self.prefill_s = prefill_tokens * self.token_s
        self.ttft_s = self.queued_tokens * self.token_s + self.prefill_s

    @property
    def load_s(self) -> float:
        """Seconds of work before a task given now."""
        return self.outstanding_s + self.dispatched_s

    @property
    def kv_use(self) -> float:
        """Share of its pages that are spoken for."""
        return self.pages_active / max(1, self.pages_total)


class Policy(Protocol):
    """One rule. It may count its own decisions (round robin does), and keeps nothing else."""

    @property
    def name(self) -> str:
        """By which it is asked for."""
        ...

    def scores(self, work: Work, candidates: Sequence[Candidate]) -> list[float]:
        """A score for each candidate, all of one type; the lowest is best, equal ones are drawn."""
        ...

    def is_split(self, work: Work, heat: float, candidates: Sequence[Candidate]) -> bool:
        """Whether prefill and decode go to a pair: `heat` is the heatmap's value (above 0: a pair is better).

        `candidates` are of all types, at least one of each.
        """
        ...


def least(candidates: Sequence[Candidate], role: str) -> Candidate:
    """The candidate of a type that would give the first token soonest."""
    return min((c for c in candidates if c.role == role), key=lambda c: c.load_s + c.prefill_s)
