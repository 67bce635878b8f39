"""Position-independent caching (EPIC, arXiv 2410.15332): what a chunk of a prompt takes from where it was seen before.

A chunk is computed once as a prompt of its own, from position 0, so its keys and values are ordinary cached pages,
under hashes of its own, in every tier. A prompt that holds it elsewhere computes the chunk's first tokens in their new
place (LegoLink: computed alone, they drew the attention that the start of a prompt draws) and takes over the rest:
values as they are, keys turned from their old positions to the new ones. That is an approximation: what was taken over
has not seen what stands before it.

Pure. This module must not know requests, blocks or how a cache is laid out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from services.worker.flowserve.quantise import Floats
from shared.errors import InvalidRequest

RECOMPUTED: Final = (
    16  # tokens at the start of a chunk; `deepflow bench pic` measures other numbers
)

Angles: TypeAlias = tuple[Floats, Floats]  # cosine and sine, fp32 [D / 2, positions] each


class Piece(NamedTuple):
    """Positions start to stop of a prompt. `chunk`: they are taken over from that chunk; None: they are computed."""

    start: int
    stop: int
    chunk: int | None = None


def validate(chunks: Sequence[Sequence[int]], num_prompt: int) -> None:
    """Raises InvalidRequest unless they are ranges [start, stop) of the prompt, in order and apart."""
    end = 0
    for chunk in chunks:
        if len(chunk) != 2 or not end <= chunk[0] < chunk[1] <= num_prompt:
            raise InvalidRequest(
                f"chunks are ranges [start, stop) of the {num_prompt} tokens of the prompt, in order, "
                "none empty or overlapping",
                param="chunks",
            )
        end = chunk[1]


def taken_over(
    chunk: Sequence[int],
    num_prompt: int,
    page: int,
    recomputed: int = RECOMPUTED,
    num_found: int = 0,
) -> range:
    """The positions of a chunk [start, stop) that need not be computed if its full pages are cached; may be empty.

    A chunk at the start of the prompt is its prefix, which is found without this, as are the first `num_found` tokens.
    The last token of a prompt is always computed, as its logits are wanted. Less than a page is not worth its loss.
    """
    first, stop = chunk
    if first == 0:
        return range(0)
    start = max(first + recomputed, num_found)
    end = min(first + (stop - first) // page * page, num_prompt - 1)
    return range(start, end if end - start >= page else start)


def pieces(taken: Iterable[range | None], num_prompt: int) -> Iterator[Piece]:
    """The whole prompt in order: what is taken over of each chunk (None or empty: nothing), and what lies between."""
    end = 0
    for chunk, positions in enumerate(taken):
        if positions:
            if end < positions.start:
                yield Piece(end, positions.start)
            yield Piece(positions.start, positions.stop, chunk)
            end = positions.stop
    if end < num_prompt:
        yield Piece(end, num_prompt)


def turn_between(cos: Floats, sin: Floats, source: int, target: int, length: int) -> Angles:
    """By what keys turn that move from positions `source`.. to `target`..; `cos` and `sin` are of all positions,
    [positions, D / 2], and may hold one factor on both (`RotaryTable.scale`), which keys have in them and keep.

    The difference is taken of the angles that the table has, not of the positions: they were rounded.
    """
    old_cos, old_sin = cos[source : source + length].T, sin[source : source + length].T
    new_cos, new_sin = cos[target : target + length].T, sin[target : target + length].T
    factor = old_cos * old_cos + old_sin * old_sin
    return (
        np.divide(new_cos * old_cos + new_sin * old_sin, factor),
        np.divide(new_sin * old_cos - new_cos * old_sin, factor),
    )


def turned(keys: Floats, angles: Angles) -> Floats:
    """Keys [..., D, positions], turned in the pairs (i, i + D / 2)."""
    cos, sin = angles
    half = len(cos)
    result: npt.NDArray[np.float32] = np.empty_like(keys)
    a, b = keys[..., :half, :], keys[..., half:, :]
    np.multiply(a, cos, out=result[..., :half, :])
    result[..., :half, :] -= b * sin
    np.multiply(b, cos, out=result[..., half:, :])
    result[..., half:, :] += a * sin
    return result
