"""A step's rows on a CUDA device: where they are, where their keys and values go, and attention over pages in plain
torch.

The attention here gathers the pages that a row may see and hands them to torch's own product: what Triton's kernels
(`paged_kernels.py`) are held against, and what computes where these cannot run. A plan keeps what it says in tensors
of fixed size, so that one and the same may be made for a step or filled anew for each replay of a graph. This module
must not know projections, sampling, or who owns a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as functional

from services.worker.flowserve.config import ModelConfig
from services.worker.flowserve.decoder import Span, Splice
from services.worker.flowserve.device import cells
from services.worker.flowserve.device.accelerator import Rotary, host_tensor, pages_of, upload
from services.worker.flowserve.device.cpu_kv import bytes_per_block
from services.worker.flowserve.pic import Angles

NUM_SPARE: Final = 1  # blocks that are nobody's
_GATHERED_AT_ONCE: Final = (
    1 << 26
)  # elements of keys and values, or of scores, of one call of attention

Ints = npt.NDArray[np.int32]


class PagedKV:
    """A `KV` whose layers are [num_blocks + NUM_SPARE, 2 * num_kv_heads, page, D]: the key heads, then the value heads.

    The last block is nobody's: rows that only fill up a graph write there, and what pads a block table reads there.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        page: int,
        dtype: torch.dtype,
        place: torch.device,
    ) -> None:
        self.config = config
        self.num_blocks = num_blocks
        self.page = page
        self.place = place
        self.rotation = Rotary(config, place)
        self._bytes = bytes_per_block(config, page, dtype)
        shape = (num_blocks + NUM_SPARE, 2 * config.num_kv_heads, page, config.head_dim)
        self.layers = [
            torch.zeros(shape, dtype=dtype, device=place) for _ in range(config.num_layers)
        ]

    @property
    def spare_block(self) -> int:
        """The number of the block that is nobody's."""
        return self.num_blocks

    def plan(self, spans: Sequence[Span]) -> PagedPlan:
        """See `KV`."""
        self.enter()
        num_pages = max(pages_of(span, self.page) for span in spans)
        plan = self.new_plan(sum(span.length for span in spans), len(spans), num_pages)
        plan.fill(spans)
        return plan

    def decode_plan(self, num_rows: int, num_pages: int) -> PagedPlan:
        """See `KV`."""
        self.enter()
        return self.new_plan(num_rows, num_rows, num_pages)

    def new_plan(self, num_rows: int, num_spans: int, num_pages: int) -> PagedPlan:
        """An empty plan of that size."""
        return PagedPlan(self, num_rows, num_spans, num_pages)

    def enter(self) -> None:
        """Make the place the current device of this thread, which may be another than the one that opened it."""
        if self.place.type == "cuda":
            torch.cuda.set_device(self.place)

    def read_blocks(self, blocks: Sequence[int]) -> npt.NDArray[np.uint8]:
        """See `KV`: [layer][key heads, value heads][page][D] of each block."""
        self.enter()
        host = host_tensor((len(blocks), self._bytes), torch.uint8, self.place)
        index = upload(np.array(blocks, np.int64), self.place)
        parts = [x.index_select(0, index).view(torch.uint8).flatten(1) for x in self.layers]
        host.copy_(torch.cat(parts, dim=1), non_blocking=True)
        wait(self.place)
        data: npt.NDArray[np.uint8] = host.numpy()
        return data

    def write_blocks(self, blocks: Sequence[int], data: npt.NDArray[np.uint8]) -> None:
        """See `KV`. The copy may still be under way at the return; what is computed afterwards comes after it."""
        self.enter()
        index = upload(np.array(blocks, np.int64), self.place)
        parts = upload(data, self.place).chunk(len(self.layers), dim=1)
        for layer, part in zip(self.layers, parts, strict=True):
            values = part.contiguous().view(layer.dtype).view(-1, *layer.shape[1:])
            layer.index_copy_(0, index, values)

    def splice(self, splice: Splice, angles: Angles) -> None:
        """See `SplicingKV`."""
        self.enter()
        cells.move(self.layers, self.page, splice, angles, self.place)


class PagedPlan:
    """A `DecodePlan`, and the `Plan` of any step: of up to `num_rows` rows of `num_spans` sequences, each of up to
    `num_pages` pages.

    Of row t: `positions[t]`, and `cells[t]`, the place of its keys and values counted in tokens of the whole cache.
    `tables` are int32 [num_spans, num_pages]. All three are views of one tensor, so that they cross to the device in
    one copy. Rows and spans beyond those filled in are at position 0 of the spare block.
    """

    def __init__(self, kv: PagedKV, num_rows: int, num_spans: int, num_pages: int) -> None:
        self.kv = kv
        self.num_rows = num_rows
        self.num_pages = num_pages
        config, place = kv.config, kv.place
        sizes = [num_rows, num_rows, num_spans * num_pages]
        self._host = host_tensor((sum(sizes),), torch.int32, place)
        self._inputs = torch.empty(sum(sizes), dtype=torch.int32, device=place)
        (host_positions, host_cells, host_tables), (self.positions, self.cells, tables) = (
            torch.split(x, sizes) for x in (self._host, self._inputs)
        )
        self._host_positions: Ints = host_positions.numpy()
        self._host_cells: Ints = host_cells.numpy()
        self._host_tables: Ints = host_tables.view(num_spans, num_pages).numpy()
        self._host_positions[:] = 0
        self._host_cells[:] = kv.spare_block * kv.page
        self._host_tables[:] = kv.spare_block
        self.tables = tables.view(num_spans, num_pages)
        self._known: list[Sequence[int]] = [()] * num_spans  # the tables that the host's hold
        self.spans: list[Span] = []
        self._parts: list[tuple[slice, slice, int]] = []
        self.cos = torch.empty((num_rows, config.head_dim // 2), device=place)
        self.sin = torch.empty_like(self.cos)
        self._slots = torch.empty(
            (num_rows, 2 * config.num_kv_heads), dtype=torch.int64, device=place
        )

    def fill(self, spans: Sequence[Span]) -> bool:
        """See `DecodePlan`; of a plan for a step, the spans may be of any length."""
        kv = self.kv
        page = kv.page
        if any(pages_of(span, page) > self.num_pages for span in spans):
            return False
        kv.enter()
        tables = [span.table[: pages_of(span, page)] for span in spans]
        for index in range(len(self._known)):
            self._set_table(index, tables[index] if index < len(tables) else ())
        lengths = [span.length for span in spans]
        num_rows = sum(lengths)
        owners = np.repeat(np.arange(len(spans)), lengths)
        # A row's position is its number less that of its span's first row, which is at the span's start.
        ahead = np.cumsum(lengths, dtype=np.int64) - lengths - [span.start for span in spans]
        positions = np.arange(num_rows) - ahead[owners]
        blocks = self._host_tables[owners, positions // page]
        self._host_positions[:num_rows] = positions
        self._host_cells[:num_rows] = blocks * page + positions % page
        self._host_positions[num_rows:] = 0
        self._host_cells[num_rows:] = kv.spare_block * page
        self.spans = list(spans)
        self._inputs.copy_(self._host, non_blocking=True)
        self.prepare()
        return True

    def prepare(self) -> None:
        """Work out on the device what all layers share."""
        self._gather_rotation()
        kv = self.kv
        cells, num_heads = self.cells.long(), 2 * kv.config.num_kv_heads
        firsts = cells // kv.page * (num_heads * kv.page) + cells % kv.page
        heads = torch.arange(num_heads, device=kv.place) * kv.page
        torch.add(firsts.unsqueeze(1), heads, out=self._slots)
        self._parts = list(self._partition())

    def _gather_rotation(self) -> None:
        rotation = self.kv.rotation
        rotation.reach(int(self._host_positions.max()))
        torch.index_select(rotation.cos, 0, self.positions, out=self.cos)
        torch.index_select(rotation.sin, 0, self.positions, out=self.sin)

    def rotate(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Plan`."""
        cos, sin = self.cos.unsqueeze(1), self.sin.unsqueeze(1)
        return _rotate(q, cos, sin), _rotate(k, cos, sin)

    def write(self, layer: Any, k: torch.Tensor, v: torch.Tensor) -> None:
        """See `Plan`."""
        head_dim = self.kv.config.head_dim
        rows = torch.cat((k, v), dim=1).view(-1, head_dim).to(layer.dtype)
        layer.view(-1, head_dim).index_copy_(0, self._slots.flatten(), rows)

    def attend(self, layer: Any, q: torch.Tensor, window: int | None) -> torch.Tensor:
        """See `Plan`."""
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for rows, spans, num_pages in self._parts:
            tables = self.tables[spans, :num_pages]
            queries = q[rows].view(len(tables), -1, *q.shape[1:])
            positions = self.positions[rows].view(len(tables), -1)
            out[rows] = attend_gathered(layer, queries, tables, positions, window).flatten(0, 1)
        return out.flatten(1)

    def _partition(self) -> Iterator[tuple[slice, slice, int]]:
        """Rows, their spans, and the pages that these may see, for one call of attention each: single rows that follow
        one another, and rows of one prompt, not too many at once."""
        kv, config = self.kv, self.kv.config
        per_page = kv.page * 2 * config.num_kv_heads * config.head_dim
        if self.num_rows == len(self.tables):  # of a graph too, whose spans come and go
            at_once = max(1, _GATHERED_AT_ONCE // (self.num_pages * per_page))
            for begin in range(0, self.num_rows, at_once):
                rows = slice(begin, min(begin + at_once, self.num_rows))
                yield rows, rows, self.num_pages
            return
        row = 0
        for index, span in enumerate(self.spans):
            num_keys = pages_of(span, kv.page) * kv.page
            at_once = max(1, _GATHERED_AT_ONCE // (num_keys * config.num_heads))
            for begin in range(0, span.length, at_once):
                end = min(begin + at_once, span.length)
                num_pages = -(-(span.start + end) // kv.page)
                yield slice(row + begin, row + end), slice(index, index + 1), num_pages
            row += span.length

    def _set_table(self, index: int, table: Sequence[int]) -> None:
        """Write row `index` of the host's tables. A sequence that goes on only adds to it: a list compares faster than
        it turns into numbers."""
        known = self._known[index]
        begin = len(known)
        if begin > len(table) or known != table[:begin]:
            begin = 0
            self._host_tables[index] = self.kv.spare_block
        self._host_tables[index, begin : len(table)] = table[begin:]
        self._known[index] = table


def attend_gathered(
    layer: torch.Tensor,
    queries: torch.Tensor,
    tables: torch.Tensor,
    positions: torch.Tensor,
    window: int | None,
) -> torch.Tensor:
    """Causal attention of M rows of each of B sequences: queries [B, M, H, D] at positions [B, M], over the pages
    tables [B, P] of layer [blocks, 2 * KH, page, D] -> [B, M, H * D]'s heads, [B, M, H, D].

    What lies beyond a sequence's last row is not its own and may be no number, which a weight of zero would not hide.
    """
    pages = layer[tables]  # [B, P, 2 * KH, page, D]
    cells = torch.arange(tables.shape[1] * pages.shape[3], device=layer.device)  # [P * page]
    beyond = (cells > positions[:, -1:]).view(*tables.shape, 1, -1, 1)
    pages.masked_fill_(beyond, 0)
    keys, values = pages.transpose(1, 2).flatten(2, 3).chunk(2, dim=1)  # [B, KH, P * page, D]
    query_at = positions.unsqueeze(-1)
    seen = cells <= query_at  # [B, M, P * page]
    if window is not None:
        seen &= cells > query_at - window
    attended = functional.scaled_dot_product_attention(
        queries.transpose(1, 2).to(layer.dtype),
        keys,
        values,
        attn_mask=seen.unsqueeze(1),
        enable_gqa=True,
    )
    return attended.transpose(1, 2)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [T, heads, D], cos and sin fp32 [T, 1, D / 2] -> x turned in the pairs (i, i + D / 2), in fp32 between."""
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x.dtype)


def wait(place: torch.device) -> None:
    """Until all is computed and copied."""
    if place.type == "cuda":
        torch.cuda.current_stream(place).synchronize()
