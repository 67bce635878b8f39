"""Algorithm 1 of the paper (section 5): the TE type by heatmap; then locality if the type is balanced, else load.

What the paper leaves open, closed by measurement. "Locality if balanced, else load" is one continuous score in seconds,
so that nothing flips at a threshold and a long prefix may outweigh a little imbalance:

    score = time to the first token + prompt to compute there * what that costs the others
            + answer * what decoding beside the others costs + uneven(...)

The time to the first token wants the longest prefix on the idlest TE. A step that computes a prompt also decodes for
whoever runs there, and that counts; how much is still to be decoded does not: no prompt waits for its end. But each of
the others makes every step of the answer longer, by what the TE has measured. Without that, prompts that share nearly
all they have stayed with one TE as long as it had room, while others idled (a third of them on one of eight TEs,
simulated, with answers 12 % later).

What is computed on a TE delays everybody who runs or waits there: a part of each (`_DELAYED`). And what is computed
again, though a TE holds it, makes the load that saturates all of them: the larger the share of the prompt that some TE
holds, the more each second costs (up to `_AGAIN` for each of them, by the square of the share). So where little runs a
prompt goes wherever it is answered first, and where much runs a conversation waits for the TE that holds it. A shared
beginning is a small share of most prompts: it may be computed anew, and is then held by more TEs.

All this alone piles a shared system prompt onto one TE whenever the queues are short: whoever computed it first is
always a little better. So the share of late counts, too. Up to `_LEVEL` times the mean nothing is to be paid; from
there on a little, which a real prefix outweighs and a shared first page does not; from `_FULL` times the mean on as
much as the work itself.

Below the level the *fuller* of two equal TEs is better (best fit): small prompts fill the TEs up to the level one after
another, and there is always one with room for a prompt as long as all the others' work together. Least load first
would leave all TEs equally full, and every long prompt would stand out.

Simulated on eight TEs of a 34B model (Mooncake's conversations and generated ones, other seeds than it was chosen by
included): more requests answered in time than by any other rule of the roster, or as many within noise, from a quarter
of the trace's rate to beyond saturation. The P99 of the time to the first token is the lowest or within a tenth of it
up to saturation; beyond, SGLang's rule has the lower one on Mooncake's trace, with fewer requests in time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from services.scheduler.policy.base import COLOCATED, PREFILL, Candidate, least
from services.scheduler.work import Work
from shared.messages import TaskKind

_STEP_TOKENS: Final = 512  # of prompts that are computed in a step, about
_DELAYED: Final = 0.2  # of what is computed, for each request on the TE
_AGAIN: Final = 2.0  # likewise, times the square of the share that is held by a TE
_DECODED: Final = 1.0  # of what one sequence adds to the steps of each other
_LEVEL: Final = 1.1  # times the mean of the type
_FULL: Final = 1.35
_ABOVE_LEVEL: Final = 0.2  # seconds to be paid for a second beyond
_ABOVE_FULL: Final = 1.0  # and once more beyond that
_FIT: Final = 0.005  # a second less of room is worth that much
_KV_STEP: Final = 0.02  # of a TE's blocks: those closer than this are equally full


class Algorithm1:
    """Ours."""

    name: Final = "deepflow"

    def scores(self, work: Work, candidates: Sequence[Candidate]) -> list[float]:
        """Seconds for what has a prompt to compute; what only decodes goes where KV is emptiest, then where load is."""
        if work.kind is TaskKind.DECODE:
            return [round(c.kv_use / _KV_STEP) + c.load_s / (1.0 + c.load_s) for c in candidates]
        total_s = sum(c.recent_s for c in candidates)
        held = max((c.matched_pages for c in candidates), default=0) / max(1, len(work.hashes))
        each = _DELAYED + _AGAIN * held * held
        decoded = _DECODED * work.num_choices * work.length.mid
        return [
            _first_token_s(c)
            + c.prefill_s * c.num_running * each
            + c.decode_row_s * c.num_running * decoded
            + _uneven(c, total_s, len(candidates))
            for c in candidates
        ]

    def is_split(self, work: Work, heat: float, candidates: Sequence[Candidate]) -> bool:
        """By the sign of the heatmap where both types are equally loaded; a busier type must be that much better."""
        pair, whole = least(candidates, PREFILL), least(candidates, COLOCATED)
        gain_s = max(-1.0, min(heat, 1.0)) * (pair.prefill_s + pair.decode_s)
        return gain_s + whole.load_s + whole.prefill_s > pair.load_s + pair.prefill_s


def _first_token_s(c: Candidate) -> float:
    """The predicted time to the first token, with the decoding in the steps until then."""
    step_s = c.decode_token_s * c.num_running
    return c.ttft_s + (c.queued_tokens + c.prefill_tokens) * step_s / _STEP_TOKENS


def _uneven(c: Candidate, total_s: float, num: int) -> float:
    """What this prompt's share of late costs on `c`, in seconds."""
    mean_s = (total_s + c.prefill_s) / num
    after_s = c.recent_s + c.prefill_s
    return (
        _ABOVE_LEVEL * max(0.0, after_s - _LEVEL * mean_s)
        + _ABOVE_FULL * max(0.0, after_s - _FULL * mean_s)
        - _FIT * min(c.recent_s, mean_s)
    )
