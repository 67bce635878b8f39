"""One choice of one request, and the group of all choices: plain state, moved on by the scheduler and the engine.

A sequence owns its tokens and its block table and knows when its tokens end it. It must not know budgets, pools or
devices.

    tokens    [ prompt ............................ | output ........ ]  ( coming )
    positions 0                     num_prompt ^            num_known ^
    planned   [ computed once the steps on their way are done ) num_planned
    computed  [ keys and values are in the blocks ) num_computed
    indexed   [ offered to the prefix index ) num_indexed pages
    exact     [ nothing in it, or before it, is taken over from elsewhere ) num_exact

With no step on its way, planned is computed and nothing is coming.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum, auto
from typing import Final

from services.worker.flowserve.rtc.chunks import Chunk, Taken
from services.worker.flowserve.sampler import Row
from services.worker.flowserve.speculation import Speculator
from shared import blockhash
from shared.fairness import Share
from shared.messages import Failure, Handover, Request, TokenLogprobs

HANDED: Final = "handed"  # the finish of a choice that another TE goes on with


class Status(Enum):
    """HELD: a further choice, waiting for the first one to compute the prompt they share. FETCHING: its pages are being
    brought to the device; then it waits like any other."""

    HELD = auto()
    FETCHING = auto()
    WAITING = auto()
    RUNNING = auto()
    ENDED = auto()


class Sequence:
    """One choice. `rank` is its band and its age: smaller is more urgent, or older."""

    def __init__(self, group: SequenceGroup, choice: int, output: list[int]) -> None:
        self.group = group
        self.choice = choice
        self.band = group.request.band
        self.rank = (self.band, group.arrival, choice)
        self.sampling = group.request.sampling
        self.num_prompt = len(group.request.prompt)
        self.num_given = len(output)  # output tokens the client had when it submitted
        self.tokens = group.request.prompt + output
        self.max_known = min(self.num_prompt + self.sampling.max_tokens, group.context)
        # Known tokens after which nothing more of it is computed here.
        self.last_known = (
            min(self.max_known, self.num_known + 1) if group.hands_over else self.max_known
        )
        self.num_computed = 0
        self.num_planned = 0
        self.num_paid = 0  # rows that its tenant has paid for, of one that was preempted
        self.num_coming = 0  # tokens that steps on their way will sample, at the least
        self.slot = 0  # which of the samples of the step on its way is its own
        self.table: list[int] = []
        self.hashes = list(group.request.hashes)  # of the first full pages, as far as anyone asked
        self.num_indexed = 0
        # What is taken over of the prompt, in order; where it comes from is held until the prompt is computed.
        self.taken: list[Taken] = []
        self.num_exact = self.max_known
        self.status = Status.HELD
        self.row: Row | None = None  # the sampler's history, from the first sampled token on
        self.speculator = Speculator()
        self.logprobs: list[TokenLogprobs] = []  # of the tokens after `num_given`, where wanted
        # Whose it is, in the ledger.
        self.name = f"{group.request.request}#{group.request.attempt}/{choice}"
        self.finish: str | None = None
        self.stop_id: int | None = None
        self.failure: Failure | None = None

    @property
    def num_known(self) -> int:
        return len(self.tokens)

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def num_expected(self) -> int:
        """Tokens known once the steps on their way are done."""
        return len(self.tokens) + self.num_coming

    @property
    def num_remaining(self) -> int:
        """Tokens to plan before the next one can be sampled."""
        return len(self.tokens) + self.num_coming - self.num_planned

    @property
    def is_complete(self) -> bool:
        """Whether the steps on their way bring its last token, whatever that will be."""
        return len(self.tokens) + self.num_coming >= self.last_known

    def tables(self) -> Iterator[list[int]]:
        """The blocks that it holds: its own, and those that it takes over from."""
        yield self.table
        yield from (one.source for one in self.taken)

    def next_taken(self) -> Taken | None:
        """The next part of the prompt that is taken over, as planned so far."""
        return next((one for one in self.taken if one.start >= self.num_planned), None)

    def append(self, token: int) -> None:
        """Take the next output token."""
        self.tokens.append(token)
        self.end_if_complete()

    def end_if_complete(self) -> None:
        """Set `finish` if the last output token ends the choice.

        An ending token counts even when it is the last one allowed, so "stop" goes before "length".
        """
        last = self.tokens[-1]
        if 0 < self.num_output >= self.sampling.min_tokens and last in self.group.stop_ids:
            self.finish, self.stop_id = "stop", last
        elif self.num_known >= self.max_known:
            self.finish = "length"
        elif self.num_known >= self.last_known:
            self.finish = HANDED

    def page_hashes(self, num_pages: int) -> list[bytes]:
        """The chained hashes of the first `num_pages` pages, all of them full; computed once."""
        have, page = len(self.hashes), self.group.page
        if have < num_pages:
            parent = self.hashes[-1] if self.hashes else self.group.request.root
            new = self.tokens[have * page : num_pages * page]
            self.hashes += blockhash.chain(parent, new, page)
        return self.hashes[:num_pages]


class SequenceGroup:
    """The choices of one (request, attempt) that are still to be generated.

    `deadline` is a reading of the engine's clock, `context` the longest a sequence may get here, `stop_ids` what ends
    a choice. `hands_over`: after the next token another TE goes on. `handover`: what the TE before this one said.
    `expected_output`: tokens that a choice is predicted to bring yet, 0 if nobody knows. `first_token`: when it came.
    """

    def __init__(
        self,
        request: Request,
        *,
        arrival: int,
        deadline: float,
        page: int,
        context: int,
        eos_ids: frozenset[int],
        hands_over: bool = False,
        handover: Handover | None = None,
        expected_output: int = 0,
    ) -> None:
        self.request = request
        # The tenant's account; the scheduler's, once the group is added there.
        self.share: Share[Sequence] = Share(request.band, request.tenant)
        self.hands_over = hands_over
        self.handover = handover
        self.expected_output = expected_output
        self.first_token: float | None = None
        self.arrival = arrival
        self.deadline = deadline
        self.page = page
        self.context = context
        ending = frozenset(request.sampling.stop_token_ids)
        self.stop_ids = ending if request.sampling.ignore_eos else ending | eos_ids
        self.chunks: list[Chunk] = []  # of the prompt, that may be taken over
        self.alone: list[SequenceGroup] = []  # chunks that are computed on its account
        self.chunk: bytes | None = None  # the name of the chunk that is computed alone here
        self.num_cached: int | None = None  # prompt tokens found in the cache; None until admitted
        output = request.output
        self.sequences = [
            Sequence(self, choice, output[choice] if choice < len(output) else [])
            for choice in range(request.sampling.n)
            if choice not in request.ended
        ]
        if handover is not None:  # its tokens can be replayed from here
            first = self.sequences[0]
            first.num_given -= len(handover.ids)
            first.logprobs = list(handover.logprobs or [])
            self.num_cached = handover.cached

    def live(self) -> Iterator[Sequence]:
        """The choices that have not ended."""
        return (s for s in self.sequences if s.status is not Status.ENDED)

    @property
    def has_ended(self) -> bool:
        return next(self.live(), None) is None
