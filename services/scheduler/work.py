"""What is to be placed, as the policy sees it: sizes, pages and wishes of a task, without its tokens.

The rim makes it of a `Request`, the simulator of a line of a trace. Pure; this module must not know TEs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shared.length_table import BUCKET_TOKENS
from shared.messages import Band, Request, TaskKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Length:
    """A predicted output length, tokens of one choice: a bucket of the predictor (the paper, section 5.4).

    The low end is what admission counts on, the midpoint what the heatmap is asked with.
    """

    low: int
    mid: int

    def after(self, num_tokens: int) -> Length:
        """What is left of it once so many tokens have come; of one that is longer than predicted, half a bucket."""
        if self.mid <= num_tokens:
            return Length(low=1, mid=BUCKET_TOKENS // 2)
        return Length(low=max(self.low - num_tokens, 1), mid=self.mid - num_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One task to be placed. `num_known` counts the prompt and what was delivered of the output."""

    request: str
    attempt: int
    model: str
    tenant: str
    kind: TaskKind
    band: Band
    num_known: int
    hashes: Sequence[bytes]  # chained hashes of the full pages of the prompt
    num_choices: int  # live ones
    length: Length
    avoid: frozenset[str] = frozenset()

    @classmethod
    def of(cls, request: Request, kind: TaskKind, length: Length) -> Work:
        """The work in a request; what one choice may still bring bounds `length`."""
        delivered = max((len(ids) for ids in request.output), default=0)
        left = max(request.sampling.max_tokens - delivered, 1)
        return cls(
            request=request.request,
            attempt=request.attempt,
            model=request.model,
            tenant=request.tenant,
            kind=kind,
            band=request.band,
            num_known=len(request.prompt) + sum(len(ids) for ids in request.output),
            hashes=request.hashes,
            num_choices=request.sampling.n - len(request.ended),
            length=Length(low=min(length.low, left), mid=min(length.mid, left)),
            avoid=frozenset(request.avoid),
        )
