"""Places work on TEs: joins what is known (beats, prompt trees, heatmaps, lengths, costs) and asks the policy.

The very code that ships and that the simulator runs. Pure: the clock and randomness are passed in, nothing is sent; the
caller asks the TEs in the order of a `Decision` and reports what they say, since a TE's answer is the admission.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from heapq import nsmallest
from operator import attrgetter
from random import Random
from typing import Final

from services.scheduler.costs import Costs
from services.scheduler.heatmap import Heatmaps
from services.scheduler.lengths import Lengths
from services.scheduler.policy.base import COLOCATED, DECODE, PREFILL, Candidate, Policy
from services.scheduler.prompt_tree import PromptTrees
from services.scheduler.registry import Given, Registry
from services.scheduler.work import Work
from shared.messages import Request, TaskEnded, TaskKind

MAX_TRIES: Final = 3
MIN_SPLIT_TOKENS: Final = 512  # uncached ones: what a hand-over costs is never worth less prefill
# Any TE runs any kind of task; a role is what it is meant for. Each role is tried before the next.
_ROLES: Final[dict[TaskKind, tuple[str, ...]]] = {
    TaskKind.GENERATE: (COLOCATED, DECODE, PREFILL),
    TaskKind.PREFILL: (PREFILL,),
    TaskKind.DECODE: (DECODE,),
}
_KEPT: Final = 8  # candidates of a role that a decision keeps: there may be a thousand
_SOONEST: Final = attrgetter("ttft_s")
_LONGEST_PREFIX: Final = attrgetter("prefill_tokens")
_ASSUMED_S: Final = 2.0  # a TE counts as holding what it was just given and has yet to announce


@dataclass(slots=True, kw_only=True)
class Decision:
    """Why a task went where it went: candidates best first with all that was known of them, and what each said.

    Of each role the best by score are kept, and those that regret is measured against.
    """

    request: str
    attempt: int
    model: str
    kind: TaskKind
    policy: str
    num_known: int
    num_pages: int  # of the prompt, full ones
    output_tokens: int  # expected
    candidates: list[Candidate]
    num_candidates: int  # of the roles tried, those not kept included
    answers: list[tuple[str, str]] = field(default_factory=list)  # (te, accepted | an error code)
    chosen: str | None = None
    ended: TaskEnded | None = None

    def shortlist(self) -> list[Candidate]:
        """Those that are asked: of each role the first `MAX_TRIES`. Their answer is the admission, so a stale score
        costs a round trip."""
        tries: Counter[str] = Counter()
        asked = []
        for candidate in self.candidates:
            tries[candidate.role] += 1
            if tries[candidate.role] <= MAX_TRIES:
                asked.append(candidate)
        return asked

    def of(self, te: str | None) -> Candidate | None:
        """What was known of a TE."""
        return next((c for c in self.candidates if c.te == te), None)


class Placer:
    """One JE's decisions. Owns nothing but its randomness; what it joins is fed by others."""

    def __init__(
        self,
        *,
        policy: Policy,
        registry: Registry,
        trees: PromptTrees,
        heatmaps: Heatmaps,
        lengths: Lengths,
        costs: Costs,
        random: Random,
        min_split_tokens: int = MIN_SPLIT_TOKENS,
    ) -> None:
        self.policy = policy
        self.registry = registry
        self._trees = trees
        self._heatmaps = heatmaps
        self._lengths = lengths
        self._costs = costs
        self._random = random
        self._min_split_tokens = min_split_tokens

    # ----------------------------------------------------------------------------------------------------- decisions

    def work(self, request: Request, kind: TaskKind) -> Work:
        """What a request asks for, with the output length as predicted."""
        return Work.of(request, kind, self._lengths.predict(request))

    def is_split(self, work: Work, now: float) -> bool:
        """Algorithm 1, step 1: whether a pair of TEs takes it. Only one choice can move from one TE to another.

        Where no colocated TE is up a pair takes whatever has enough to prefill that nobody holds yet.
        """
        if work.num_choices != 1 or work.num_known < self._min_split_tokens:
            return False
        roles = self.registry.roles(work.model, now, work.avoid)
        if not {PREFILL, DECODE} <= roles:
            return False
        candidates = [c for c in self._candidates(work, now) if not c.avoid]
        uncached = min(c.prefill_tokens for c in candidates)
        if uncached < self._min_split_tokens:
            return False
        if COLOCATED not in roles:
            return True
        heat = self._heatmaps.of(work.model).value(uncached, work.length.mid)
        return self.policy.is_split(work, heat, candidates)

    def place(self, work: Work, now: float, *, holder: str | None = None) -> Decision:
        """Algorithm 1, step 2: the candidates in the order in which to ask them.

        Roles come as they are tried, each role's best first; those to avoid come last, whatever their role. `holder` is
        the TE that prefilled a decode task: it goes on itself when no other can.
        """
        found = self._candidates(work, now)
        kept: list[tuple[bool, int, float, float, str, Candidate]] = []
        others: list[Candidate] = []  # worth keeping as well
        draw, num = self._random.random, 0
        for rank, role in enumerate(_ROLES[work.kind]):
            group = [c for c in found if c.role == role]
            if group:
                num += len(group)
                for c, score in zip(group, self.policy.scores(work, group), strict=True):
                    c.score = score
                keyed = [(c.avoid, rank, c.score, draw(), c.te, c) for c in group]
                kept += nsmallest(_KEPT, keyed)
                others += (min(group, key=_SOONEST), min(group, key=_LONGEST_PREFIX))
        others += [c for c in found if c.te == holder]
        ordered = {c.te: c for *_, c in sorted(kept)} | {c.te: c for c in others}
        return Decision(
            request=work.request,
            attempt=work.attempt,
            model=work.model,
            kind=work.kind,
            policy=self.policy.name,
            num_known=work.num_known,
            num_pages=len(work.hashes),
            output_tokens=work.length.mid,
            candidates=list(ordered.values()),
            num_candidates=num,
        )

    def _candidates(self, work: Work, now: float) -> list[Candidate]:
        found = self.registry.candidates(work.model, now, work.avoid, band=work.band)
        matched: dict[str, int] = {}
        if work.hashes and work.kind is not TaskKind.DECODE:
            for role in {c.role for c in found}:
                matched |= self._trees.match(work.model, role, work.hashes, now)
        output_tokens = self._costs.output_tokens(work)
        num_tokens = 1 if work.kind is TaskKind.DECODE else work.num_known
        for c in found:
            if (
                c.te in matched
            ):  # the last known token is computed in any case, and with it its page
                c.matched_pages = min(matched[c.te], (num_tokens - 1) // c.page)
            c.computes(num_tokens - c.matched_pages * c.page)
            c.decode_s = output_tokens * c.decode_token_s
        return found

    # ----------------------------------------------------------------------------------------------- what became of it

    def asked(self, te: Candidate, work: Work, task: str, now: float) -> None:
        """The TE is being asked. Counts from the question on: a burst must not find the same TE idle, nor each of its
        prompts find that it alone would bring what they share. Should the TE refuse, that ends by itself."""
        self.registry.give(te.te, task, self._given(te, work, now))
        self.registry.did(te.te, te.prefill_tokens, now)
        if work.kind is not TaskKind.DECODE and work.hashes:
            self._trees.assume(te.te, work.hashes, now, _ASSUMED_S)

    def accepted(self, te: Candidate, work: Work, task: str, now: float) -> None:
        """It has taken the task."""
        # Again: beats that left the TE before it knew of the task have not settled it.
        self.registry.give(te.te, task, self._given(te, work, now))

    def refused(self, te: Candidate, task: str, now: float) -> None:
        """It does not do the task."""
        self.registry.ended(te.te, task)
        self.registry.did(te.te, -te.prefill_tokens, now)

    def ended(self, te: str, task: str) -> None:
        """The task is over."""
        self.registry.ended(te, task)

    def _given(self, te: Candidate, work: Work, now: float) -> Given:
        return Given(
            when=now,
            prefill_tokens=te.prefill_tokens,
            prefill_s=te.prefill_s,
            decode_s=te.decode_s,
            num_tokens=self._costs.num_tokens(work),
        )
