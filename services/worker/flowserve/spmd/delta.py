"""A step as bytes that say only what is new: the rank that plans knows what the others have seen.

A decode row needs its token, its place and, once in a page, one block; its block table, which grows with the context,
stays with the readers from step to step. Steps carry no sequence's name, so a table is recognised by its blocks: the
writer remembers which slot holds a block, and looks from a table's end for one it knows. Any table found that way is
compared before it counts, so a wrong guess costs bytes and never truth: blocks that were freed and taken again, shared
prefixes, tables that became shorter and micro-batches that alternate all come out exact. This module must not know how
the bytes travel.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

import numpy as np

from services.worker.flowserve.decoder import Span, StepInput

KEEP_STEPS: Final = 64  # a table that no step used for so long is forgotten
_HEAD: Final = struct.Struct("<IIII")  # spans, rows, sample rows, new blocks
_WORD: Final = np.dtype("<i4")
_SPAN_WORDS: Final = (
    6  # start, length, slot, slot that it begins like, so many blocks of that, so many new ones
)


class StepEncoder:
    """The writer's memory. Every step must be encoded exactly once and reach every reader, in order."""

    def __init__(self) -> None:
        # By slot, least recently used first: the table as of the step of that number.
        self._tables: OrderedDict[int, list[int]] = OrderedDict()
        self._used: dict[int, int] = {}
        self._holder: dict[int, int] = {}  # block -> the slot that had it last
        self._free: list[int] = []
        self._num_slots = 0
        self._step = 0

    def encode(self, step: StepInput) -> bytes:
        """`step` as what is new in it; grows with its rows and new blocks, not with its tables."""
        self._step += 1
        self._forget()
        words: list[int] = []
        blocks: list[int] = []
        for span in step.spans:
            slot, source, keep = self._place(span.table)
            new = span.table[keep:]
            words += (span.start, span.length, slot, source, keep, len(new))
            blocks += new
        head = _HEAD.pack(len(step.spans), len(step.tokens), len(step.sample_rows), len(blocks))
        body = np.array([*words, *step.tokens, *step.sample_rows, *blocks], _WORD)
        return head + body.tobytes()

    def _place(self, table: Sequence[int]) -> tuple[int, int, int]:
        """(slot that holds `table` from now on, slot whose beginning it shares, length of that beginning)."""
        source, keep = self._find(table)
        known = self._tables.get(source)
        # In place, unless another span of this very step has the shorter table.
        if known is not None and (
            keep == len(known) == len(table)
            or (keep == len(known) and self._used[source] < self._step)
        ):
            slot = source
            known += table[keep:]
            self._tables.move_to_end(slot)
        else:
            slot = self._free.pop() if self._free else self._num_slots
            self._num_slots = max(self._num_slots, slot + 1)
            self._tables[slot] = list(table)
        self._used[slot] = self._step
        for block in table[keep:]:
            self._holder[block] = slot
        return slot, source, keep

    def _find(self, table: Sequence[int]) -> tuple[int, int]:
        """(slot, length of the beginning that its table shares with `table`); (0, 0) if no block is known."""
        holders = self._holder
        slot = next((holders[block] for block in reversed(table) if block in holders), None)
        if slot is None:
            return 0, 0
        known = self._tables[slot]
        beginning = table if len(table) == len(known) else table[: len(known)]
        if beginning == known:
            return slot, len(known)
        pairs = enumerate(zip(known, table, strict=False))
        return slot, next((i for i, (a, b) in pairs if a != b), min(len(known), len(table)))

    def _forget(self) -> None:
        while self._tables:
            slot, table = next(iter(self._tables.items()))
            if self._step - self._used[slot] <= KEEP_STEPS:
                return
            del self._tables[slot], self._used[slot]
            self._free.append(slot)
            for block in table:
                if self._holder.get(block) == slot:
                    del self._holder[block]


class StepDecoder:
    """A reader's memory."""

    def __init__(self) -> None:
        self._tables: list[list[int]] = []

    def decode(self, data: bytes | memoryview) -> StepInput:
        """The step that was encoded. Its tables are this decoder's own, valid until the next call."""
        num_spans, num_rows, num_samples, num_blocks = _HEAD.unpack_from(data)
        words = np.frombuffer(data, _WORD, offset=_HEAD.size)
        ends = np.cumsum([num_spans * _SPAN_WORDS, num_rows, num_samples, num_blocks])
        span_words, tokens, sample_rows, blocks = (
            part.tolist() for part in np.split(words, ends[:-1])
        )
        spans: list[Span] = []
        taken = 0
        for at in range(0, len(span_words), _SPAN_WORDS):
            start, length, slot, source, keep, num_new = span_words[at : at + _SPAN_WORDS]
            new = blocks[taken : taken + num_new]
            taken += num_new
            spans.append(Span(start, length, self._table(slot, source, keep, new)))
        return StepInput(tokens, spans, sample_rows)

    def _table(self, slot: int, source: int, keep: int, new: list[int]) -> list[int]:
        if slot == len(self._tables):
            self._tables.append([])
        if slot == source and keep == len(self._tables[slot]):
            self._tables[slot] += new
        else:
            self._tables[slot] = self._tables[source][:keep] + new
        return self._tables[slot]
