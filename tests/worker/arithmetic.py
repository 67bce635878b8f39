"""Decoders without a model, for the engine's tests: cheap, exact, and unforgiving about their cache.

A cell of a layer's paged cache holds a digest of a row and of all cells before it, and what comes out of the layer is a
function of all cells the row attends to. So one wrong block, one cell overwritten or not yet written, and every later
token changes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from random import Random

import numpy as np
import numpy.typing as npt

from services.worker.flowserve.config import ModelConfig
from services.worker.flowserve.decoder import Decoder, Floats, StepInput, View
from tests.worker.tiny import make_tiny

CYCLE = 11  # likely continuations run in circles of at most this many tokens


class ArithmeticDecoder:
    """A `Decoder` whose next token is likely a function of the last one, for `habit` of 8 rows, else of everything.

    The `faults` are the numbers of the steps that raise, from 1.
    """

    description = "arithmetic"

    def __init__(
        self,
        config: ModelConfig,
        *,
        habit: int = 4,
        faults: tuple[int, ...] = (),
        num_layers: int = 1,
    ) -> None:
        self.config = config
        self.num_layers = num_layers
        self.num_steps = 0
        self._habit = habit
        self._faults = faults
        self._cells: npt.NDArray[np.uint64] = np.zeros((0, 0, 0), np.uint64)

    @property
    def timings(self) -> dict[str, float]:
        return {}

    def bytes_per_block(self, page: int) -> int:
        return 8 * page * self.num_layers

    def allocate(self, num_blocks: int, page: int) -> None:
        self._cells = np.zeros((num_blocks, self.num_layers, page), np.uint64)

    @property
    def block_bytes(self) -> int:
        return self._cells.nbytes // len(self._cells)

    @property
    def memory(self) -> View | None:
        return self._cells.reshape(-1).view(np.uint8)

    def block_view(self, block: int) -> View | None:
        view: View = self._cells[block].reshape(-1).view(np.uint8)
        return view

    def read_blocks(self, blocks: Sequence[int]) -> View:
        return self._cells[list(blocks)].reshape(len(blocks), -1).view(np.uint8)

    def write_blocks(self, blocks: Sequence[int], data: View) -> None:
        self._cells[list(blocks)] = data.view(np.uint64).reshape(len(blocks), self.num_layers, -1)

    def forward(self, step: StepInput) -> Floats:
        self._count(step)
        if self.num_steps in self._faults:
            raise FloatingPointError("a fault of the device")
        rows = embed(step)
        for layer in range(self.num_layers):
            rows = self._layer(layer, step, rows)
        return self._head(step, rows)

    def _count(self, step: StepInput) -> None:
        self.num_steps += 1
        assert step.sample_rows == sorted(set(step.sample_rows))
        assert sum(span.length for span in step.spans) == len(step.tokens)
        assert all(0 <= token < self.config.vocab for token in step.tokens)

    def _layer(self, layer: int, step: StepInput, rows: list[bytes]) -> list[bytes]:
        """All cells of a span are read through its table, row by row, as attention would."""
        cells = self._cells[:, layer]
        page = cells.shape[1]
        results: list[bytes] = []
        for span in step.spans:
            assert span.length > 0
            before = cells[list(span.table)].reshape(-1)[: span.start]
            state = blake2b(before.tobytes(), digest_size=8)
            for position in range(span.start, span.start + span.length):
                cell = state.copy()
                cell.update(rows[len(results)])
                cells[span.table[position // page], position % page] = np.frombuffer(
                    cell.digest(), np.uint64
                )[0]
                state.update(cell.digest())
                results.append(state.digest())
        return results

    def _head(self, step: StepInput, rows: list[bytes]) -> Floats:
        logits = np.empty((len(step.sample_rows), self.config.vocab), np.float32)
        for index, row in enumerate(step.sample_rows):
            logits[index] = self._logits(int.from_bytes(rows[row], "little"), step.tokens[row])
        return logits

    def _logits(self, seed: int, last: int) -> Floats:
        logits = np.random.default_rng(seed).standard_normal(self.config.vocab, np.float32) * 2
        if seed % 8 < self._habit:
            logits[3 + (5 * last + 3) % CYCLE] += 8
        return logits


def embed(step: StepInput) -> list[bytes]:
    """What the first layer is given."""
    return [token.to_bytes(8, "little") for token in step.tokens]


@dataclass
class Inside:
    """A step in a pipeline: how many stages it has passed, and what came out of the last of them."""

    step: StepInput
    rows: list[bytes]
    fails: bool
    num_passed: int = 0


class ArithmeticPipeline(ArithmeticDecoder):
    """A `Pipeline` of one layer per stage. How far which step inside has come is chance: at each call a step goes on
    through its next stage with the probability `eagerness` (0: all in its `finish`; 1: all in its `begin`).

    Of the `faults` the even ones raise in `begin`, the odd ones in `finish`.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_stages: int,
        eagerness: float = 0.5,
        habit: int = 4,
        faults: tuple[int, ...] = (),
    ) -> None:
        super().__init__(config, habit=habit, faults=faults, num_layers=num_stages)
        self.num_stages = num_stages
        self.max_inside = 0
        self._eagerness = eagerness
        self._random = Random(0)
        self._inside: deque[Inside] = deque()

    @property
    def num_inside(self) -> int:
        return len(self._inside)

    def forward(self, step: StepInput) -> Floats:
        raise AssertionError("steps begin and finish")

    def begin(self, step: StepInput) -> None:
        assert len(self._inside) < self.num_stages
        self._count(step)
        fails = self.num_steps in self._faults
        if fails and self.num_steps % 2 == 0:
            raise FloatingPointError("a fault of the device")
        self._inside.append(Inside(step, embed(step), fails))
        self.max_inside = max(self.max_inside, len(self._inside))
        self._go_on()

    def finish(self) -> Floats:
        self._go_on()
        oldest = self._inside.popleft()
        if oldest.fails:
            raise FloatingPointError("a fault of the device")
        while oldest.num_passed < self.num_stages:
            self._pass(oldest)
        return self._head(oldest.step, oldest.rows)

    def _go_on(self) -> None:
        """Oldest first, each at most as far as the one before it: a stage takes the steps in order."""
        num_passed = self.num_stages
        for one in self._inside:
            while one.num_passed < num_passed and self._random.random() < self._eagerness:
                self._pass(one)
            num_passed = one.num_passed

    def _pass(self, one: Inside) -> None:
        one.rows = self._layer(one.num_passed, one.step, one.rows)
        one.num_passed += 1


class DelayedPipeline:
    """A `Pipeline` made of any decoder, which computes a step at once when it comes in, or only when it is asked for.

    `eager`: the former.
    """

    def __init__(self, decoder: Decoder, *, num_stages: int, eager: bool) -> None:
        self.config = decoder.config
        self.num_stages = num_stages
        self.description = f"{decoder.description}, delayed"
        self.max_inside = 0
        self._decoder = decoder
        self._eager = eager
        self._inside: deque[StepInput | Floats] = deque()

    @property
    def timings(self) -> dict[str, float]:
        return self._decoder.timings

    def bytes_per_block(self, page: int) -> int:
        return self._decoder.bytes_per_block(page)

    def allocate(self, num_blocks: int, page: int) -> None:
        self._decoder.allocate(num_blocks, page)

    def forward(self, step: StepInput) -> Floats:
        raise AssertionError("steps begin and finish")

    def begin(self, step: StepInput) -> None:
        assert len(self._inside) < self.num_stages
        self._inside.append(self._decoder.forward(step).copy() if self._eager else step)
        self.max_inside = max(self.max_inside, len(self._inside))

    def finish(self) -> Floats:
        oldest = self._inside.popleft()
        return self._decoder.forward(oldest) if isinstance(oldest, StepInput) else oldest


def make_config(folder: Path) -> ModelConfig:
    """The configuration of a tiny model: a vocabulary of 512, a context of 2,048."""
    return ModelConfig.from_folder(make_tiny(folder, with_tokenizer=False))
