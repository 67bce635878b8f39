"""The grid of a heatmap, and how its cells are measured (the paper, section 5.3).

A cell is a run of requests of one shape at one rate, sent alike to two colocated TEs and to a pair of the same
hardware, one after the other so that whatever disturbs the machine disturbs both. This module must not know what the
TEs are.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Final, Protocol

from rich.progress import Progress

from deepflow.bench.progress import step
from deepflow.bench.workload import arrivals
from services.scheduler.heatmap import Heatmap
from shared.errors import InvalidRequest

_LOADS: Final = (0.2, 0.4, 0.6)  # of what the colocated TEs can take of the grid's middle shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """The axes, and the requests of a run. Without `rates` (requests per second) `loads` give them."""

    prefill_lens: tuple[int, ...]
    ratios: tuple[float, ...]
    rates: tuple[float, ...] = ()
    loads: tuple[float, ...] = _LOADS
    num_requests: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises InvalidRequest naming the axis that does not ascend from above 0."""
        for name in ("prefill_lens", "ratios", "rates", "loads"):
            axis = getattr(self, name)
            ascends = all(low < high for low, high in itertools.pairwise((0, *axis)))
            if not ascends or not (axis or name == "rates"):
                raise InvalidRequest(f"{name}: not ascending from above 0", param=name)

    @property
    def num_cells(self) -> int:
        """Of all rates."""
        return len(self.prefill_lens) * len(self.ratios) * len(self.rates or self.loads)

    @property
    def middle(self) -> Shape:
        """The shape in the middle, by which the rates are chosen."""
        ratio = self.ratios[len(self.ratios) // 2]
        return Shape.of(self.prefill_lens[len(self.prefill_lens) // 2], ratio)


@dataclass(frozen=True, slots=True)
class Shape:
    """A request's lengths, in tokens."""

    prefill_len: int
    decode_len: int

    @classmethod
    def of(cls, prefill_len: int, ratio: float) -> Shape:
        """At least one token is decoded, beside the one that a prefill gives."""
        return cls(prefill_len, max(2, round(prefill_len * ratio)))


class Hardware(Protocol):
    """Two TEs, colocated, and the same two as a pair."""

    @property
    def source(self) -> str:
        """As a heatmap names it."""
        ...

    async def capacity(self, shape: Shape) -> float:
        """Requests of a shape per second that the colocated TEs can take, roughly."""
        ...

    async def jct_s(self, shape: Shape, times_s: Sequence[float], seed: int) -> tuple[float, float]:
        """Mean job completion time of requests of a shape that come at these times: colocated, and by the pair.

        Their prompts, made from `seed`, share nothing.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A heatmap, and the seconds that it came from: [rate][prefill length][ratio] of (colocated, pair)."""

    heatmap: Heatmap
    jct_s: tuple[tuple[tuple[tuple[float, float], ...], ...], ...]

    def to_json(self, **more: object) -> bytes:
        """The file, as JEs read it; with the seconds beside it."""
        return self.heatmap.to_json(jct_s=self.jct_s, **more)


async def measure(hardware: Hardware, grid: Grid, progress: Progress) -> Measured:
    """Every cell, rate after rate. Raises what the hardware raises."""
    rates = grid.rates or await _rates(hardware, grid)
    seeds = itertools.count(grid.seed << 20)
    tables = []
    with step(progress, "cells", grid.num_cells) as advance:
        for rate in rates:
            table = []
            for prefill_len in grid.prefill_lens:
                row = []
                for ratio in grid.ratios:
                    seed = next(seeds)
                    times_s = arrivals(Random(seed), grid.num_requests, rate)
                    row.append(await hardware.jct_s(Shape.of(prefill_len, ratio), times_s, seed))
                    advance()
                table.append(tuple(row))
            tables.append(tuple(table))
    values = tuple(
        tuple(tuple(whole / pair - 1.0 for whole, pair in row) for row in table) for table in tables
    )
    heatmap = Heatmap(
        prefill_lens=grid.prefill_lens,
        ratios=grid.ratios,
        rates=rates,
        values=values,
        source=hardware.source,
    )
    return Measured(heatmap=heatmap, jct_s=tuple(tables))


async def _rates(hardware: Hardware, grid: Grid) -> tuple[float, ...]:
    """Two digits of each are enough, and are read more easily."""
    capacity = await hardware.capacity(grid.middle)
    rates = [load * capacity for load in grid.loads]
    return tuple(round(rate, 1 - math.floor(math.log10(rate))) for rate in rates)
