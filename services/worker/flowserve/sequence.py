"""One choice of one request, and the group of all choices: plain state, moved on by the scheduler and the engine.

A sequence owns its tokens and its block table and knows when its tokens end it. It must not know budgets, pools or
devices.

    tokens    [ prompt ............................ | output ........ ]  ( coming )
    positions 0                     num_prompt ^            num_known ^
    planned   [ computed once the steps on their way are done ) num_planned
    computed  [ keys and values are in the blocks ) num_computed
    indexed   [ offered to the prefix index ) num_indexed pages

With no step on its way, planned is computed and nothing is coming.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum, auto

from services.worker.flowserve.sampler import Row
from services.worker.flowserve.speculation import Speculator
from shared import blockhash
from shared.messages import Failure, Request, TokenLogprobs


class Status(Enum):
    """HELD: a further choice, waiting for the first one to compute the prompt they share."""

    HELD = auto()
    WAITING = auto()
    RUNNING = auto()
    ENDED = auto()


class Sequence:
    """One choice. `order` is its age: smaller is older, and goes first."""

    def __init__(self, group: SequenceGroup, choice: int, output: list[int]) -> None:
        self.group = group
        self.choice = choice
        self.order = (group.arrival, choice)
        self.sampling = group.request.sampling
        self.num_prompt = len(group.request.prompt)
        self.num_given = len(output)  # output tokens the client had when it submitted
        self.tokens = group.request.prompt + output
        self.max_known = min(self.num_prompt + self.sampling.max_tokens, group.context)
        self.num_computed = 0
        self.num_planned = 0
        self.num_coming = 0  # tokens that steps on their way will sample, at the least
        self.slot = 0  # which of the samples of the step on its way is its own
        self.table: list[int] = []
        self.hashes = list(group.request.hashes)  # of the first full pages, as far as anyone asked
        self.num_indexed = 0
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
        return len(self.tokens) + self.num_coming >= self.max_known

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
    a choice.
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
    ) -> None:
        self.request = request
        self.arrival = arrival
        self.deadline = deadline
        self.page = page
        self.context = context
        ending = frozenset(request.sampling.stop_token_ids)
        self.stop_ids = ending if request.sampling.ignore_eos else ending | eos_ids
        self.num_cached: int | None = None  # prompt tokens found in the cache; None until admitted
        output = request.output
        self.sequences = [
            Sequence(self, choice, output[choice] if choice < len(output) else [])
            for choice in range(request.sampling.n)
            if choice not in request.ended
        ]

    def live(self) -> Iterator[Sequence]:
        """The choices that have not ended."""
        return (s for s in self.sequences if s.status is not Status.ENDED)

    @property
    def has_ended(self) -> bool:
        return next(self.live(), None) is None
