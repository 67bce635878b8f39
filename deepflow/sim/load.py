"""How busy a simulated engine is: what its sequences still have to be given, priced by its pace, as a beat tells it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from deepflow.sim.engine import Engine
from deepflow.sim.sequence import Sequence
from services.worker.flowserve.pace import Pace
from shared.messages import Band

MAX_OUTPUT: Final = 1024  # expected of a sequence about which nobody knows anything


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a beat tells, as the worker's engine predicts it."""

    running: int
    waiting: int
    free_slots: int
    outstanding_s: float
    outstanding_batch_s: float
    waiting_tokens: int
    prefill_us: float
    decode_us: float
    decode_row_us: float
    blocks_reserved: int
    step_ms: int


def measure(engine: Engine) -> Load:
    """The load of an engine, as `measure` of the worker's `load.py`."""
    pace, page = engine.pace, engine.page
    num_running = len(engine.prefilling) + len(engine.decoding)
    num_seqs = num_running + len(engine.waiting)
    batch = min(num_seqs, engine.profile.max_num_seqs)
    # Each pair: of the bands above BATCH, and of that.
    known, to_come, waiting_tokens, reserved = [0, 0], [0.0, 0.0], 0, 0
    steps = engine.num_steps_now
    for sequence in engine.decoding.values():
        num_done = steps - sequence.begun
        left = _left(pace, sequence, num_done)
        is_batch = sequence.band is Band.BATCH
        known[is_batch] += 1
        to_come[is_batch] += left
        need = sequence.num_prompt + num_done + left - len(sequence.table) * page
        if need > 0:
            reserved += math.ceil(need / page)
    for sequence in [*engine.prefilling, *engine.waiting]:
        left = _left(pace, sequence, sequence.num_done)
        is_batch = sequence.band is Band.BATCH
        num_remaining = sequence.num_known - sequence.num_computed
        known[is_batch] += num_remaining
        to_come[is_batch] += left
        waiting_tokens += 0 if is_batch else num_remaining
        need = sequence.num_known + left - len(sequence.table) * page
        reserved += max(math.ceil(need / page), 0)
    batch_s = pace.outstanding_s(known[1], to_come[1], batch)
    return Load(
        running=num_running,
        waiting=len(engine.waiting),
        free_slots=max(engine.profile.max_num_seqs - num_seqs, 0),
        outstanding_s=batch_s + pace.outstanding_s(known[0], to_come[0], batch),
        outstanding_batch_s=batch_s,
        waiting_tokens=waiting_tokens,
        prefill_us=pace.measured_prefill_s * 1e6,
        decode_us=pace.decode_s(max(batch, 1), 0.0) * 1e6,
        decode_row_us=pace.row_s * 1e6,
        blocks_reserved=reserved,
        step_ms=round(engine.step_s * 1000),
    )


def _left(pace: Pace, sequence: Sequence, num_done: int) -> float:
    """Tokens it is expected to generate still."""
    if sequence.keeps:
        return 1.0
    expected = sequence.expected
    if expected:  # the common case, and the same
        return max(expected - num_done, 1.0)
    return pace.output_left(num_done, max(MAX_OUTPUT, num_done + 1))
