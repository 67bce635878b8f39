"""Which TE first: candidates in order of least predicted outstanding work. Pure: no bus, no clock, no random state.

This is the `load_aware` step of the paper's algorithm 1 (section 5). Scores are seconds of work as the TEs predict
them, plus what this JE gave a TE that its beat cannot contain yet. Scores closer than `TIE_S` are equal: there the
longer cached prefix decides, and after that chance, so that replicas looking at the same beats do not herd onto one TE.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Final

from shared.messages import Request

MAX_TRIES: Final = 3
TIE_S: Final = 0.005


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A TE that is ready for the model, as this JE sees it now."""

    te: str
    outstanding_s: float  # from its last beat
    dispatched_s: float = 0.0  # given to it by this JE since
    avoid: bool = False  # the client asked to, or it left this JE without an answer lately
    matched_pages: int = 0  # pages of the prompt it holds, where known

    @property
    def score(self) -> float:
        return self.outstanding_s + self.dispatched_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Prior costs of work, for the fifth of a second until the TE's own prediction arrives with its next beat."""

    prefill_tokens_per_s: float = 1000.0
    decode_tokens_per_s: float = 100.0
    expected_output: int = 256  # tokens; `max_tokens` may be the whole context and says little

    def work_s(self, request: Request) -> float:
        """Predicted seconds of work of all choices; the prompt and tokens already delivered are prefilled once."""
        delivered = sum(len(ids) for ids in request.output)
        live = request.sampling.n - len(request.ended)
        output = live * min(request.sampling.max_tokens, self.expected_output)
        prefill = len(request.prompt) + delivered
        return prefill / self.prefill_tokens_per_s + output / self.decode_tokens_per_s


@dataclass(slots=True, kw_only=True)
class Decision:
    """Why a request went where it went, for the status answer: candidates best first, and what each said."""

    request: str
    attempt: int
    model: str
    work_s: float
    candidates: list[Candidate]
    answers: list[tuple[str, str]] = field(default_factory=list)  # (te, accepted | an error code)
    chosen: str | None = None


def order(candidates: Sequence[Candidate], random: Random) -> list[Candidate]:
    """All candidates, best first; those to avoid come last, in the same order among themselves.

    The caller asks the first `MAX_TRIES` of them: their answer is the admission, so a stale score costs a round trip.
    """
    draw = {candidate.te: random.random() for candidate in candidates}
    return sorted(
        candidates,
        key=lambda c: (c.avoid, round(c.score / TIE_S), -c.matched_pages, draw[c.te]),
    )
