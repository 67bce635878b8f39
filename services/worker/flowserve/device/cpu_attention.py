"""Batch-invariant attention over the paged KV cache, in plain torch.

A row's bits must not depend on its batch mates, on how its prompt was cut into chunks, or on whether its prefix came
from the cache. So nothing that is summed may take its length or order from the batch:

- Keys and values are read in tiles of `KV_TILE` positions, counted from position 0 of the sequence. Every product is
  one tile against one block of query rows: [M, head_dim] x [head_dim, KV_TILE], and back. The batch decides only *how
  many* such products a call holds, and for how many tiles a short sequence is padded.
- The row maximum is exact in any order. Tile sums are added in tile order, one after the other; a tile that is masked
  whole adds exact zeros, so padding changes nothing.
- BLAS has other kernels, with other sums, for a few rows than for many. `BlockSizes.measure` finds two values of M, for
  decode and for prompts, between which a row's bits agree on this machine, and falls back to a single M.

This module must not know projections, sampling, or who owns a block.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from services.worker.flowserve.config import ModelConfig
from services.worker.flowserve.decoder import Span
from services.worker.flowserve.device.cpu_kv import KVCache

KV_TILE = 64
QUERY_TILE = 32  # positions of a prompt that share one read of the keys
_SCORES_AT_ONCE = 1 << 19  # elements: 2 MiB stay in cache; a larger step goes in several groups


@dataclass(frozen=True, slots=True)
class _Item:
    """Up to one query tile of consecutive rows of one span."""

    span: int
    row: int  # of the step
    position: int
    length: int

    @property
    def num_tiles(self) -> int:
        return (self.position + self.length - 1) // KV_TILE + 1


@dataclass(frozen=True, slots=True)
class _Group:
    """Items that go through the same calls: I of them, of P positions, in T tiles and B = I * num_kv_heads matrices of
    M rows.

    `query_index` [B * M] picks rows of the queries, seen as [rows * num_heads, head_dim]; `kv_index`
    [2 * T * B * blocks per tile] picks rows of the pages, seen as [blocks * 2 * num_kv_heads, page * head_dim].
    `beyond` [T, B, KV_TILE, 1] are the cells that the sequence has not written: another may have left there what is no
    number, which times zero is none either.
    `masks`, by window, are 0 or -inf, [T, I, 1, P, 1, KV_TILE]; `mask_shape` is the scores' [T, I, kv heads, P, M / P,
    KV_TILE] that they broadcast to.
    """

    num_tiles: int
    num_matrices: int
    query_index: torch.Tensor
    kv_index: torch.Tensor
    beyond: torch.Tensor
    masks: dict[int | None, torch.Tensor]
    mask_shape: tuple[int, ...]


class AttentionPlan:
    """Where a step's rows are read and written: computed once, used by every layer."""

    def __init__(
        self, config: ModelConfig, spans: Sequence[Span], kv: KVCache, sizes: BlockSizes
    ) -> None:
        if KV_TILE % kv.page:
            raise ValueError(f"a page of {kv.page} does not divide the tile of {KV_TILE} positions")
        self._config = config
        self._page = kv.page
        self._sizes = sizes
        self._num_rows = sum(span.length for span in spans)
        tables = _pad_tables(spans, kv)
        self._slots = self._slot_index(spans)
        self._groups: list[_Group] = []
        # Where the result of (row, head) lies among the groups' results, which are laid end to end.
        self._places = torch.empty(self._num_rows * config.num_heads, dtype=torch.int64)
        base = 0
        for items, num_positions in self._partition(spans):
            base += self._add_group(items, num_positions, tables, base)

    def write(self, layer: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Stores k (rotated) and v [rows, num_kv_heads, head_dim] in this layer's blocks."""
        head_dim = self._config.head_dim
        rows = torch.cat((k, v), dim=1).view(-1, head_dim)
        layer.view(-1, head_dim).index_copy_(0, self._slots, rows.to(layer.dtype))

    def attend(self, layer: torch.Tensor, q: torch.Tensor, window: int | None) -> torch.Tensor:
        """q [rows, num_heads, head_dim] (rotated), layer as written -> [rows, num_heads * head_dim] fp32."""
        head_dim = self._config.head_dim
        queries = q.reshape(-1, head_dim)
        pages = layer.view(-1, self._page * head_dim)
        parts = [self._attend_group(group, queries, pages, window) for group in self._groups]
        joined = parts[0] if len(parts) == 1 else torch.cat(parts)
        return joined.index_select(0, self._places).view(self._num_rows, -1)

    def _attend_group(
        self, group: _Group, queries: torch.Tensor, pages: torch.Tensor, window: int | None
    ) -> torch.Tensor:
        head_dim, num_matrices = self._config.head_dim, group.num_matrices
        gathered = pages.index_select(0, group.kv_index).float()
        gathered = gathered.view(2, group.num_tiles, num_matrices, KV_TILE, head_dim)
        keys, values = gathered.masked_fill_(group.beyond, 0.0)
        q = queries.index_select(0, group.query_index).view(num_matrices, -1, head_dim)  # [B, M, D]
        scores = q.new_empty(group.num_tiles, num_matrices, q.shape[1], KV_TILE)  # [T, B, M, 64]
        for tile, k in zip(scores, keys, strict=True):
            tile.baddbmm_(q, k.mT, beta=0, alpha=head_dim**-0.5)
        scores.view(group.mask_shape).add_(group.masks[window])
        top = scores.amax(-1).amax(0)  # [B, M], finite: a row sees at least itself
        scores.sub_(top.unsqueeze(-1)).exp_()
        totals = scores.sum(-1).cumsum(0)[-1]  # a running sum: in tile order, whatever their number
        out = torch.bmm(scores[0], values[0])  # [B, M, D]
        for p, v in zip(scores[1:], values[1:], strict=True):
            out.baddbmm_(p, v)
        return out.div_(totals.unsqueeze(-1)).view(-1, head_dim)

    def _slot_index(self, spans: Sequence[Span]) -> torch.Tensor:
        """For each (row, key or value head) its row in the cache seen as [blocks * 2 * num_kv_heads * page, D]."""
        page, num_heads = self._page, 2 * self._config.num_kv_heads
        firsts = [
            span.table[position // page] * num_heads * page + position % page
            for span in spans
            for position in range(span.start, span.start + span.length)
        ]
        heads = torch.arange(num_heads) * page
        return (torch.tensor(firsts).unsqueeze(1) + heads).flatten()

    def _partition(self, spans: Sequence[Span]) -> Iterable[tuple[list[_Item], int]]:
        """Groups of items of like size and length, each small enough that its scores stay in cache."""
        singles: list[_Item] = []
        tiles: list[_Item] = []
        row = 0
        for index, span in enumerate(spans):
            size = 1 if span.length == 1 else self._sizes.tile
            for offset in range(0, span.length, size):
                length = min(size, span.length - offset)
                item = _Item(index, row + offset, span.start + offset, length)
                (singles if size == 1 else tiles).append(item)
            row += span.length
        for items, num_positions in ((singles, 1), (tiles, self._sizes.tile)):
            num_rows = num_positions * self._heads_of(num_positions)
            per_tile = self._config.num_kv_heads * num_rows * KV_TILE
            items.sort(key=lambda item: item.num_tiles)
            for _, like in groupby(
                items, key=lambda item: max(2, (item.num_tiles - 1).bit_length())
            ):
                alike = list(like)
                at_once = max(1, _SCORES_AT_ONCE // (per_tile * alike[-1].num_tiles))
                for first in range(0, len(alike), at_once):
                    yield alike[first : first + at_once], num_positions

    def _heads_of(self, num_positions: int) -> int:
        """Rows per position: the query heads that share a key/value head, and spare ones beside a single position."""
        return self._config.group if num_positions > 1 else self._sizes.single_heads

    def _add_group(
        self, items: list[_Item], num_positions: int, tables: torch.Tensor, base: int
    ) -> int:
        """Plans one group and returns its number of result rows. Spare rows repeat a real one and go nowhere."""
        config = self._config
        group, num_kv_heads, per_head = (
            config.group,
            config.num_kv_heads,
            self._heads_of(num_positions),
        )
        num_items, num_tiles = len(items), items[-1].num_tiles
        spans, rows, positions, lengths = torch.tensor(
            [(item.span, item.row, item.position, item.length) for item in items]
        ).unbind(1)

        # Query rows, [I, kv head, P, head of the group].
        offsets = torch.arange(num_positions)
        real = offsets < lengths.unsqueeze(1)  # [I, P]
        offsets = torch.minimum(offsets, lengths.unsqueeze(1) - 1)
        row_of = (rows.unsqueeze(1) + offsets).view(num_items, 1, num_positions, 1)
        in_group = torch.arange(per_head).clamp_max(group - 1)
        head_of = torch.arange(num_kv_heads).view(-1, 1, 1) * group + in_group
        query_index = row_of * config.num_heads + head_of
        place = torch.arange(query_index.numel()).view(query_index.shape)
        wanted = real.view(num_items, 1, num_positions, 1) & (torch.arange(per_head) < group)
        wanted = wanted.expand(query_index.shape)
        self._places[query_index[wanted]] = base + place[wanted]

        # Cache rows, [keys or values, T, I, kv head, block of the tile].
        per_tile = KV_TILE // self._page
        blocks = tables[spans, : num_tiles * per_tile].view(num_items, num_tiles, 1, per_tile)
        head = torch.arange(2 * num_kv_heads).view(2, 1, 1, num_kv_heads, 1)
        kv_index = blocks.transpose(0, 1) * (2 * num_kv_heads) + head

        # What a position may see: itself and before, within the window.
        key_at = torch.arange(num_tiles * KV_TILE).view(num_tiles, 1, 1, KV_TILE)
        query_at = (positions.unsqueeze(1) + offsets).unsqueeze(-1)  # [I, P, 1]
        ends = (positions + lengths).view(1, num_items, 1, 1)
        beyond = (key_at >= ends).expand(-1, -1, num_kv_heads, -1)  # [T, I, kv heads, KV_TILE]
        masks = {}
        for window in set(config.windows):
            seen = key_at <= query_at
            if window is not None:
                seen &= key_at > query_at - window
            mask = torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf)
            masks[window] = mask.view(num_tiles, num_items, 1, num_positions, 1, KV_TILE)
        self._groups.append(
            _Group(
                num_tiles,
                num_items * num_kv_heads,
                query_index.flatten(),
                kv_index.flatten(),
                beyond.reshape(num_tiles, -1, KV_TILE, 1),
                masks,
                (num_tiles, num_items, num_kv_heads, num_positions, per_head, KV_TILE),
            )
        )
        return query_index.numel()


@dataclass(frozen=True, slots=True)
class BlockSizes:
    """How many query rows of one key/value head a product holds: `single_heads` for one position (its group of query
    heads, filled up), or those of `tile` positions together."""

    single_heads: int
    tile: int

    @classmethod
    def measure(cls, config: ModelConfig) -> BlockSizes:
        """The fastest sizes under which this machine's BLAS gives a row the same bits in both, and at every place.

        The last resort is a tile of 1: then all products have one shape and a row one place in it, which needs no more
        than that equal calls give equal bits. Prefill then reads the keys anew for each position.
        """
        many = QUERY_TILE * config.group
        for step in (4, 8):
            few = -(-config.group // step) * step
            if _same_bits(few, many, config.head_dim):
                return cls(few, QUERY_TILE)
        return cls(few, 1)


def _same_bits(few: int, many: int, head_dim: int) -> bool:
    """Whether products of `few` rows, at any place in a batch of any size, equal those rows of a product of `many`."""
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(many + few, head_dim, generator=generator)
    weights = torch.rand(many + few, KV_TILE, generator=generator)
    tile = torch.randn(KV_TILE, head_dim, generator=generator)

    def products(first: int, num_rows: int, count: int) -> torch.Tensor:
        """The last of `count` equal products of both kinds, [num_rows, KV_TILE + head_dim]."""
        q, p, kv = (
            x.expand(count, -1, -1).contiguous()
            for x in (queries[first : first + num_rows], weights[first : first + num_rows], tile)
        )
        scores = q.new_empty(count, num_rows, KV_TILE)
        scores.baddbmm_(q, kv.mT, beta=0, alpha=head_dim**-0.5)
        return torch.cat((scores, torch.bmm(p, kv).baddbmm_(p, kv)), dim=-1)[-1]

    expected = products(0, many, 1)
    return all(
        torch.equal(expected[first : first + few], products(first, few, count))
        for first in range(0, many - few + 1, few)
        for count in (1, 2, 3, 16)
    ) and torch.equal(expected[few // 2 :], products(few // 2, many, 3)[: many - few // 2])


def _pad_tables(spans: Sequence[Span], kv: KVCache) -> torch.Tensor:
    """Block tables int64 [spans, blocks of the longest, up to a whole tile], padded with the null block."""
    per_tile = KV_TILE // kv.page
    num_tiles = max((span.start + span.length - 1) // KV_TILE + 1 for span in spans)
    tables = torch.full((len(spans), num_tiles * per_tile), kv.null_block)
    for index, span in enumerate(spans):
        num_blocks = (span.start + span.length - 1) // kv.page + 1
        tables[index, :num_blocks] = torch.tensor(span.table[:num_blocks])
    return tables
