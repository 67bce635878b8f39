"""What the engine asks of a model, whatever runs it: the rows of a step in, logits out.

Plain data and a protocol, with one more for what runs in stages, so that scheduler, engine and their tests need no
tensor library. This module must not know how a decoder computes, nor requests, sampling, or who owns which block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt

from services.worker.flowserve.config import ModelConfig

Floats: TypeAlias = npt.NDArray[np.float32]
View: TypeAlias = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Span:
    """The rows of one sequence in a step, at positions start to start + length, and the blocks from 0 to their end."""

    start: int
    length: int
    table: Sequence[int]


@dataclass(frozen=True, slots=True)
class Splice:
    """The keys and values of `length` positions, copied: from `source_start` on of one block table to `start` on of
    another, the keys turned to their new positions."""

    source: Sequence[int]
    source_start: int
    table: Sequence[int]
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class StepInput:
    """One step: the rows of all its sequences, one after the other in the order of `spans`.

    `tokens[i]` is the token of row i; `sample_rows` are the rows whose logits are wanted, ascending. A sequence may
    have several spans, in order. `splices` are done before all rows, by a decoder that `can_splice`.
    """

    tokens: list[int]
    spans: list[Span]
    sample_rows: list[int]
    splices: Sequence[Splice] = ()


class Decoder(Protocol):
    """The weights of one model, its KV cache, and the arithmetic over both. All calls belong to one thread at a time.

    `description` says in a few words what computes ("native avx512, w8a8, 2 threads").
    `timings` are seconds spent since the start by part ("linears", "attention", ...), empty where nobody measures.
    """

    config: ModelConfig

    @property
    def description(self) -> str: ...

    @property
    def timings(self) -> dict[str, float]: ...

    def bytes_per_block(self, page: int) -> int:
        """Memory of one KV block of `page` positions over all layers."""
        ...

    def allocate(self, num_blocks: int, page: int) -> None:
        """Make the KV cache: blocks 0 to num_blocks - 1. Called once, before the first `forward`."""
        ...

    def forward(self, step: StepInput) -> Floats:
        """Compute the rows of `step`, store their keys and values, and return logits [len(step.sample_rows), vocab],
        which stay valid until the next call. On the CPU, in `w8a8`, a row's logits depend on its own sequence only,
        bit for bit."""
        ...


@runtime_checkable
class Splicer(Decoder, Protocol):
    """A decoder that may be able to move keys and values to other positions (`StepInput.splices`)."""

    @property
    def splices(self) -> bool: ...


@runtime_checkable
class Movable(Decoder, Protocol):
    """A decoder whose blocks can be copied out and in, as bytes in a layout of its own; after `allocate`.

    Equal bytes mean equal keys and values wherever model, recipe and page are equal.
    """

    @property
    def block_bytes(self) -> int: ...

    @property
    def memory(self) -> View | None:
        """All blocks, one behind the other; None where the host cannot address them."""
        ...

    def block_view(self, block: int) -> View | None:
        """The memory of one block, contiguous [block_bytes]; None where the host cannot address it. It may be read and
        written in any thread."""
        ...

    def read_blocks(self, blocks: Sequence[int]) -> View:
        """A copy of these blocks [len(blocks), block_bytes]; in the decoder's thread."""
        ...

    def write_blocks(self, blocks: Sequence[int], data: View) -> None:
        """The other way; in the decoder's thread."""
        ...


@runtime_checkable
class Pipeline(Decoder, Protocol):
    """A decoder whose layers are shared out to stages, each of which computes the steps in the order they came in.

    Up to `num_stages` steps are inside at a time. With one stage it is used as any other decoder; with more, only
    through `begin` and `finish`, on one thread. No step inside needs a token that another one inside is to sample.
    """

    @property
    def num_stages(self) -> int: ...

    def begin(self, step: StepInput) -> None:
        """Let a step in, without waiting for its logits. If it raises, the step is not inside."""
        ...

    def finish(self) -> Floats:
        """Wait for the oldest step inside; its logits as of `forward`, valid until the next call of `finish`.

        If it raises, the step is out; only after an interrupt (a KeyboardInterrupt) is it still inside.
        """
        ...


def can_splice(decoder: Decoder) -> bool:
    """Whether steps may have splices. With others, everything is computed."""
    return isinstance(decoder, Splicer) and decoder.splices


def as_pipeline(decoder: Decoder) -> Pipeline | None:
    """The decoder, if several steps may be inside it at a time."""
    return decoder if isinstance(decoder, Pipeline) and decoder.num_stages > 1 else None
