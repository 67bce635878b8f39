"""Why pages were fetched, or not: a bounded record of the latest decisions, for whoever asks afterwards.

Plain data; the clock is passed in. This module must not know how a decision is come to.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from services.cache.cost import Plan, Source

RECORDS: Final = 512


@dataclass(slots=True)
class Decision:
    """One `Populate`: what there was, what was chosen, what came of it. Times in microseconds."""

    number: int
    at: float
    te: str
    model: str
    num_pages: int
    compute_us: float
    fetch_us: float
    runs: list[str]
    offers: list[str]
    outcome: str = "pending"  # nothing | local | peer | fetched | partly | failed
    num_landed: int = 0
    took_us: float = 0.0
    faults: list[str] = field(default_factory=list)

    @property
    def why(self) -> str:
        """The decision in a line."""
        chosen = " ".join(self.runs) or "compute"
        offers = ", ".join(self.offers) or "nobody has them"
        return f"#{self.number} {chosen}; {offers}; to compute all: {self.compute_us / 1e3:.1f} ms"


class Decisions:
    """The latest RECORDS decisions."""

    def __init__(self) -> None:
        self._records: deque[Decision] = deque(maxlen=RECORDS)
        self.num_made = 0

    def add(
        self, te: str, model: str, num_pages: int, sources: Sequence[Source], plan: Plan, now: float
    ) -> Decision:
        """Note a plan and what it was chosen from; the outcome is filled in later."""
        self.num_made += 1
        decision = Decision(
            number=self.num_made,
            at=now,
            te=te,
            model=model,
            num_pages=num_pages,
            compute_us=plan.compute_us,
            fetch_us=plan.fetch_us,
            runs=[f"{run.source}[{run.start}:{run.stop}]" for run in plan.runs],
            offers=[
                f"{source.name} {sum(source.has)} pages at {source.page_us / 1e3:.2f} ms"
                f" after {source.start_us / 1e3:.2f} ms"
                for source in sources
                if any(source.has)
            ],
        )
        self._records.append(decision)
        return decision

    def latest(self, number: int, now: float) -> list[dict[str, Any]]:
        """The last `number` decisions, newest first, as JSON for people."""
        newest = list(self._records)[: -number - 1 : -1]
        return [
            {
                "age_s": round(now - decision.at, 3),
                "te": decision.te,
                "model": decision.model,
                "pages": decision.num_pages,
                "why": decision.why,
                "outcome": decision.outcome,
                "landed": decision.num_landed,
                "predicted_ms": round(decision.fetch_us / 1e3, 2),
                "took_ms": round(decision.took_us / 1e3, 2),
                **({"faults": decision.faults} if decision.faults else {}),
            }
            for decision in newest
        ]
