"""Steps as bytes that say what is new."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from services.worker.flowserve.decoder import Span, StepInput
from services.worker.flowserve.spmd import delta
from services.worker.flowserve.spmd.delta import StepDecoder, StepEncoder

PAGE = 4


@dataclass
class Pool:
    """Sequences that grow, fork, shrink, end and take freed blocks again, as a scheduler's do."""

    random: random.Random
    num_blocks: int = 0
    free: list[int] = field(default_factory=list)
    running: list[tuple[int, list[int]]] = field(default_factory=list)  # tokens computed, table

    def span(self, index: int) -> Span:
        """The next rows of a sequence, a few of which may have been guesses that were wrong."""
        computed, table = self.running[index]
        start = max(0, computed - self.random.choice((0, 0, 0, 0, 1, 3, 6)))
        length = self.random.choice((1, 1, 1, 2, 3 * PAGE))
        num_blocks = -(-(start + length) // PAGE)
        while len(table) > num_blocks:
            self.free.append(table.pop())
        while len(table) < num_blocks:
            table.append(self.take())
        self.running[index] = (start + length, table)
        return Span(start, length, table.copy())

    def take(self) -> int:
        """A block, any of the free ones."""
        if not self.free:
            self.free += range(self.num_blocks, self.num_blocks + 50)
            self.num_blocks += 50
        return self.free.pop(self.random.randrange(len(self.free)))

    def end(self, index: int) -> None:
        """Its blocks are taken again by others, unless a fork shares them."""
        _, table = self.running.pop(index)
        shared = {block for _, other in self.running for block in other}
        self.free += [block for block in table if block not in shared]

    def begin(self) -> None:
        """From nothing, or with the first pages of another."""
        table: list[int] = []
        if self.running and self.random.random() < 0.5:
            computed, other = self.random.choice(self.running)
            table = other[: self.random.randint(0, computed // PAGE)].copy()
        self.running.append((len(table) * PAGE, table))

    def step(self) -> StepInput:
        """Any sequences, in any order."""
        while len(self.running) > 1 and self.random.random() < 0.1:
            self.end(self.random.randrange(len(self.running)))
        while not self.running or self.random.random() < 0.3:
            self.begin()
        num = self.random.randint(1, min(6, len(self.running)))
        batch = self.random.sample(range(len(self.running)), num)
        spans = [self.span(index) for index in batch]
        rows = sum(span.length for span in spans)
        samples = sorted(self.random.sample(range(rows), self.random.randint(0, rows)))
        return StepInput([self.random.randrange(1 << 20) for _ in range(rows)], spans, samples)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 32))
def test_any_run_of_steps_comes_out_as_it_went_in(seed: int) -> None:
    """Growing, forked, shortened, ended and alternating sequences, and blocks that are taken again."""
    source = random.Random(seed)
    pool, encoder, decoder = Pool(source), StepEncoder(), StepDecoder()
    for _ in range(source.randint(1, 3 * delta.KEEP_STEPS)):
        step = pool.step()
        assert decoder.decode(encoder.encode(step)) == step


tables = st.lists(st.integers(0, 5), min_size=1, max_size=6)
spans = st.builds(Span, st.integers(0, 9), st.just(1), tables)


@given(st.lists(st.lists(spans, min_size=1, max_size=4), max_size=20))
def test_tables_of_any_blocks_come_out_as_they_went_in(steps: list[list[Span]]) -> None:
    """Even those that no scheduler would make, where everything looks like everything."""
    encoder, decoder = StepEncoder(), StepDecoder()
    for some in steps:
        step = StepInput([7] * len(some), some, [0])
        assert decoder.decode(encoder.encode(step)) == step


def test_a_decode_row_costs_the_same_at_any_context() -> None:
    """What a step takes grows with its rows and new blocks, whatever its tables hold."""
    sizes = []
    for context in (1_000, 100_000):
        encoder, table = StepEncoder(), list(range(context // PAGE))
        whole = StepInput([1] * context, [Span(0, context, table)], [])
        encoder.encode(whole)
        row = StepInput([1], [Span(context, 1, [*table, 1_000_000])], [0])
        sizes.append(len(encoder.encode(row)))
    assert sizes[0] == sizes[1] <= 64


def test_micro_batches_that_alternate_are_remembered() -> None:
    """Two batches of a pipeline in turn cost no more than one batch again and again."""
    encoder = StepEncoder()
    batches = [[list(range(n * 100, n * 100 + 50)) for n in range(b, b + 4)] for b in (0, 4)]
    for turn in range(8):
        batch = batches[turn % 2]
        step = StepInput([1] * 4, [Span(200 + turn, 1, table) for table in batch], [0, 1, 2, 3])
        data = encoder.encode(step)
        if turn >= 2:
            assert len(data) <= 16 + 4 * 32


def test_what_is_remembered_is_bounded() -> None:
    """Tables of sequences that ended are forgotten."""
    encoder = StepEncoder()
    for number in range(10 * delta.KEEP_STEPS):
        encoder.encode(StepInput([1], [Span(0, 1, [number])], [0]))
    assert len(encoder._tables) <= delta.KEEP_STEPS + 2
    assert len(encoder._holder) <= delta.KEEP_STEPS + 2
