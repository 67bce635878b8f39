"""A decoder without a model, for the engine's tests: cheap, exact, and unforgiving about its cache.

A cell of its paged cache holds a digest of a token and of all cells before it, and a row's logits are a function of
all cells it attends to. So one wrong block, one cell overwritten or not yet written, and every later token changes.
"""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path

import numpy as np
import numpy.typing as npt

from services.worker.flowserve.config import ModelConfig
from services.worker.flowserve.decoder import Floats, StepInput
from tests.worker.tiny import make_tiny

CYCLE = 11  # likely continuations run in circles of at most this many tokens


class ArithmeticDecoder:
    """A `Decoder` whose next token is likely a function of the last one, for `habit` of 8 rows, else of everything.

    The `faults` are the numbers of the forward calls that raise, from 1.
    """

    description = "arithmetic"

    def __init__(
        self, config: ModelConfig, *, habit: int = 4, faults: tuple[int, ...] = ()
    ) -> None:
        self.config = config
        self.num_steps = 0
        self._habit = habit
        self._faults = faults
        self._cells: npt.NDArray[np.uint64] = np.zeros((0, 0), np.uint64)

    @property
    def timings(self) -> dict[str, float]:
        return {}

    def bytes_per_block(self, page: int) -> int:
        return 8 * page

    def allocate(self, num_blocks: int, page: int) -> None:
        self._cells = np.zeros((num_blocks, page), np.uint64)

    def forward(self, step: StepInput) -> Floats:
        """All cells of a span are read through its table, row by row, as attention would."""
        self.num_steps += 1
        if self.num_steps in self._faults:
            raise FloatingPointError("a fault of the device")
        page = self._cells.shape[1]
        assert step.sample_rows == sorted(set(step.sample_rows))
        assert sum(span.length for span in step.spans) == len(step.tokens)
        wanted = set(step.sample_rows)
        logits = np.empty((len(step.sample_rows), self.config.vocab), np.float32)
        row = num_sampled = 0
        for span in step.spans:
            assert span.length > 0
            before = self._cells[list(span.table)].reshape(-1)[: span.start]
            state = blake2b(before.tobytes(), digest_size=8)
            for position in range(span.start, span.start + span.length):
                token = step.tokens[row]
                assert 0 <= token < self.config.vocab
                cell = state.copy()
                cell.update(token.to_bytes(8, "little"))
                self._cells[span.table[position // page], position % page] = np.frombuffer(
                    cell.digest(), np.uint64
                )[0]
                state.update(cell.digest())
                if row in wanted:
                    logits[num_sampled] = self._logits(
                        int.from_bytes(state.digest(), "little"), token
                    )
                    num_sampled += 1
                row += 1
        return logits

    def _logits(self, seed: int, last: int) -> Floats:
        logits = np.random.default_rng(seed).standard_normal(self.config.vocab, np.float32) * 2
        if seed % 8 < self._habit:
            logits[3 + (5 * last + 3) % CYCLE] += 8
        return logits


def make_config(folder: Path) -> ModelConfig:
    """The configuration of a tiny model: a vocabulary of 512, a context of 2,048."""
    return ModelConfig.from_folder(make_tiny(folder, with_tokenizer=False))
