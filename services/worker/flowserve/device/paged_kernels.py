# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""The work of a `PagedPlan` as Triton kernels: rotation, the write of keys and values, attention that reads each page
where it lies.

Attention is FlashAttention-2's (arXiv 2307.08691): a program has some positions of one sequence and the query heads of
one key/value head, goes through the keys in tiles, in order, and keeps a running maximum and sum. A single row is too
little work for a GPU where its context is long, so several programs share its tiles and a last kernel joins what they
found (Flash-Decoding). What differs from step to step is not compiled in, so `check`, which holds the kernels against
plain torch before a model relies on them, compiles all that it will need; Triton keeps them on disk. This module must
not know layers or who owns a block.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Final

import numpy as np
import torch
import triton
import triton.language as tl

from services.worker.flowserve.config import ModelConfig
from services.worker.flowserve.decoder import Span
from services.worker.flowserve.device.accelerator import upload
from services.worker.flowserve.device.paged import PagedKV, PagedPlan

_NO_WINDOW: Final = 1 << 30
_MIN_ROWS: Final = 16  # of a product on tensor cores
_MIN_SPLIT: Final = (
    256  # positions: a program that reads fewer is not worth its part of the joining
)
_MAX_SPLITS: Final = 32
_PROGRAMS_PER_UNIT: Final = (
    4  # that a multiprocessor is given, so that some read while others multiply
)


class KernelKV(PagedKV):
    """A `PagedKV` whose plans compute in kernels."""

    def new_plan(self, num_rows: int, num_spans: int, num_pages: int) -> KernelPlan:
        """See `PagedKV`."""
        return KernelPlan(self, num_rows, num_spans, num_pages)


class KernelPlan(PagedPlan):
    """A `PagedPlan`. Items are (first row, span, rows) of what one program has: a single row, or some of a prompt."""

    def __init__(self, kv: PagedKV, num_rows: int, num_spans: int, num_pages: int) -> None:
        super().__init__(kv, num_rows, num_spans, num_pages)
        self._shape = _Shape(kv.config, kv.layers[0].dtype)
        self._num_units = _num_units(kv.place)
        rows = torch.arange(num_rows, dtype=torch.int32, device=kv.place)
        self._singles = torch.stack((rows, rows, torch.ones_like(rows)), dim=1)
        self._tiles = self._singles[:0]

    def prepare(self) -> None:
        """See `PagedPlan`."""
        self._gather_rotation()
        if self.num_rows == len(self.tables):  # of a graph too, whose rows come and go
            return
        singles, tiles = [], []
        row = 0
        for index, span in enumerate(self.spans):
            if span.length == 1:
                singles.append((row, index, 1))
            else:
                at_once = self._shape.tile_positions
                tiles += [
                    (row + begin, index, min(at_once, span.length - begin))
                    for begin in range(0, span.length, at_once)
                ]
            row += span.length
        items = upload(np.array(singles + tiles, np.int32), self.kv.place)
        self._singles, self._tiles = items[: len(singles)], items[len(singles) :]

    def rotate(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Plan`: in place."""
        return self._rotate(_packed(q)), self._rotate(_packed(k))

    def _rotate(self, x: torch.Tensor) -> torch.Tensor:
        half = x.shape[2] // 2
        _rotate_rows[(len(x),)](
            x,
            self.cos,
            self.sin,
            x.stride(0),
            HEADS=x.shape[1],
            HEADS_WIDE=triton.next_power_of_2(x.shape[1]),
            HALF=half,
            HALF_WIDE=triton.next_power_of_2(half),
        )
        return x

    def write(self, layer: Any, k: torch.Tensor, v: torch.Tensor) -> None:
        """See `Plan`."""
        k, v = _packed(k), _packed(v)
        _write_rows[(len(k),)](
            k,
            v,
            layer,
            self.cells,
            k.stride(0),
            v.stride(0),
            NUM_KV=k.shape[1],
            NUM_KV_WIDE=triton.next_power_of_2(k.shape[1]),
            DIM=k.shape[2],
            DIM_WIDE=triton.next_power_of_2(k.shape[2]),
            PAGE=self.kv.page,
        )

    def attend(self, layer: Any, q: torch.Tensor, window: int | None) -> torch.Tensor:
        """See `Plan`."""
        q = _packed(q).to(layer.dtype)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        shape = self._shape
        if len(self._singles):
            num_splits = self._num_splits(len(self._singles))
            self._launch(layer, q, out, window, self._singles, shape.single_rows, num_splits)
        if len(self._tiles):
            self._launch(layer, q, out, window, self._tiles, shape.tile_rows, 1)
        return out.flatten(1)

    def _num_splits(self, num_items: int) -> int:
        """Programs that share a row's context: enough to occupy the device, none with next to nothing to do."""
        programs = num_items * self.kv.config.num_kv_heads
        wanted = _PROGRAMS_PER_UNIT * self._num_units // programs
        most = self.num_pages * self.kv.page // _MIN_SPLIT
        return 1 << (max(1, min(wanted, most, _MAX_SPLITS)).bit_length() - 1)

    def _launch(
        self,
        layer: torch.Tensor,
        q: torch.Tensor,
        out: torch.Tensor,
        window: int | None,
        items: torch.Tensor,
        num_rows: int,
        num_splits: int,
    ) -> None:
        config, shape = self.kv.config, self._shape
        parts, tops, totals = out, out, out  # not looked at unless the work is split
        if num_splits > 1:
            lanes = (num_splits, len(items), config.num_heads)
            parts = torch.empty((*lanes, config.head_dim), device=q.device)
            tops, totals = torch.empty(lanes, device=q.device), torch.empty(lanes, device=q.device)
        _attend_items[(len(items), config.num_kv_heads, num_splits)](
            q,
            layer,
            items,
            self.positions,
            self.tables,
            out,
            parts,
            tops,
            totals,
            q.stride(0),
            self.tables.stride(0),
            config.head_dim**-0.5 * math.log2(math.e),
            _NO_WINDOW if window is None else window,
            NUM_KV=config.num_kv_heads,
            GROUP=config.group,
            DIM=config.head_dim,
            DIM_WIDE=shape.dim_wide,
            PAGE=self.kv.page,
            ROWS=num_rows,
            KEYS=shape.num_keys,
            IS_SPLIT=num_splits > 1,
            PRECISION=shape.precision,
            num_warps=4,
            num_stages=2,
        )
        if num_splits > 1:
            _join_parts[(len(items), config.num_heads)](
                parts,
                tops,
                totals,
                items,
                out,
                num_splits,
                HEADS=config.num_heads,
                DIM=config.head_dim,
                DIM_WIDE=shape.dim_wide,
                MOST=_MAX_SPLITS,
            )


class _Shape:
    """Sizes of a program of attention, so that queries and two tiles of keys and values fit into the memory that a
    multiprocessor shares, 100 kB on the smallest cards."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        is_large = dtype == torch.float32 or config.head_dim > 128
        self.precision = "ieee" if dtype == torch.float32 else "tf32"  # the second is fp32's only
        self.dim_wide = max(_MIN_ROWS, triton.next_power_of_2(config.head_dim))
        is_huge = dtype == torch.float32 and config.head_dim > 128
        self.num_keys = 16 if is_huge else 32 if is_large else 64
        self.single_rows = max(_MIN_ROWS, triton.next_power_of_2(config.group))
        self.tile_rows = max(32 if is_large else 64, self.single_rows)
        self.tile_positions = self.tile_rows // config.group


def check(config: ModelConfig, page: int, dtype: torch.dtype, place: torch.device) -> None:
    """Compile the kernels for a model and compare them with plain torch. Raises ArithmeticError where they differ, or
    whatever Triton raises where it cannot compile."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(place, dtype)

    table = list(range(-(-600 // page)))
    mixed = [Span(599, 1, table), Span(500, 40, table[::-1]), Span(0, 1, table[3:])]
    for window in dict.fromkeys(config.windows):
        one = replace(config, num_layers=1, windows=(window,))
        long, short = ([Span(n, 1, table) for n in starts] for starts in ((0, 15, 599), (3, 7)))
        for spans in (mixed, long, short):
            num_rows = sum(span.length for span in spans)
            heads = config.num_heads + 2 * config.num_kv_heads
            qkv = draw(num_rows, heads, config.head_dim)
            cells = draw(len(table) + 1, 2 * config.num_kv_heads, page, config.head_dim)
            results = []
            for kind in (PagedKV, KernelKV):
                kv = kind(one, len(table), page, dtype, place)
                kv.layers[0].copy_(cells)
                plan = kv.plan(spans)
                own = qkv.clone()
                q, k, v = own[:, : one.num_heads], *own[:, one.num_heads :].chunk(2, dim=1)
                q, k = plan.rotate(q, k)
                plan.write(kv.layers[0], k, v)
                results.append((plan.attend(kv.layers[0], q, window), kv.layers[0]))
            for expected, actual in zip(*results, strict=True):
                exact, difference = expected.double(), (expected.double() - actual.double())
                furthest = (difference.norm(dim=-1) / exact.norm(dim=-1)).max().item()
                if not furthest < (1e-4 if dtype == torch.float32 else 2e-2):  # nor NaN
                    raise ArithmeticError(f"Triton's kernels are off by {furthest:.2g}")


def _packed(x: torch.Tensor) -> torch.Tensor:
    """x [T, heads, D], a copy if its heads do not follow one another."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


def _num_units(place: torch.device) -> int:
    if place.type != "cuda":
        return 8
    return torch.cuda.get_device_properties(place).multi_processor_count


@triton.jit
def _rotate_rows(
    x,  # [T, HEADS, 2 * HALF]
    cos,  # fp32 [T, HALF]
    sin,
    stride,
    HEADS: tl.constexpr,
    HEADS_WIDE: tl.constexpr,
    HALF: tl.constexpr,
    HALF_WIDE: tl.constexpr,
):
    """One row: all its heads, in place."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS_WIDE)[:, None]
    d = tl.arange(0, HALF_WIDE)[None, :]
    real = (head < HEADS) & (d < HALF)
    at = x + row * stride + head * (2 * HALF) + d
    first = tl.load(at, mask=real, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=real, other=0.0).to(tl.float32)
    c = tl.load(cos + row * HALF + d, mask=d < HALF, other=0.0)
    s = tl.load(sin + row * HALF + d, mask=d < HALF, other=0.0)
    tl.store(at, (first * c - second * s).to(x.dtype.element_ty), mask=real)
    tl.store(at + HALF, (second * c + first * s).to(x.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize_on_alignment=["cells"])
def _write_rows(
    k,  # [T, NUM_KV, DIM]
    v,
    layer,  # [blocks, 2 * NUM_KV, PAGE, DIM]
    cells,  # int32 [T]
    k_stride,
    v_stride,
    NUM_KV: tl.constexpr,
    NUM_KV_WIDE: tl.constexpr,
    DIM: tl.constexpr,
    DIM_WIDE: tl.constexpr,
    PAGE: tl.constexpr,
):
    """One row: the keys and values of all its heads."""
    row = tl.program_id(0).to(tl.int64)
    cell = tl.load(cells + row).to(tl.int64)
    head = tl.arange(0, NUM_KV_WIDE)[:, None]
    d = tl.arange(0, DIM_WIDE)[None, :]
    real = (head < NUM_KV) & (d < DIM)
    key = tl.load(k + row * k_stride + head * DIM + d, mask=real, other=0.0)
    value = tl.load(v + row * v_stride + head * DIM + d, mask=real, other=0.0)
    block = cell // PAGE * (2 * NUM_KV * PAGE) + cell % PAGE
    at = layer + (block + head * PAGE) * DIM + d
    tl.store(at, key.to(layer.dtype.element_ty), mask=real)
    tl.store(at + NUM_KV * PAGE * DIM, value.to(layer.dtype.element_ty), mask=real)


@triton.jit(
    do_not_specialize=["table_stride"],
    do_not_specialize_on_alignment=["items", "positions", "tables"],
)
def _attend_items(
    queries,  # [T, NUM_KV * GROUP, DIM]
    layer,  # [blocks, 2 * NUM_KV, PAGE, DIM]
    items,  # int32 [I, 3]
    positions,  # int32 [T]
    tables,  # int32 [spans, pages]
    out,  # [T, NUM_KV * GROUP, DIM], contiguous
    parts,  # fp32 [splits, I, NUM_KV * GROUP, DIM], if IS_SPLIT; then an item is a single row
    tops,  # fp32 [splits, I, NUM_KV * GROUP]
    totals,
    query_stride,
    table_stride,
    scale,  # of the scores, whose exponentials are taken to base 2
    window,
    NUM_KV: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_WIDE: tl.constexpr,
    PAGE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One item, one key/value head, one share of the keys. Row r of the products is position r // GROUP, head
    r % GROUP; rows beyond the item compute what is not stored."""
    item, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tl.load(items + item * 3).to(tl.int64)
    span = tl.load(items + item * 3 + 1).to(tl.int64)
    num_positions = tl.load(items + item * 3 + 2)
    first = tl.load(positions + row)

    r = tl.arange(0, ROWS)
    d = tl.arange(0, DIM_WIDE)
    offset = r // GROUP
    lane = head * GROUP + r % GROUP
    position = first + offset
    real = (offset < num_positions)[:, None] & (d < DIM)[None, :]
    at = (row + offset)[:, None] * query_stride + lane[:, None] * DIM + d[None, :]
    q = tl.load(queries + at, mask=real, other=0.0)

    end = first + num_positions
    begin = tl.maximum(first - window + 1, 0) // KEYS * KEYS
    share = tl.cdiv(tl.cdiv(end - begin, KEYS), tl.num_programs(2)) * KEYS
    begin += split * share
    end = tl.minimum(begin + share, end)

    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, DIM_WIDE], tl.float32)
    for start in range(begin, end, KEYS):
        key_at = start + tl.arange(0, KEYS)
        there = key_at < end
        block = tl.load(tables + span * table_stride + key_at // PAGE, mask=there, other=0)
        cell = (block.to(tl.int64) * (2 * NUM_KV) + head) * PAGE + key_at % PAGE
        keys = layer + cell[:, None] * DIM + d[None, :]
        wanted = there[:, None] & (d < DIM)[None, :]
        k = tl.load(keys, mask=wanted, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        seen = (key_at[None, :] <= position[:, None]) & there[None, :]
        seen = seen & (key_at[None, :] > position[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        against = tl.where(higher == float("-inf"), 0.0, higher)  # a row may have seen no key yet
        p = tl.exp2(scores - against[:, None])
        fade = tl.exp2(top - against)
        total = total * fade + tl.sum(p, 1)
        v = tl.load(keys + NUM_KV * PAGE * DIM, mask=wanted, other=0.0)
        sums = sums * fade[:, None]
        sums += tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        top = higher

    if IS_SPLIT:
        place = (split * tl.num_programs(0) + item).to(tl.int64) * (NUM_KV * GROUP) + lane
        tl.store(parts + place[:, None] * DIM + d[None, :], sums, mask=real)
        tl.store(tops + place, top, mask=offset < num_positions)
        tl.store(totals + place, total, mask=offset < num_positions)
    else:
        at = ((row + offset)[:, None] * (NUM_KV * GROUP) + lane[:, None]) * DIM + d[None, :]
        tl.store(out + at, (sums / total[:, None]).to(out.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["num_splits"], do_not_specialize_on_alignment=["items"])
def _join_parts(
    parts,  # as of `_attend_items`
    tops,
    totals,
    items,
    out,
    num_splits,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_WIDE: tl.constexpr,
    MOST: tl.constexpr,
):
    """One head of one item: the shares' sums, weighted to one maximum, over their total, in the order of shares."""
    item, head = tl.program_id(0), tl.program_id(1)
    num_items = tl.num_programs(0)
    row = tl.load(items + item * 3).to(tl.int64)
    d = tl.arange(0, DIM_WIDE)
    split = tl.arange(0, MOST)
    real = split < num_splits
    place = (split * num_items + item).to(tl.int64) * HEADS + head
    top = tl.load(tops + place, mask=real, other=float("-inf"))
    weight = tl.exp2(
        top - tl.max(top, 0)
    )  # the first share has seen a key, so the maximum is finite
    total = tl.sum(weight * tl.load(totals + place, mask=real, other=0.0), 0)
    wanted = real[:, None] & (d < DIM)[None, :]
    sums = tl.load(parts + place[:, None] * DIM + d[None, :], mask=wanted, other=0.0)
    joined = tl.sum(sums * weight[:, None], 0) / total
    tl.store(out + (row * HEADS + head) * DIM + d, joined.to(out.dtype.element_ty), mask=d < DIM)
