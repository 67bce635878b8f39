"""How fast this engine goes, learned from its own steps: moving averages, and predictions from them.

A step is priced as a decode part, which depends on how many sequences decode together, and a prefill part,
proportional to its tokens. This module must not know sequences, and reads no clock.
"""

from __future__ import annotations

from math import inf

ALPHA = 0.2  # weight of the newest measurement
# Before anything was measured: slow, because the prediction decides when a silent engine counts as hung.
FIRST_STEP_S = 1.0
FIRST_PREFILL_S = 0.01  # per token
# How fast a prompt can be computed is certain after so many full steps, and half their time is; more count no more.
SURE_STEPS = 8
TELLING_TOKENS = (
    32  # of prefills, before what a token takes is told to others: a dummy request tells little
)
MAX_SURE_STEPS = 32


class Pace:
    """Averages of prefill seconds per token, decode step seconds by batch size, and output length.

    `max_tokens`: of one step. `num_stages`: in so many, a lone step takes as long as so many that follow each other.
    """

    def __init__(self, *, max_tokens: int = 1, num_stages: int = 1) -> None:
        self._max_tokens = max_tokens
        self._num_stages = num_stages
        # Of prefills, the older the less they count: in sums, for a step of few tokens tells little about a token.
        self._prefill_total_s = self._prefill_tokens = 0.0
        # Per token, ever, in a step that was at least half full: few tokens take long for each.
        self._least_prefill_s = inf
        self._num_sure = 0  # such steps
        self._decode_s: dict[int, float] = {}  # by batch size, rounded up to a power of two
        self._output_tokens: float | None = None  # of a finished choice

    def observe(self, duration_s: float, *, num_decodes: int, num_prefill_tokens: int) -> None:
        """Learn from a finished step."""
        if num_prefill_tokens:
            prefill_s = max(duration_s - self.decode_s(num_decodes, 0.0), 0.0)
            self._prefill_total_s += prefill_s - ALPHA * self._prefill_total_s
            self._prefill_tokens += num_prefill_tokens - ALPHA * self._prefill_tokens
            if 2 * num_prefill_tokens >= self._max_tokens:
                self._num_sure = min(self._num_sure + 1, MAX_SURE_STEPS)
                self._least_prefill_s = min(self._least_prefill_s, prefill_s / num_prefill_tokens)
        elif num_decodes:
            bucket = _bucket(num_decodes)
            self._decode_s[bucket] = _mix(self._decode_s.get(bucket), duration_s)

    def observe_output(self, num_tokens: int) -> None:
        """Learn from a choice that came to its own end."""
        self._output_tokens = _mix(self._output_tokens, num_tokens)

    def decode_s(self, num_decodes: int, unknown_s: float = FIRST_STEP_S) -> float:
        """Predicted seconds of a step that decodes for `num_decodes` sequences; from the nearest size measured."""
        if num_decodes == 0:
            return 0.0
        bucket = _bucket(num_decodes)
        measured = self._decode_s.get(bucket)
        if measured is not None:
            return measured
        known = tuple(self._decode_s.items())
        if not known:
            return unknown_s
        return min(known, key=lambda item: max(item[0], bucket) / min(item[0], bucket))[1]

    @property
    def row_s(self) -> float:
        """Seconds by which one more sequence lengthens a decode step; 0: not measured yet.

        The slope between the smallest and the largest batch measured, but no less than a quarter of a sequence's share
        in the largest: batches of about the same size tell little of it.
        """
        if not self._decode_s:
            return 0.0
        low, high = min(self._decode_s), max(self._decode_s)
        slope_s = (self._decode_s[high] - self._decode_s[low]) / max(high - low, 1)
        return max(slope_s, self._decode_s[high] / (4 * high))

    def step_s(self, num_decodes: int, num_prefill_tokens: int) -> float:
        """Predicted seconds of a step."""
        return self.decode_s(num_decodes) + self.prefill_s(num_prefill_tokens)

    def prefill_s(self, num_tokens: int) -> float:
        """Predicted seconds of computing `num_tokens` known tokens."""
        return num_tokens * (self.measured_prefill_s if self._prefill_tokens else FIRST_PREFILL_S)

    @property
    def measured_prefill_s(self) -> float:
        """Seconds of computing a known token; 0: not measured yet."""
        return self._prefill_total_s / self._prefill_tokens if self._prefill_tokens else 0.0

    @property
    def telling_prefill_s(self) -> float:
        """The same, once it is of more than a few tokens; 0 until then. TEs that come up side by side are not fast and
        slow for what else ran during their dummy requests."""
        return self.measured_prefill_s if self._prefill_tokens >= TELLING_TOKENS else 0.0

    def least_prefill_s(self, num_tokens: int) -> float:
        """Seconds that computing `num_tokens` known tokens takes for certain; 0 until that is known."""
        if self._num_sure < SURE_STEPS:
            return 0.0
        return num_tokens * self._least_prefill_s / (2 * self._num_stages)

    def doubt(self) -> None:
        """Work was given up for what `least_prefill_s` says: that counts for one measurement less, so that what was
        measured while the machine was slow does not keep everything from being computed, and measured, for ever."""
        self._num_sure = max(self._num_sure - 1, 0)

    def output_left(self, num_done: int, num_allowed: int, expected: int = 0) -> float:
        """Predicted output tokens still to come of a choice: up to the `expected` length, without one up to the average
        length, never past what it may have."""
        average = num_allowed if self._output_tokens is None else self._output_tokens
        return min(num_allowed - num_done, max((expected or average) - num_done, 1.0))

    def outstanding_s(self, num_known: int, num_to_come: float, batch: int) -> float:
        """Predicted seconds until `num_known` tokens are computed and `num_to_come` decoded, `batch` at a time."""
        return self.prefill_s(num_known) + num_to_come * self.decode_s(batch) / max(batch, 1)


def _mix(average: float | None, value: float) -> float:
    return value if average is None else average + ALPHA * (value - average)


def _bucket(num_decodes: int) -> int:
    return 1 << (num_decodes - 1).bit_length()
