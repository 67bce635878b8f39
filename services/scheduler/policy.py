"""Which TE first, and which kind of TE. Pure: no bus, no clock, no random state.

`order` puts the least predicted outstanding work first. It is the `load_aware` step of the paper's algorithm 1 (section
5). Scores are seconds of work as the TEs predict them, plus what this JE gave a TE that its beat cannot contain yet.
Scores closer than `TIE_S` are equal: there the longer cached prefix decides, and after that chance, so that replicas
looking at the same beats do not herd onto one TE. `order_by_room` does the same with KV blocks in place of seconds, for
what only decodes: there memory is what runs out. `order_for` says which roles a task may go to, in turn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Final

from shared.messages import Request, TaskKind

MAX_TRIES: Final = 3
TIE_S: Final = 0.005
_TIE_USE: Final = 0.02  # of a TE's blocks

COLOCATED: Final = "colocated"
PREFILL: Final = "prefill"
DECODE: Final = "decode"
# Any TE runs any kind of task; a role is what it is meant for. Each role is tried before the next.
_ROLES: Final[dict[TaskKind, tuple[str, ...]]] = {
    TaskKind.GENERATE: (COLOCATED, DECODE, PREFILL),
    TaskKind.PREFILL: (PREFILL,),
    TaskKind.DECODE: (DECODE,),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A TE that is ready for the model, as this JE sees it now."""

    te: str
    outstanding_s: float  # from its last beat
    dispatched_s: float = 0.0  # given to it by this JE since
    avoid: bool = False  # the client asked to, or it left this JE without an answer lately
    matched_pages: int = 0  # pages of the prompt it holds, where known
    role: str = COLOCATED
    kv_use: float = 0.0  # of its blocks: used, reserved, and given to it by this JE since

    @property
    def score(self) -> float:
        return self.outstanding_s + self.dispatched_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Prior costs of work, for the fifth of a second until the TE's own prediction arrives with its next beat."""

    prefill_tokens_per_s: float = 1000.0
    decode_tokens_per_s: float = 100.0
    expected_output: int = 256  # tokens; `max_tokens` may be the whole context and says little

    def work_s(self, request: Request, kind: TaskKind = TaskKind.GENERATE) -> float:
        """Predicted seconds of work of all choices; the prompt and tokens already delivered are prefilled once.

        A prefill task has only that part, a decode task only the other.
        """
        prefill_s, decode_s = self._parts_s(request)
        return {TaskKind.PREFILL: prefill_s, TaskKind.DECODE: decode_s}.get(
            kind, prefill_s + decode_s
        )

    def num_tokens(self, request: Request) -> int:
        """Tokens whose KV the request will need at its end, as far as can be told."""
        delivered = max((len(ids) for ids in request.output), default=0)
        more = min(request.sampling.max_tokens, self.expected_output)
        return len(request.prompt) + delivered + request.sampling.n * more

    def _parts_s(self, request: Request) -> tuple[float, float]:
        delivered = sum(len(ids) for ids in request.output)
        live = request.sampling.n - len(request.ended)
        output = live * min(request.sampling.max_tokens, self.expected_output)
        prefill = len(request.prompt) + delivered
        return prefill / self.prefill_tokens_per_s, output / self.decode_tokens_per_s


@dataclass(slots=True, kw_only=True)
class Decision:
    """Why a request went where it went, for the status answer: candidates best first, and what each said."""

    request: str
    attempt: int
    model: str
    kind: TaskKind
    work_s: float
    candidates: list[Candidate]
    answers: list[tuple[str, str]] = field(default_factory=list)  # (te, accepted | an error code)
    chosen: str | None = None


def order(candidates: Sequence[Candidate], random: Random) -> list[Candidate]:
    """All candidates, best first; those to avoid come last, in the same order among themselves.

    The caller asks the first few (`shortlist`): their answer is the admission, so a stale score costs a round trip.
    """
    draw = {candidate.te: random.random() for candidate in candidates}
    return sorted(
        candidates,
        key=lambda c: (c.avoid, round(c.score / TIE_S), -c.matched_pages, draw[c.te]),
    )


def order_by_room(candidates: Sequence[Candidate], random: Random) -> list[Candidate]:
    """All candidates, the emptiest KV first, and the least loaded of those that are equally full."""
    draw = {candidate.te: random.random() for candidate in candidates}
    return sorted(
        candidates,
        key=lambda c: (c.avoid, round(c.kv_use / _TIE_USE), round(c.score / TIE_S), draw[c.te]),
    )


def order_for(kind: TaskKind, candidates: Sequence[Candidate], random: Random) -> list[Candidate]:
    """The candidates for a task of `kind`: role after role as they are tried, each role's best first.

    Those to avoid come last, whatever their role.
    """
    rank = {role: number for number, role in enumerate(_ROLES.get(kind, (COLOCATED,)))}
    ordered = (order_by_room if kind is TaskKind.DECODE else order)(candidates, random)
    return sorted(
        (c for c in ordered if c.role in rank), key=lambda c: (c.avoid, rank[c.role])
    )  # stable


def shortlist(ordered: Sequence[Candidate]) -> list[Candidate]:
    """Those that are asked: of each role the first `MAX_TRIES`."""
    tries: Counter[str] = Counter()
    asked = []
    for candidate in ordered:
        tries[candidate.role] += 1
        if tries[candidate.role] <= MAX_TRIES:
            asked.append(candidate)
    return asked
