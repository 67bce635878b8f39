"""What the engine hands out: deltas, ends, the result of a step, and its load. Data; must not know how it is made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from services.worker.flowserve.sequence import HANDED, Sequence
from shared.messages import Delta, Handover, Keep, TokenLogprobs


class ClientDelta(NamedTuple):
    """A delta, and the client it goes to."""

    client: str
    delta: Delta


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A request is over: all its choices have ended. `finish` is the worst of theirs, `first_token` when the engine's
    clock saw the first token."""

    request: str
    attempt: int
    client: str
    finish: str
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    first_token: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Want:
    """A request waits for these consecutive full pages, behind the page `parent` (or the root), which the device lacks.

    `page_s`: predicted seconds to compute one of them. `handover`: what is known of the TE that computed them.
    Answered by any number of `Engine.populate` and one `Engine.ready`.
    """

    request: str
    attempt: int
    hashes: list[bytes]
    parent: bytes
    page_s: float
    handover: Handover | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Handed:
    """A request computed up to its first token here goes on elsewhere: what a `Handover` says, but for the TE."""

    request: str
    attempt: int
    lease: str
    num_pages: int
    ids: list[int]
    logprobs: list[TokenLogprobs] | None
    cached: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptPages:
    """The pages of a named cache are computed."""

    keep: Keep
    hashes: list[bytes]


@dataclass(slots=True, kw_only=True)
class StepOutput:
    """What one step brought. `error` is a fault of ours that ended the step's requests, or kept pages from being moved:
    to be logged."""

    deltas: list[ClientDelta] = field(default_factory=list)
    ended: list[Ended] = field(default_factory=list)
    stored: list[bytes] = field(default_factory=list)
    removed: list[bytes] = field(default_factory=list)
    wants: list[Want] = field(default_factory=list)
    prefilled: list[Handed] = field(default_factory=list)
    kept: list[KeptPages] = field(default_factory=list)
    num_computed: int = 0
    error: Exception | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLoad:
    """For beats and placement. `outstanding_s` is predicted work, `outstanding_batch_s` what of it yields to all other,
    `step_ms` the predicted present step (0: idle). `free_slots` may be had at once, for band BATCH yields them.
    `waiting_tokens` are to be computed before they give a token, band BATCH apart. `prefill_us` and `decode_us` are per
    token of one sequence, and `decode_row_us` is what one more sequence adds to a decode step; 0: not measured yet.

    `blocks_used` cannot be had now, `blocks_leased` only at the price of a promise, `blocks_reserved` are those that
    what was taken on is predicted to need beyond the ones it has.
    """

    running: int
    waiting: int
    free_slots: int
    outstanding_s: float
    outstanding_batch_s: float
    waiting_tokens: int
    prefill_us: float
    decode_us: float
    decode_row_us: float
    blocks_total: int
    blocks_used: int
    blocks_cached: int
    blocks_leased: int
    blocks_reserved: int
    step_ms: int


def delta_of(sequence: Sequence, start: int) -> Delta:
    """The output of a choice from position `start` on, and its end if it has ended."""
    first = sequence.num_given
    logprobs = sequence.logprobs[start - first :] if sequence.logprobs else None
    return Delta(
        request=sequence.group.request.request,
        attempt=sequence.group.request.attempt,
        choice=sequence.choice,
        index=start,
        ids=sequence.tokens[sequence.num_prompt + start :],
        logprobs=logprobs,
        cached=sequence.group.num_cached if start == first else None,
        finish=None if sequence.finish == HANDED else sequence.finish,
        moves=sequence.finish == HANDED,
        stop_id=sequence.stop_id,
        failure=sequence.failure,
    )
