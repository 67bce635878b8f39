"""What a request is worth in seconds of one TE, as capacity is planned: with its batch well filled.

A lone request has a whole step to itself, and the same one beside others a small part of it. Were demand priced by the
batch of the moment, many TEs with a request each would look as needed as they are busy, and never go. Pure; this module
must not know where the request goes.
"""

from __future__ import annotations

from typing import Final

from services.scheduler.costs import Costs
from shared.messages import TeBeat

FILLED: Final = 16  # sequences that decode together, of a TE that has so many slots


def price(
    num_prompt: int, num_output: int, beat: TeBeat | None, costs: Costs, *, num_slots: int = FILLED
) -> float:
    """Seconds of a TE for so many tokens of prompt and output, by a TE's last beat; without one, by the prior."""
    if beat is None:
        return num_prompt / costs.prefill_tokens_per_s + num_output / costs.decode_tokens_per_s
    batch = max(1, min(num_slots or FILLED, FILLED))
    running = max(beat.running, 1)
    step_s = costs.decode_token_s(beat) * running  # of the present batch
    more_s = max(costs.decode_row_s(beat), 0.0) * max(batch - running, 0)
    token_s = (step_s + more_s) / max(batch, running)
    return num_prompt * costs.prefill_token_s(beat) + num_output * token_s
