"""The rules that ours is measured against, as their authors describe them. Pure.

Sources: round robin and least load need none; SGLang's cache-aware router (docs of sgl-router: `--cache-threshold`,
`--balance-abs-threshold`, `--balance-rel-threshold`); Dynamo's KV cost (its router design document).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from services.scheduler.policy.base import COLOCATED, PREFILL, Candidate, least
from services.scheduler.work import Work


class RoundRobin:
    """Each TE in turn, whatever it has; pairs and colocated TEs in proportion to their number."""

    name: Final = "round-robin"

    def __init__(self) -> None:
        self._turns: dict[tuple[str, str], int] = {}

    def scores(self, work: Work, candidates: Sequence[Candidate]) -> list[float]:
        """The distance from the one whose turn it is."""
        order = sorted(range(len(candidates)), key=lambda n: candidates[n].te)
        turn = self._turn(work.model, candidates[0].role if candidates else "")
        scores = [0.0] * len(candidates)
        for place, number in enumerate(order):
            scores[number] = float((place - turn) % len(candidates))
        return scores

    def is_split(self, work: Work, heat: float, candidates: Sequence[Candidate]) -> bool:
        """As many turns for the pairs as there are prefill TEs."""
        wholes = sum(c.role == COLOCATED for c in candidates)
        pairs = sum(c.role == PREFILL for c in candidates)
        return self._turn(work.model, "split") % (wholes + pairs) >= wholes

    def _turn(self, model: str, of: str) -> int:
        turn = self._turns.get((model, of), 0)
        self._turns[(model, of)] = turn + 1
        return turn


class LeastLoad:
    """The least predicted work, whatever the prompt."""

    name: Final = "least-load"

    def scores(self, work: Work, candidates: Sequence[Candidate]) -> list[float]:
        """Seconds of work."""
        return [c.load_s for c in candidates]

    def is_split(self, work: Work, heat: float, candidates: Sequence[Candidate]) -> bool:
        """Where the less loaded TE is."""
        return least(candidates, PREFILL).load_s < least(candidates, COLOCATED).load_s


class _ByHeat:
    def is_split(self, work: Work, heat: float, candidates: Sequence[Candidate]) -> bool:
        """The paper's rule as it stands."""
        return heat > 0


class StrictPrefix(_ByHeat):
    """The longest cached prefix; load among equals."""

    name: Final = "strict-prefix"

    def scores(self, work: Work, candidates: Sequence[Candidate]) -> list[float]:
        """Pages, and below one page load."""
        return [-c.matched_pages + c.load_s / (1.0 + c.load_s) for c in candidates]


class CacheAware(_ByHeat):
    """SGLang's: the owner of more than 30 % of the prompt, else the smallest cache; unbalanced: the shortest queue."""

    name: Final = "sglang"

    def __init__(
        self, *, threshold: float = 0.3, abs_threshold: int = 64, rel_threshold: float = 1.5
    ) -> None:
        self._threshold = threshold
        self._abs = abs_threshold
        self._rel = rel_threshold

    def scores(self, work: Work, candidates: Sequence[Candidate]) -> list[float]:
        """Requests, pages or matched pages, as the case may be."""
        most = max((c.num_running for c in candidates), default=0)
        fewest = min((c.num_running for c in candidates), default=0)
        if most - fewest > self._abs and most > self._rel * fewest:
            return [float(c.num_running) for c in candidates]
        best = max((c.matched_pages for c in candidates), default=0)
        if work.hashes and best > self._threshold * len(work.hashes):
            return [-float(c.matched_pages) for c in candidates]
        return [float(c.pages_active + c.pages_cached) for c in candidates]


class KvCost(_ByHeat):
    """Dynamo's: prefill work to do there, own and queued, plus KV in use; in pages."""

    name: Final = "dynamo"

    def __init__(self, *, overlap_weight: float = 1.0) -> None:
        self._overlap_weight = overlap_weight

    def scores(self, work: Work, candidates: Sequence[Candidate]) -> list[float]:
        """Pages: prefill that would be queued there, and KV that would be active."""
        return [
            self._overlap_weight * (c.queued_tokens + c.prefill_tokens) / c.page
            + c.pages_active
            + len(work.hashes)
            for c in candidates
        ]
