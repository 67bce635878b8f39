"""Speculative decoding by prompt lookup: a sequence's own past proposes what comes next (Saxena, 2023).

Where the last few tokens stood before, what followed them then is likely to follow again: in quotations, code,
summaries, tables. The guesses are computed as further rows of the sequence in the same step, and sampled one after
the other: a token counts as long as every guess before it was right. A row's logits depend on its own sequence only
and its noise on its position only, so the tokens are exactly those without speculation (in fp32 and bf16, where sums
change with the batch, up to near ties, as with any batch mates); a wrong guess costs its row.
This module must not know models, blocks or steps.
"""

from __future__ import annotations

NGRAM = 3  # tokens that must have stood together before
SHORTER = 2  # as many will do, where no longer match is known
LOOK_BACK = 8192  # tokens read at the first call, the newest of them: a bound on time and memory
FIRST_LENGTH = 2  # guesses at first; doubled when all are right, halved when none is
# At one sequence a further row costs about a twelfth of a step on a CPU, at eight a fifteenth for an eighth of the
# tokens; below this share of right guesses a pause begins.
WORTH = 0.3
WEIGHT = 0.25  # of the newest share in their average
FIRST_PAUSE = 8  # tokens without guesses; each further pause is twice as long
LONGEST_PAUSE = 1024


class Speculator:
    """The n-grams of one sequence and where each stood last, and how well that has guessed so far.

    `propose` catches up with what was appended since the last call, O(1) a token, so a sequence that never
    speculates pays nothing.
    """

    def __init__(self) -> None:
        self._after: dict[
            tuple[int, ...], int
        ] = {}  # n-gram -> position after its last occurrence but the newest
        self._num_read = 0
        self._match = 0  # position after the last earlier occurrence of the newest n-gram; 0: none
        self._length = FIRST_LENGTH
        self._share = 2 * WORTH  # of guesses that were right, a moving average
        self._pause = FIRST_PAUSE
        self._quiet_until = 0  # number of known tokens

    def has_match(self, tokens: list[int]) -> bool:
        """Whether `propose` has something to say."""
        self._read(tokens)
        return self._match > 0 and len(tokens) >= self._quiet_until

    def propose(self, tokens: list[int], limit: int) -> list[int]:
        """Up to `limit` guesses at what follows `tokens`, which must begin as those of the last call."""
        if limit < 1 or not self.has_match(tokens):
            return []
        end, match = len(tokens), self._match
        draft: list[int] = []
        for position in range(match, match + min(limit, self._length)):
            # Where the past runs out the guesses go on: a period repeats itself.
            draft.append(tokens[position] if position < end else draft[position - end])
        return draft

    def observe(self, num_known: int, num_proposed: int, num_right: int) -> None:
        """Learn how many of the guesses were right; `num_known` tokens are known by now."""
        self._share += WEIGHT * (num_right / num_proposed - self._share)
        if num_right == num_proposed:
            self._length = 2 * num_proposed  # of what the limits allowed
            self._pause = FIRST_PAUSE
        elif num_right == 0:
            self._length = max(self._length // 2, 1)
        if self._share < WORTH:
            self._quiet_until = num_known + self._pause
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
            self._share = 2 * WORTH  # the next few guesses decide anew

    def _read(self, tokens: list[int]) -> None:
        """Take in the tokens not seen yet."""
        if self._num_read == len(tokens):
            return
        start = max(self._num_read, len(tokens) - LOOK_BACK)
        after = self._after
        long = short = 0
        for end in range(max(start, SHORTER - 1) + 1, len(tokens) + 1):
            key = tuple(tokens[end - SHORTER : end])
            short = after.get(key, 0)
            after[key] = end
            if end >= NGRAM:
                key = tuple(tokens[end - NGRAM : end])
                long = after.get(key, 0)
                after[key] = end
        self._num_read = len(tokens)
        self._match = long or short
