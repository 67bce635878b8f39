"""Decode steps as recorded graphs: what a device would be told anew for each operation of each layer, it is told once.

A graph holds one shape. So steps of single rows are filled up to a bucket of rows and a bucket of pages, and a graph is
recorded when its bucket is first met: a start records nothing and stays short, and a load meets few buckets. The
rows' tokens, positions and block tables lie in tensors that stay where they are and are overwritten before a replay.
This module must not know layers, weights or which device it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from services.worker.flowserve.decoder import StepInput
from services.worker.flowserve.device.device import (
    MAX_GRAPH_ROWS,
    DecodePlan,
    Graph,
    GraphDevice,
    GraphKV,
    Plan,
)
from shared import log

_FIRST_CONTEXT: Final = 1024  # positions
_CONTEXT_GROWTH: Final = 4

Compute = Callable[[torch.Tensor, Plan], torch.Tensor]


@dataclass(slots=True)
class _Bucket:
    """Inputs of one shape, and the graph over them once it is recorded."""

    ids: torch.Tensor  # int64 [rows]
    plan: DecodePlan
    graph: Graph | None = None
    is_eager: bool = False  # it could not be recorded


class Graphs:
    """Recordings of `compute`, which takes the tokens [T] and the plan of T single rows to their logits [T, vocab].

    Contexts are sorted into buckets too, each `_CONTEXT_GROWTH` times the one before, up to `context` positions: the
    width of the block tables bounds what a step copies to the device, and what attention reads where it cannot stop at
    a row's end. All graphs leave their logits in one place, of `vocab` values of type `dtype` each: a place for each
    would cost more memory than all else that they keep. With `may_fail` a bucket that cannot be recorded (no memory for
    it, say) is computed without; executors that share a model have to do alike, so for them the step fails.
    """

    def __init__(
        self,
        device: GraphDevice,
        kv: GraphKV,
        compute: Compute,
        *,
        context: int,
        vocab: int,
        dtype: torch.dtype,
        may_fail: bool,
    ) -> None:
        self._device = device
        self._kv = kv
        self._compute = compute
        self._context = context
        self._may_fail = may_fail
        self._logits = torch.empty((MAX_GRAPH_ROWS, vocab), dtype=dtype, device=device.place)
        self._buckets: dict[tuple[int, int], _Bucket] = {}

    @property
    def num_recorded(self) -> int:
        """Graphs there are."""
        return sum(bucket.graph is not None for bucket in self._buckets.values())

    def logits(self, step: StepInput) -> torch.Tensor | None:
        """[len(step.tokens), vocab], valid until the next call; None for a step that must be computed without."""
        num_rows = bucket_of(len(step.tokens)) if is_decode(step) else None
        last = max((span.start for span in step.spans), default=0)
        if num_rows is None or last >= self._context:
            return None
        bucket = self._bucket(num_rows, self._num_pages(last))
        if bucket.is_eager or not bucket.plan.fill(step.spans):
            return None
        tokens = np.zeros(num_rows, np.int64)
        tokens[: len(step.tokens)] = step.tokens
        bucket.ids.copy_(self._device.tensor(tokens))
        graph = bucket.graph or self._record(bucket)
        return None if graph is None else graph.replay()[: len(step.tokens)]

    def _record(self, bucket: _Bucket) -> Graph | None:
        ids, plan, logits = bucket.ids, bucket.plan, self._logits[: bucket.plan.num_rows]
        try:
            bucket.graph = self._device.capture(
                lambda: logits.copy_(self._compute(ids, plan)), plan
            )
        except RuntimeError as error:
            if not self._may_fail:
                raise
            log.note("graph_not_recorded", num_rows=plan.num_rows, error=str(error))
            bucket.is_eager = True
        return bucket.graph

    def _bucket(self, num_rows: int, num_pages: int) -> _Bucket:
        bucket = self._buckets.get((num_rows, num_pages))
        if bucket is None:
            ids = self._device.tensor(np.zeros(num_rows, np.int64))
            bucket = _Bucket(ids, self._kv.decode_plan(num_rows, num_pages))
            self._buckets[num_rows, num_pages] = bucket
        return bucket

    def _num_pages(self, last: int) -> int:
        """Pages of the smallest bucket of contexts that holds position `last`."""
        context = _FIRST_CONTEXT
        while context <= last:
            context *= _CONTEXT_GROWTH
        return -(-min(context, self._context) // self._kv.page)


def is_decode(step: StepInput) -> bool:
    """Whether every sequence has one row, whose logits are wanted."""
    return len(step.tokens) == len(step.spans) == len(step.sample_rows) > 0


def bucket_of(num_rows: int) -> int | None:
    """Rows of the graph for a step of `num_rows`: powers of two up to 8, then steps of 8, 16 and 32, so that less than
    half are filled up; None beyond `MAX_GRAPH_ROWS`."""
    if num_rows <= 8:
        return 1 << (num_rows - 1).bit_length()
    for upto, unit in ((32, 8), (128, 16), (MAX_GRAPH_ROWS, 32)):
        if num_rows <= upto:
            return -(-num_rows // unit) * unit
    return None
