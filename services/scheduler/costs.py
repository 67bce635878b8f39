"""What work costs: seconds of a TE's time, by its own measurements where its beats bring them, else by a prior.

Pure; this module must not know which TE it is asked about.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from services.scheduler.work import Work
from shared.messages import TaskKind, TeBeat

_POSSIBLE_US: Final = (1e-3, 1e9)  # of one token


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Prior costs, until a TE has measured its own."""

    prefill_tokens_per_s: float = 1000.0
    decode_tokens_per_s: float = 100.0  # of the whole batch

    def prefill_token_s(self, beat: TeBeat) -> float:
        """Seconds to compute one token of a prompt."""
        return _measured(beat.prefill_us) or 1.0 / self.prefill_tokens_per_s

    def decode_token_s(self, beat: TeBeat) -> float:
        """Seconds of machine time for one token of output: its share of a step of the present batch."""
        measured_s = _measured(beat.decode_us)
        return measured_s / max(beat.running, 1) if measured_s else 1.0 / self.decode_tokens_per_s

    def decode_row_s(self, beat: TeBeat) -> float:
        """Seconds by which one more sequence lengthens a decode step."""
        return _measured(beat.decode_row_us)

    def output_tokens(self, work: Work) -> int:
        """Tokens the task is expected to generate, all choices together. A prefill task brings the first one only."""
        return 0 if work.kind is TaskKind.PREFILL else work.num_choices * work.length.mid

    def num_tokens(self, work: Work) -> int:
        """Tokens whose KV the work will need at its end, as far as can be told; none that outlasts a prefill task."""
        if work.kind is TaskKind.PREFILL:
            return 0
        return work.num_known + work.num_choices * work.length.low


def _measured(time_us: float) -> float:
    """A time as a beat brings it, in seconds; 0 for what no machine takes (a NaN is neither more nor less)."""
    low_us, high_us = _POSSIBLE_US
    return time_us / 1e6 if low_us <= time_us <= high_us else 0.0
