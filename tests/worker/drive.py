"""Runs sequences through a decoder step by step, as an engine would, with the chunks and batch mates a test chooses."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from services.worker.flowserve.backend import load_decoder
from services.worker.flowserve.decoder import Decoder, Floats, Span, StepInput

PAGE = 16


@dataclass
class Sequence:
    """Known ids, how many of them are computed, the blocks taken, and the logits of every computed row."""

    ids: list[int]
    table: list[int] = field(default_factory=list)
    computed: int = 0
    rows: list[Floats] = field(default_factory=list)

    @property
    def logits(self) -> Floats:
        """[computed here, vocab]."""
        return np.concatenate(self.rows)


class Driver:
    """A decoder with a new cache, whose blocks are handed out in shuffled order. A former driver of it is done for."""

    def __init__(
        self, decoder: Decoder, *, num_blocks: int = 256, page: int = PAGE, seed: int = 0
    ) -> None:
        self.decoder = decoder
        self.page = page
        decoder.allocate(num_blocks, page)
        self._free = list(range(num_blocks))
        random.Random(seed).shuffle(self._free)

    def step(self, parts: list[tuple[Sequence, int]]) -> None:
        """Computes the next `n` known ids of each (sequence, n), all in one step, and keeps all logits."""
        spans, tokens = [], []
        for sequence, n in parts:
            end = sequence.computed + n
            while len(sequence.table) * self.page < end:
                sequence.table.append(self._free.pop())
            spans.append(Span(sequence.computed, n, sequence.table))
            tokens += sequence.ids[sequence.computed : end]
        rows = list(range(len(tokens)))
        logits = self.decoder.forward(StepInput(tokens, spans, rows)).copy()
        ends = np.cumsum([n for _, n in parts])
        for (sequence, n), part in zip(parts, np.split(logits, ends[:-1]), strict=True):
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


def load(folder: Path, dtype: str = "w8a8", kernels: str = "auto") -> Decoder:
    """The decoder for a tiny model, whose products are too small to share between threads."""
    cache_dir = folder.parent / "cache"
    return load_decoder(folder, dtype=dtype, kernels=kernels, cache_dir=cache_dir, threads=1)
