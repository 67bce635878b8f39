"""The plan of one step: which rows of which sequences it computes. Data, and how rows are cut off a sequence.

Rows are paid for as soon as they are planned, out of the share of their tenant: one for each token computed, and one
for each token sampled, so input costs 1 and output 2 a token. This module must not know who goes first, or blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from services.worker.flowserve.rtc.chunks import Taken
from services.worker.flowserve.sequence import Sequence

TAKEN_PER_ROW = 16  # positions that are taken over in the time of one row, at the least


class Chunk(NamedTuple):
    """Rows of one sequence in one step: `length` tokens from position `start`.

    `samples`: the chunk reaches the last known token, so its last row gives the next one. With a `draft`, the guesses
    are the last of its rows, and each of them samples too. `taken`: what is taken over right before `start`.
    """

    sequence: Sequence
    start: int
    length: int
    samples: bool
    draft: list[int] | tuple[()] = ()
    taken: tuple[Taken, ...] = ()

    @property
    def num_taken(self) -> int:
        """Positions taken over."""
        return sum(one.stop - one.start for one in self.taken)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step computes."""

    chunks: list[Chunk]

    @property
    def num_rows(self) -> int:
        return sum(chunk.length for chunk in self.chunks)

    @property
    def num_decodes(self) -> int:
        """Rows of decoding sequences, their guesses included."""
        return sum(c.length for c in self.chunks if c.length == 1 + len(c.draft))

    @property
    def num_prefill_tokens(self) -> int:
        return sum(c.length for c in self.chunks if c.length > 1 + len(c.draft))

    @property
    def has_drafts(self) -> bool:
        """Whether some sequence may get more than one token."""
        return any(chunk.draft for chunk in self.chunks)

    @property
    def sampled(self) -> list[Sequence]:
        """The sequences that get tokens, in the order `update` wants them."""
        return [chunk.sequence for chunk in self.chunks if chunk.samples]


def next_row(sequence: Sequence) -> Chunk:
    """The next row of a decode, which counts as planned from here on."""
    start = sequence.num_planned
    sequence.num_planned = start + 1
    sequence.num_coming += 1
    sequence.group.share.served += 2
    return Chunk(sequence, start, 1, True)


def next_rows(sequence: Sequence, budget: int) -> Iterator[Chunk]:
    """The next rows of a sequence, up to `budget`, which count as planned from here on. Rows that lie apart, because
    what is between them is taken over, are several chunks."""
    while budget > 0:
        taken = []
        while (one := sequence.next_taken()) and one.start == sequence.num_planned:
            taken.append(one)
            sequence.num_planned = one.stop
        remaining = sequence.num_remaining
        end = remaining if one is None else min(remaining, one.start - sequence.num_planned)
        start, length = sequence.num_planned, min(budget, end)
        sequence.num_planned += length
        samples = length == remaining
        sequence.num_coming += samples
        sequence.group.share.served += length + samples
        chunk = Chunk(sequence, start, length, samples, taken=tuple(taken))
        yield chunk
        budget -= length + chunk.num_taken // TAKEN_PER_ROW
        if samples or one is None:
            return


def extend(chunks: list[Chunk], sequence: Sequence, budget: int) -> int:
    """Plan the next rows of a sequence; what is left of the budget."""
    for chunk in next_rows(sequence, budget):
        chunks.append(chunk)
        budget -= chunk.length + chunk.num_taken // TAKEN_PER_ROW
    return max(budget, 0)


def take_back(chunk: Chunk) -> None:
    """As if it had never been planned."""
    sequence, num_rows = chunk.sequence, chunk.length - len(chunk.draft)
    sequence.num_planned -= chunk.num_taken + num_rows
    sequence.num_coming -= chunk.samples
    sequence.group.share.served -= num_rows + chunk.samples
