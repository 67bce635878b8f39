"""What one request of a load brought, and what makes it a good one. Pure; it must not know HTTP.

Names and definitions are those of `vllm bench serve`: TTFT is sent -> first token, TPOT the mean time of the tokens
after the first, ITL the time from one chunk to the next, E2EL sent -> last token; goodput counts the requests per
second that keep to every limit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

from deepflow.bench.distribution import summary

MEASURES: Final = ("ttft", "tpot", "e2el")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One request. All times are seconds on one steady clock.

    `times_s` are the arrivals of the chunks that carried text. `status` 0 means that there was no whole answer; `error`
    then says why.
    """

    sent_s: float
    status: int
    id: str = ""  # as the server names the answer
    times_s: Sequence[float] = field(default_factory=tuple)
    text: str = ""
    finish: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    error: str = ""
    retry_after_s: float = -1.0  # what a refusal said; -1: nothing

    @property
    def ok(self) -> bool:
        """Answered in full, with at least one token."""
        return self.status == 200 and bool(self.finish) and bool(self.times_s)

    @property
    def ttft_s(self) -> float:
        """Sent to first token. Only of one that has tokens, as all below."""
        return self.times_s[0] - self.sent_s

    @property
    def e2el_s(self) -> float:
        """Sent to last token."""
        return self.times_s[-1] - self.sent_s

    @property
    def tpot_s(self) -> float:
        """Mean time per token after the first; 0 for a single token."""
        if self.output_tokens < 2:
            return 0.0
        return (self.times_s[-1] - self.times_s[0]) / (self.output_tokens - 1)

    @property
    def itl_s(self) -> list[float]:
        """The gaps between chunks."""
        return [late - early for early, late in pairwise(self.times_s)]


@dataclass(frozen=True, slots=True)
class Goal:
    """A limit that a good request keeps."""

    measure: str  # one of MEASURES
    limit_ms: float

    @classmethod
    def parse(cls, text: str) -> Goal:
        """`ttft:500`: at most 500 ms to the first token. Raises ValueError."""
        measure, _, limit = text.partition(":")
        if measure not in MEASURES:
            raise ValueError(f"{text!r}: a goal is one of {', '.join(MEASURES)}, a colon, and ms")
        limit_ms = float(limit)
        if not 0 < limit_ms < float("inf"):
            raise ValueError(f"{text!r}: the limit is a number of milliseconds above 0")
        return cls(measure, limit_ms)

    def met_by(self, sample: Sample) -> bool:
        """Whether a whole answer kept the limit."""
        value_s: float = getattr(sample, f"{self.measure}_s")
        return value_s * 1000 <= self.limit_ms


def num_good(samples: Iterable[Sample], goals: Sequence[Goal]) -> int:
    """How many were answered in full and kept every limit."""
    return sum(sample.ok and all(goal.met_by(sample) for goal in goals) for sample in samples)


def tokens_per_s(samples: Sequence[Sample]) -> float:
    """Output tokens of whole answers over the time from the first request sent to the last token."""
    whole = [sample for sample in samples if sample.ok]
    return sum(sample.output_tokens for sample in whole) / span_s(samples) if whole else 0.0


def span_s(samples: Sequence[Sample]) -> float:
    """First request sent to last token of any; 0 if no token ever came."""
    ends = [sample.times_s[-1] for sample in samples if sample.times_s]
    return max(ends) - min(sample.sent_s for sample in samples) if ends else 0.0


def figures(samples: Sequence[Sample], goals: Sequence[Goal] = ()) -> dict[str, float]:
    """The flat numbers of one load."""
    whole = [sample for sample in samples if sample.ok]
    duration_s = span_s(samples)
    found: dict[str, float] = {
        "num_requests": len(samples),
        "num_completed": len(whole),
        "num_failed": len(samples) - len(whole),
        "duration_s": duration_s,
        "prompt_tokens": sum(sample.prompt_tokens for sample in whole),
        "cached_tokens": sum(sample.cached_tokens for sample in whole),
        "output_tokens": sum(sample.output_tokens for sample in whole),
    }
    if duration_s > 0:
        found |= {
            "requests_per_s": len(whole) / duration_s,
            "output_tokens_per_s": found["output_tokens"] / duration_s,
            "total_tokens_per_s": (found["prompt_tokens"] + found["output_tokens"]) / duration_s,
        }
        if goals:
            found["goodput_per_s"] = num_good(whole, goals) / duration_s
            found["good_share"] = num_good(whole, goals) / len(samples)
    found |= summary("ttft", "ms", [1000 * sample.ttft_s for sample in whole])
    several = [sample for sample in whole if sample.output_tokens > 1]
    found |= summary("tpot", "ms", [1000 * sample.tpot_s for sample in several])
    found |= summary("itl", "ms", [1000 * gap_s for sample in whole for gap_s in sample.itl_s])
    found |= summary("e2el", "ms", [1000 * sample.e2el_s for sample in whole])
    for status, number in sorted(failures(samples).items()):
        found[f"failed_{status or 'no_answer'}"] = number
    return found


def failures(samples: Iterable[Sample]) -> dict[int, int]:
    """Requests without a whole answer, by HTTP status; 0: none, or an answer that broke off."""
    counts: dict[int, int] = {}
    for sample in samples:
        if not sample.ok:
            status = sample.status if sample.status != 200 else 0
            counts[status] = counts.get(status, 0) + 1
    return counts
