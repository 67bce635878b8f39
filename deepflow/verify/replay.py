"""Driving a decoder by hand: tokens chosen greedily one by one, and given tokens run as an engine would batch them.

This module must not know devices, nor who is compared with whom.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Final

import numpy as np

from services.worker.flowserve.decoder import Decoder, Floats, Span, StepInput, as_pipeline

_APART: Final = (
    2  # steps between the starts of two sequences, so that prompts and decode rows share steps
)


@dataclass(frozen=True, slots=True)
class Trace:
    """A prompt, what was chosen after it, and the logits [len(chosen), vocab] that it was chosen by."""

    prompt: list[int]
    chosen: list[int]
    logits: Floats

    @property
    def rows(self) -> list[int]:
        """Every token that is computed: all but the last."""
        return [*self.prompt, *self.chosen][:-1]


class Blocks:
    """The blocks of a decoder's cache, dealt out in no order. `allocate` is called here."""

    def __init__(self, decoder: Decoder, page: int, num_tokens: int, num_sequences: int) -> None:
        self.page = page
        self.num = num_tokens // page + 2 * num_sequences
        decoder.allocate(self.num, page)
        self._free = list(range(self.num))
        Random(0).shuffle(self._free)

    def take(self, num_tokens: int) -> list[int]:
        """A table for so many tokens."""
        return [self._free.pop() for _ in range(-(-num_tokens // self.page))]


def step(decoder: Decoder, rows: Sequence[int], start: int, table: Sequence[int]) -> Floats:
    """The logits after the last of `rows`, which stand at `start`, alone in a step."""
    span = Span(start, len(rows), table)
    logits: Floats = decoder.forward(StepInput(list(rows), [span], [len(rows) - 1]))[0]
    return logits.copy()


def choose(decoder: Decoder, blocks: Blocks, prompt: Sequence[int], num_tokens: int) -> Trace:
    """Choose `num_tokens` greedily: the prompt in one step, then one token a step, nobody beside it."""
    table = blocks.take(len(prompt) + num_tokens)
    rows, start = list(prompt), 0
    chosen: list[int] = []
    logits: list[Floats] = []
    for _ in range(num_tokens):
        logits.append(step(decoder, rows, start, table))
        start += len(rows)
        rows = [int(logits[-1].argmax())]
        chosen += rows
    return Trace(list(prompt), chosen, np.stack(logits))


def replay(
    decoder: Decoder, blocks: Blocks, traces: Sequence[Trace], *, chunk: int
) -> list[Floats]:
    """The logits of the same tokens, computed together: one trace after the other joins, prompts go in chunks of
    `chunk` rows beside the others' single rows, and at last all decode."""
    tables = [blocks.take(len(trace.rows)) for trace in traces]
    computed = [0] * len(traces)
    logits: list[list[Floats]] = [[] for _ in traces]
    number = 0
    while any(done < len(trace.rows) for done, trace in zip(computed, traces, strict=True)):
        tokens: list[int] = []
        spans: list[Span] = []
        sample_rows: list[int] = []
        sampled: list[int] = []
        for index, trace in enumerate(traces):
            start = computed[index]
            end = min(start + chunk, len(trace.prompt)) if start < len(trace.prompt) else start + 1
            if number < index * _APART or start == len(trace.rows):
                continue
            tokens += trace.rows[start:end]
            spans.append(Span(start, end - start, tables[index]))
            computed[index] = end
            if end >= len(trace.prompt):
                sample_rows.append(len(tokens) - 1)
                sampled.append(index)
        found = _forward(decoder, StepInput(tokens, spans, sample_rows))
        for index, row in zip(sampled, found, strict=True):
            logits[index].append(row.copy())
        number += 1
    return [np.stack(rows) for rows in logits]


def _forward(decoder: Decoder, rows: StepInput) -> Floats:
    """One step, in a pipeline from its first stage to its last."""
    pipeline = as_pipeline(decoder)
    if pipeline is None:
        return decoder.forward(rows)
    pipeline.begin(rows)
    return pipeline.finish()
