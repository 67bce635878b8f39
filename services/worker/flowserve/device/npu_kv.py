"""The NPU's paged KV cache, and the plans by which a step's rows reach it.

What a plan needs on the device travels in one copy. Blocks beyond those of the engine take the keys and values of rows
that only fill up a graph. This module must not know the operators' names, requests, or who owns a block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from services.worker.flowserve.config import ModelConfig
from services.worker.flowserve.decoder import Span
from services.worker.flowserve.device.accelerator import Rotary, host_tensor, pages_of, upload
from services.worker.flowserve.device.npu_attention import (
    NUM_SPARE,
    PagedAttention,
    Pages,
    Seen,
    Within,
    num_pages,
    rotate,
    rotation,
    write,
)
from services.worker.flowserve.device.npu_runtime import Runtime

_ALIGNMENT: Final = 128  # int32 values: 512 bytes

Ints = npt.NDArray[np.int32]


class Inputs:
    """int32 tensors on the device, written from the host in one copy. They stay where they are."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], place: torch.device) -> None:
        sizes = [math.prod(shape) for shape in shapes]
        padded = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]
        self._data = torch.zeros(sum(padded), dtype=torch.int32, device=place)
        pieces = zip(torch.split(self._data, padded), sizes, shapes, strict=True)
        self.tensors = [piece[:size].view(shape) for piece, size, shape in pieces]
        self._places = [int(piece.storage_offset()) for piece in self.tensors]

    def write(self, arrays: Sequence[Ints]) -> None:
        """One array for each tensor, of its shape."""
        host = host_tensor(self._data.shape, torch.int32, self._data.device)
        values = host.numpy()
        for place, array in zip(self._places, arrays, strict=True):
            values[place : place + array.size] = array.reshape(-1)
        self._data.copy_(host, non_blocking=True)


class _Rows:
    """Where rows are stored and how they are turned: what all plans have in common."""

    slots: torch.Tensor  # int32 [T]
    cos: torch.Tensor  # [T, 1, D]
    sin: torch.Tensor

    def rotate(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Plan`."""
        return rotate(q, k, self.cos, self.sin)

    def write(self, layer: Pages, k: torch.Tensor, v: torch.Tensor) -> None:
        """See `Plan`."""
        write(layer, k, v, self.slots)


@dataclass(frozen=True, slots=True)
class _Chunk:
    """More than one row of a sequence, up to position `end`."""

    rows: slice
    table: torch.Tensor  # int32 [1, pages]
    end: int


@dataclass(frozen=True, slots=True)
class _Singles:
    """One row each of several sequences, and what they see by window."""

    rows: slice
    seen: dict[int | None, Seen]


class NpuPlan(_Rows):
    """See `Plan`: a call of attention for each run of single rows, and one for each chunk."""

    def __init__(self, kv: NpuKV, spans: Sequence[Span]) -> None:
        self._attention = kv.attention
        page, windows = kv.page, kv.windows
        positions = [np.arange(s.start, s.start + s.length, dtype=np.int32) for s in spans]
        arrays = [_slots(spans, page), np.concatenate(positions)]
        layouts: list[tuple[slice, list[Span], dict[int | None, list[Within]]]] = []
        for rows, batch in _batches(spans, kv.attention):
            if batch[0].length > 1:
                layouts.append((rows, batch, {}))
                arrays.append(np.array([batch[0].table[: pages_of(batch[0], page)]], np.int32))
                continue
            views = {w: [Within.of(span, w, page) for span in batch] for w in windows}
            layouts.append((rows, batch, views))
            for within in views.values():
                arrays.append(_tables(batch, within, page, _width(within, page)))
                arrays.append(np.array([each.hidden for each in within], np.int32))
        inputs = Inputs([array.shape for array in arrays], kv.runtime.place)
        inputs.write(arrays)
        tensors = iter(inputs.tensors)
        self.slots = next(tensors)
        last = max(span.start + span.length for span in spans) - 1
        self.cos, self.sin = rotation(kv.rotary, next(tensors), last)
        self._batches: list[_Chunk | _Singles] = []
        for rows, batch, views in layouts:
            if views:
                self._batches.append(_Singles(rows, _seen(kv, views, tensors)))
            else:
                end = batch[0].start + batch[0].length
                self._batches.append(_Chunk(rows, next(tensors), end))

    def attend(self, layer: Pages, q: torch.Tensor, window: int | None) -> torch.Tensor:
        """See `Plan`."""
        q = q.reshape(len(q), -1)
        parts = []
        for batch in self._batches:
            if isinstance(batch, _Chunk):
                part = self._attention.chunk(layer, q[batch.rows], batch.table, batch.end, window)
            else:
                part = self._attention.single_rows(layer, q[batch.rows], batch.seen[window])
            parts.append(part)
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class NpuDecodePlan(_Rows):
    """See `DecodePlan`. Sequences' lengths are lists on the host, which a graph takes anew for each replay."""

    def __init__(self, kv: NpuKV, num_rows: int, num_pages: int) -> None:
        page = kv.page
        if num_rows > NUM_SPARE * page:
            raise ValueError(f"{num_rows} rows are more than {NUM_SPARE * page} spare slots")
        self._kv = kv
        self.num_rows = num_rows
        self._num_pages = num_pages
        # A window may begin anywhere in its first page.
        self._widths = {
            w: num_pages if w is None else min(num_pages, (w + 2 * page - 2) // page)
            for w in kv.windows
        }
        shapes = [(num_rows,), (num_rows,)]
        tables = [(num_rows, width) for width in self._widths.values()]
        hidden = [(num_rows,) for _ in self._widths]
        self._inputs = Inputs([*shapes, *tables, *hidden], kv.runtime.place)
        self.slots, self._positions, *rest = self._inputs.tensors
        self.cos, self.sin = rotation(kv.rotary, self._positions, 0)
        self._lengths = {w: [1] * num_rows for w in self._widths}
        self._tables = dict(zip(self._widths, rest[: len(tables)], strict=True))
        self._hidden = dict(zip(self._widths, rest[len(tables) :], strict=True))
        self._masks: dict[int | None, torch.Tensor] = {
            window: torch.zeros(num_rows, width * page, dtype=torch.bool, device=self.slots.device)
            for window, width in self._widths.items()
            if window is not None
        }

    @contextmanager
    def longest(self) -> Iterator[None]:
        """Meanwhile all sequences are as long as this plan may hold, so that what is recorded then has memory for that.
        The blocks beyond their own are not theirs."""
        lengths, most = self._lengths, max(1, self._kv.num_blocks // self.num_rows)
        self._lengths = {
            window: [min(width, most) * self._kv.page] * self.num_rows
            for window, width in self._widths.items()
        }
        try:
            yield
        finally:
            self._lengths = lengths

    @property
    def host_inputs(self) -> list[dict[str, Sequence[int]]]:
        """What the calls of attention take from the host, by the layers' order; one for all where these are alike."""
        windows = self._kv.windows_of_layers if len(self._widths) > 1 else [*self._widths]
        return [{"actual_seq_kvlen": self._lengths[window]} for window in windows]

    def fill(self, spans: Sequence[Span]) -> bool:
        """See `DecodePlan`."""
        kv, page = self._kv, self._kv.page
        num_idle = self.num_rows - len(spans)
        lengths = [span.start + 1 for span in spans] + [1] * num_idle
        fits = num_idle >= 0 and num_pages(max(lengths), page) <= self._num_pages
        if not fits or not kv.attention.fits(lengths):
            return False
        idle = [Span(0, 1, (kv.num_blocks,))] * num_idle
        slots = np.arange(self.num_rows, dtype=np.int32) + kv.num_blocks * page
        slots[: len(spans)] = _slots(spans, page)
        rows = [*spans, *idle]
        views = {w: [Within.of(span, w, page) for span in rows] for w in self._widths}
        self._inputs.write(
            [
                slots,
                np.array([span.start for span in rows], np.int32),
                *(_tables(rows, views[w], page, width) for w, width in self._widths.items()),
                *(np.array([each.hidden for each in views[w]], np.int32) for w in self._widths),
            ]
        )
        self._lengths = {w: [each.length for each in within] for w, within in views.items()}
        cos, sin = rotation(kv.rotary, self._positions, max(span.start for span in rows))
        self.cos.copy_(cos)
        self.sin.copy_(sin)
        for window, mask in self._masks.items():
            mask.copy_(_hides(kv.places, self._tables[window], self._hidden[window], page))
        return True

    def attend(self, layer: Pages, q: torch.Tensor, window: int | None) -> torch.Tensor:
        """See `Plan`."""
        seen = Seen(self._tables[window], self._lengths[window], self._masks.get(window))
        return self._kv.attention.single_rows(layer, q.reshape(len(q), -1), seen)


class NpuKV:
    """See `KV`. Each layer's keys and values are tensors of their own: none may have more than 2**31 - 1 elements."""

    def __init__(self, config: ModelConfig, num_blocks: int, page: int, runtime: Runtime) -> None:
        place = runtime.place
        self.rotary = Rotary(config, place)
        self.attention = PagedAttention(config, num_blocks + NUM_SPARE, page, self.rotary)
        self.num_blocks = num_blocks
        self.page = page
        self.runtime = runtime
        self.windows_of_layers = config.windows
        self.windows = [*dict.fromkeys(config.windows)]
        self.places = torch.arange(num_pages(config.context, page) * page, device=place)
        shape = (num_blocks + NUM_SPARE, page, config.num_kv_heads, config.head_dim)
        self.layers = [
            Pages(*(torch.zeros(shape, dtype=torch.bfloat16, device=place) for _ in range(2)))
            for _ in range(config.num_layers)
        ]

    def plan(self, spans: Sequence[Span]) -> NpuPlan:
        """See `KV`."""
        return NpuPlan(self, spans)

    def decode_plan(self, num_rows: int, num_pages: int) -> NpuDecodePlan:
        """See `KV`. Raises ValueError for more rows than there are spare slots."""
        return NpuDecodePlan(self, num_rows, num_pages)

    def read_blocks(self, blocks: Sequence[int]) -> npt.NDArray[np.uint8]:
        """See `KV`: layer by layer the keys, then the values, [page, kv heads, D] each."""
        index = upload(np.array(blocks, np.int64), self.runtime.place)
        parts = [x.index_select(0, index).flatten(1) for x in self._tensors()]
        data = torch.cat(parts, dim=1).view(torch.uint8)
        host = host_tensor(data.shape, torch.uint8, data.device)
        host.copy_(data, non_blocking=True)
        self.runtime.synchronize()
        array: npt.NDArray[np.uint8] = host.numpy()
        return array

    def write_blocks(self, blocks: Sequence[int], data: npt.NDArray[np.uint8]) -> None:
        """See `KV`. The copy may still be under way at the return; what is computed afterwards comes after it."""
        values = upload(data, self.runtime.place).view(torch.bfloat16)
        index = upload(np.array(blocks, np.int64), self.runtime.place)
        for x, part in zip(self._tensors(), values.chunk(2 * len(self.layers), dim=1), strict=True):
            x.index_copy_(0, index, part.reshape(-1, *x.shape[1:]))

    def _tensors(self) -> Iterator[torch.Tensor]:
        return (x for layer in self.layers for x in layer)


def _batches(
    spans: Sequence[Span], attention: PagedAttention
) -> Iterator[tuple[slice, list[Span]]]:
    """The rows, and the sequences, of each call of attention: chunks alone, single rows together that follow one
    another, as many as one call takes."""
    row = first = used = 0
    batch: list[Span] = []
    for span in spans:
        is_single, pages = span.length == 1, pages_of(span, attention.page)
        follows = is_single and batch and batch[0].length == 1
        if batch and not (follows and used + pages <= attention.num_blocks):
            yield slice(first, row), batch
            batch, first, used = [], row, 0
        batch.append(span)
        row += span.length
        used += pages
    yield slice(first, row), batch


def _seen(
    kv: NpuKV, views: dict[int | None, list[Within]], tensors: Iterator[torch.Tensor]
) -> dict[int | None, Seen]:
    """What single rows see, by window; of each the next two of `tensors` are its table and what is hidden of it."""
    seen = {}
    for window, within in views.items():
        table, hidden = next(tensors), next(tensors)
        is_cut = any(each.hidden for each in within)
        mask = _hides(kv.places, table, hidden, kv.page) if is_cut else None
        seen[window] = Seen(table, [each.length for each in within], mask)
    return seen


def _slots(spans: Sequence[Span], page: int) -> Ints:
    """int32 [T]: block * page + place in it, of each row."""
    slots = np.empty(sum(span.length for span in spans), np.int32)
    row = 0
    for span in spans:
        if span.length == 1:
            slots[row] = span.table[span.start // page] * page + span.start % page
        else:
            positions = np.arange(span.start, span.start + span.length)
            first = span.start // page
            blocks = np.array(span.table[first : pages_of(span, page)])
            slots[row : row + span.length] = blocks[positions // page - first] * page
            slots[row : row + span.length] += (positions % page).astype(np.int32)
        row += span.length
    return slots


def _tables(spans: Sequence[Span], views: Sequence[Within], page: int, width: int) -> Ints:
    """int32 [rows, width]: the blocks that each row sees; block 0, which is there, beyond them."""
    tables = np.zeros((len(spans), width), np.int32)
    for table, span, within in zip(tables, spans, views, strict=True):
        blocks = span.table[within.first : pages_of(span, page)]
        table[: len(blocks)] = blocks
    return tables


def _width(views: Sequence[Within], page: int) -> int:
    return num_pages(max(within.length for within in views), page)


def _hides(places: torch.Tensor, table: Any, hidden: torch.Tensor, page: int) -> torch.Tensor:
    """bool [rows, pages * page]: True at the first `hidden` [rows] places."""
    return places[: table.shape[1] * page] < hidden.unsqueeze(1)
