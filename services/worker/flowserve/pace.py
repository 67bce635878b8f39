"""How fast this engine goes, learned from its own steps: moving averages, and predictions from them.

A step is priced as a decode part, which depends on how many sequences decode together, and a prefill part,
proportional to its tokens. This module must not know sequences, and reads no clock.
"""

from __future__ import annotations

ALPHA = 0.2  # weight of the newest measurement
# Before anything was measured: slow, because the prediction decides when a silent engine counts as hung.
FIRST_STEP_S = 1.0
FIRST_PREFILL_S = 0.01  # per token


class Pace:
    """Averages of prefill seconds per token, decode step seconds by batch size, and output length."""

    def __init__(self) -> None:
        self._prefill_s: float | None = None  # per token
        self._decode_s: dict[int, float] = {}  # by batch size, rounded up to a power of two
        self._output_tokens: float | None = None  # of a finished choice

    def observe(self, duration_s: float, *, num_decodes: int, num_prefill_tokens: int) -> None:
        """Learn from a finished step."""
        if num_prefill_tokens:
            prefill_s = max(duration_s - self.decode_s(num_decodes, 0.0), 0.0)
            self._prefill_s = _mix(self._prefill_s, prefill_s / num_prefill_tokens)
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

    def step_s(self, num_decodes: int, num_prefill_tokens: int) -> float:
        """Predicted seconds of a step."""
        return self.decode_s(num_decodes) + self.prefill_s(num_prefill_tokens)

    def prefill_s(self, num_tokens: int) -> float:
        """Predicted seconds of computing `num_tokens` known tokens."""
        per_token = FIRST_PREFILL_S if self._prefill_s is None else self._prefill_s
        return num_tokens * per_token

    def output_left(self, num_done: int, num_allowed: int) -> float:
        """Predicted output tokens still to come of a choice: up to the average length, never past what it may have."""
        average = num_allowed if self._output_tokens is None else self._output_tokens
        return min(num_allowed - num_done, max(average - num_done, 1.0))

    def outstanding_s(self, num_known: int, num_to_come: float, batch: int) -> float:
        """Predicted seconds until `num_known` tokens are computed and `num_to_come` decoded, `batch` at a time."""
        return self.prefill_s(num_known) + num_to_come * self.decode_s(batch) / max(batch, 1)


def _mix(average: float | None, value: float) -> float:
    return value if average is None else average + ALPHA * (value - average)


def _bucket(num_decodes: int) -> int:
    return 1 << (num_decodes - 1).bit_length()
