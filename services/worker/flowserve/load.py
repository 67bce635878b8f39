"""How busy an engine is: what its sequences still have to be given, priced by its pace. It must not know the bus.

May be measured from another thread: copies and single values are read.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from services.worker.flowserve.outcome import EngineLoad
from services.worker.flowserve.pace import Pace
from services.worker.flowserve.rtc.master import RtcMaster
from services.worker.flowserve.scheduler import Scheduler
from services.worker.flowserve.sequence import Sequence
from shared.messages import Band


def measure(scheduler: Scheduler, rtc: RtcMaster, pace: Pace, *, step_s: float) -> EngineLoad:
    """The load of an engine whose present step is predicted to take `step_s`, if there is one."""
    running, waiting = scheduler.running.copy(), [*scheduler.waiting, *scheduler.fetching]
    held = [sequence for group in list(scheduler.held.values()) for sequence in group]
    going = running + waiting
    live = going + held
    batch = -(-min(len(live), scheduler.max_num_seqs) // scheduler.num_stages)  # decode together
    to_come = {sequence: _output_left(sequence, pace) for sequence in live}

    def outstanding_s(among: Callable[[Sequence], bool]) -> float:
        # Held choices will find their prompt in the cache: only their decoding counts.
        num_known = sum(one.num_remaining for one in going if among(one))
        num_to_come = sum(left for one, left in to_come.items() if among(one))
        return pace.outstanding_s(num_known, num_to_come, batch)

    def is_filler(one: Sequence) -> bool:
        return one.band is Band.BATCH

    prompts = [one for one in going if one.num_remaining > 1 and not is_filler(one)]
    num_needed = sum(
        max(math.ceil((one.num_known + to_come[one]) / scheduler.page) - len(one.table), 0)
        for one in going
    )
    blocks = rtc.ledger()
    return EngineLoad(
        running=len(running),
        waiting=len(waiting) + len(held),
        free_slots=max(scheduler.max_num_seqs - sum(not is_filler(one) for one in live), 0),
        outstanding_s=outstanding_s(lambda _: True),
        outstanding_batch_s=outstanding_s(is_filler),
        waiting_tokens=sum(one.num_remaining for one in prompts),
        prefill_us=1e6 * pace.telling_prefill_s,
        decode_us=1e6 * pace.decode_s(max(batch, 1), 0.0),
        decode_row_us=1e6 * pace.row_s,
        blocks_total=blocks["total"],
        blocks_used=blocks["live"] + blocks["moving"],
        blocks_cached=blocks["cached"],
        blocks_leased=blocks["leased"],
        blocks_reserved=num_needed,
        step_ms=round(step_s * 1000) if live else 0,
    )


def _output_left(sequence: Sequence, pace: Pace) -> float:
    """Tokens that a choice is predicted to bring yet."""
    num_allowed = sequence.last_known - sequence.num_prompt
    expected = sequence.group.expected_output
    if expected:
        expected += sequence.num_given
    return pace.output_left(sequence.num_output, num_allowed, expected)
