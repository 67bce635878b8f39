"""Runs sequences through a decoder step by step, as an engine would, with the chunks and batch mates a test chooses."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch

from services.worker.flowserve.kv import KVCache
from services.worker.flowserve.model import Decoder, Span, StepInput

PAGE = 16


@dataclass
class Sequence:
    """Known ids, how many of them are computed, the blocks taken, and the logits of every computed row."""

    ids: list[int]
    table: list[int] = field(default_factory=list)
    computed: int = 0
    rows: list[torch.Tensor] = field(default_factory=list)

    @property
    def logits(self) -> torch.Tensor:
        """[computed here, vocab]."""
        return torch.cat(self.rows)


class Driver:
    """A decoder with a cache of its own, whose blocks are handed out in shuffled order."""

    def __init__(self, decoder: Decoder, *, num_blocks: int = 256, seed: int = 0) -> None:
        self.decoder = decoder
        self.kv = KVCache.allocate(
            decoder.config, num_blocks=num_blocks, page=PAGE, dtype=decoder.kv_dtype
        )
        self._free = list(range(num_blocks))
        random.Random(seed).shuffle(self._free)

    def step(self, parts: list[tuple[Sequence, int]]) -> None:
        """Computes the next `n` known ids of each (sequence, n), all in one step, and keeps all logits."""
        spans, tokens, positions = [], [], []
        for sequence, n in parts:
            end = sequence.computed + n
            while len(sequence.table) * PAGE < end:
                sequence.table.append(self._free.pop())
            spans.append(Span(sequence.computed, n, sequence.table))
            tokens += sequence.ids[sequence.computed : end]
            positions += range(sequence.computed, end)
        rows = list(range(len(tokens)))
        logits = self.decoder.forward(StepInput(tokens, positions, spans, rows), self.kv)
        for (sequence, n), part in zip(parts, logits.split([n for _, n in parts]), strict=True):
            sequence.computed += n
            sequence.rows.append(part)

    def run(self, sequence: Sequence, chunk: int | None = None) -> Sequence:
        """Computes all known ids of one sequence alone, `chunk` at a time (None: at once)."""
        while left := len(sequence.ids) - sequence.computed:
            self.step([(sequence, min(left, chunk or left))])
        return sequence

    def greedy(self, prompt: list[int], num_tokens: int, chunk: int | None = None) -> list[int]:
        """The `num_tokens` most likely continuations, one by one."""
        sequence = Sequence(list(prompt))
        for _ in range(num_tokens):
            self.run(sequence, chunk)
            sequence.ids.append(int(sequence.rows[-1][-1].argmax()))
        return sequence.ids[len(prompt) :]


def random_ids(length: int, *, seed: int = 0, vocab: int = 512) -> list[int]:
    """Reproducible ordinary tokens."""
    source = random.Random(seed)
    return [source.randrange(3, vocab) for _ in range(length)]
