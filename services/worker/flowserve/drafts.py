"""Guesses among the rows of a step: when there are any, whose, and how many of them were right.

What is guessed is the affair of each sequence's `Speculator`. This module must not know who goes first.
"""

from __future__ import annotations

from services.worker.flowserve.plan import Chunk
from services.worker.flowserve.rtc.master import RtcMaster
from services.worker.flowserve.sequence import Sequence


class Drafts:
    """Of one scheduler: `max_draft` guesses for one sequence at the most, 0 for none, in steps of `max_rows` rows at
    the most."""

    def __init__(self, pool: RtcMaster, *, page: int, max_draft: int, max_rows: int) -> None:
        self._pool = pool
        self._page = page
        self._max_draft = max_draft
        self._max_rows = max_rows
        self.num_guessed_tokens = 0
        self.num_right_tokens = 0  # those that were sampled

    def are_likely(self, running: list[Sequence]) -> bool:
        """Whether some of these have something to guess for the step after the one on its way."""
        return 0 < len(running) < self._max_rows * bool(self._max_draft) and any(
            sequence.speculator.has_match(sequence.tokens) for sequence in running
        )

    def add(self, chunks: list[Chunk], budget: int) -> None:
        """Extend decodes by guesses, while further rows cost little: in a small step without prompts.

        Guesses take blocks only where there are some to spare, so they preempt nobody and break no promise.
        """
        num_spare = min(budget, self._max_rows - len(chunks)) if self._max_draft else 0
        if num_spare <= 0 or any(chunk.length > 1 or chunk.taken for chunk in chunks):
            return
        pool, page = self._pool, self._page
        for index, (sequence, start, *_) in enumerate(chunks):
            limit = min(self._max_draft, num_spare, sequence.max_known - sequence.num_known - 1)
            draft = sequence.speculator.propose(sequence.tokens, limit)
            while draft and len(sequence.table) * page < sequence.num_known + len(draft):
                if not (pool.num_available and pool.append_block(sequence.table)):
                    del draft[len(sequence.table) * page - sequence.num_known :]
                    break
            if draft:
                chunks[index] = Chunk(sequence, start, 1 + len(draft), samples=True, draft=draft)
                num_spare -= len(draft)

    def learn(self, sequence: Sequence, num_guessed: int, num_right: int) -> None:
        """How a draft turned out; before its tokens are known to the sequence."""
        self.num_guessed_tokens += num_guessed
        self.num_right_tokens += num_right
        sequence.speculator.observe(sequence.num_known + num_right + 1, num_guessed, num_right)
