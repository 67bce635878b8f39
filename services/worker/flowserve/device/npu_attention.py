"""Attention over paged keys and values on the NPU: the calls of its operators, and what they allow.

`npu_fused_infer_attention_score_v2` in the two forms that its documentation describes without contradicting itself:
single rows of many sequences in one call, and a chunk of one prompt a call. Pages are [blocks, page, kv heads, D], keys
and values apart. This module must not know where a step's rows come from, nor graphs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch

from services.worker.flowserve.config import ModelConfig, ModelError
from services.worker.flowserve.decoder import Span
from services.worker.flowserve.device.accelerator import Rotary

PAGE: Final = 128  # what a prompt's pages are a multiple of
NUM_SPARE: Final = 2  # blocks for rows that nobody reads: each needs a slot of its own
_MAX_PAGE: Final = 512
_MAX_CONTEXT: Final = 262144
_MAX_ROW: Final = 65535  # values of all heads of a position
_INT32_MAX: Final = 2**31 - 1
_MASK_SIDE: Final = 2048  # of the one mask that all causal calls share
_CAUSAL, _BAND = (
    3,
    4,
)  # sparse modes: from the lower right corner; and not farther than `pre_tokens`
_FUSED_HEADS: Final = (64, 128)  # head sizes of the operator that rotates queries and keys at once


class Pages(NamedTuple):
    """A layer's keys and values, [blocks, page, kv heads, D] each."""

    keys: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True, slots=True)
class Seen:
    """What single rows may see of their sequences, from some page on.

    `table` int32 [rows, pages]; `lengths` count from its first page; `mask`, where windows begin within that, is True
    at positions before them, bool [rows, pages * page].
    """

    table: torch.Tensor
    lengths: Sequence[int]
    mask: torch.Tensor | None


class Within(NamedTuple):
    """How a single row sees its sequence through a window: from page `first` on, `length` positions, all but the first
    `hidden` of them."""

    first: int
    length: int
    hidden: int

    @classmethod
    def of(cls, span: Span, window: int | None, page: int) -> Within:
        """Pages that lie before the window as a whole are left out."""
        length = span.start + 1
        hidden = max(0, length - window) if window is not None else 0
        first = hidden // page
        return cls(first, length - first * page, hidden - first * page)


def num_pages(length: int, page: int) -> int:
    """Pages of so many positions."""
    return -(-length // page)


class PagedAttention:
    """The attention of one model's layers, which `check` has found to be one that the operators compute. `num_blocks`
    are there in all."""

    def __init__(self, config: ModelConfig, num_blocks: int, page: int, rotary: Rotary) -> None:
        self.page = page
        self.num_blocks = num_blocks
        self._num_heads = config.num_heads
        self._num_kv_heads = config.num_kv_heads
        # The factor that a stretched rotation puts on queries and keys alike: cosines must stay within -1 and 1.
        self._scale = config.head_dim**-0.5 * rotary.scale**2
        self._mask = torch.ones(_MASK_SIDE, _MASK_SIDE, dtype=torch.bool).triu(1).to(rotary.place)

    def single_rows(self, pages: Pages, q: torch.Tensor, seen: Seen) -> torch.Tensor:
        """q [B, H * D], a row of each sequence -> the same shape."""
        out, _ = torch.ops.npu.npu_fused_infer_attention_score_v2(
            q.unsqueeze(1),
            pages.keys.flatten(2),
            pages.values.flatten(2),
            atten_mask=seen.mask,
            actual_seq_kvlen=list(seen.lengths),
            block_table=seen.table,
            num_query_heads=self._num_heads,
            num_key_value_heads=self._num_kv_heads,
            softmax_scale=self._scale,
            input_layout="BSH",
            block_size=self.page,
        )
        rows: torch.Tensor = out.squeeze(1)
        return rows

    def chunk(
        self, pages: Pages, q: torch.Tensor, table: torch.Tensor, end: int, window: int | None
    ) -> torch.Tensor:
        """q [n, H * D], the rows before position `end` of one sequence, n > 1, and its table [1, pages] -> the same
        shape."""
        banded = window is not None and window < end
        band = {"pre_tokens": window - 1, "next_tokens": 0} if banded and window else {}
        out, _ = torch.ops.npu.npu_fused_infer_attention_score_v2(
            q.unsqueeze(0),
            pages.keys.flatten(2),
            pages.values.flatten(2),
            atten_mask=self._mask,
            sparse_mode=_BAND if banded else _CAUSAL,
            actual_seq_qlen=[len(q)],
            actual_seq_kvlen=[end],
            block_table=table,
            num_query_heads=self._num_heads,
            num_key_value_heads=self._num_kv_heads,
            softmax_scale=self._scale,
            input_layout="BSH",
            block_size=self.page,
            **band,
        )
        rows: torch.Tensor = out.squeeze(0)
        return rows

    def fits(self, lengths: Sequence[int]) -> bool:
        """Whether one call takes sequences of these lengths: pages that they share count for each ("blocknum不能小于根
        据actual_seq_kvlen和blockSize计算的每个batch的block数量之和")."""
        return sum(num_pages(length, self.page) for length in lengths) <= self.num_blocks


def write(pages: Pages, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
    """k and v [T, kv heads, D] into the pages; a slot is block * page + place, int32 [T], none of them twice."""
    torch.ops.npu.npu_scatter_pa_kv_cache(
        k.contiguous(), v.contiguous(), pages.keys, pages.values, slots, cache_mode="Norm"
    )


def rotate(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [T, H, D] and k [T, KH, D] turned by cos and sin [T, 1, D], whose halves are alike. May overwrite both."""
    q, k = q.contiguous(), k.contiguous()
    if q.shape[-1] in _FUSED_HEADS:
        q, k = torch.ops.npu.npu_apply_rotary_pos_emb(q, k, cos, sin, "TND", "half")
        return q, k
    turned = [
        torch.ops.npu.npu_rotary_mul(x.unsqueeze(0), cos.unsqueeze(0), sin.unsqueeze(0), "half")
        for x in (q, k)
    ]
    return turned[0].squeeze(0), turned[1].squeeze(0)


def rotation(
    rotary: Rotary, positions: torch.Tensor, last: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin), bf16 [T, 1, D] each, of the positions int32 [T], none of which is beyond `last`; without the factor
    that `PagedAttention` applies."""
    rotary.reach(last)
    cos, sin = (
        (half.index_select(0, positions) / rotary.scale).bfloat16().repeat(1, 2).unsqueeze(1)
        for half in (rotary.cos, rotary.sin)
    )
    return cos, sin


def check(config: ModelConfig, num_blocks: int, page: int) -> None:
    """Raises ModelError where the operators cannot compute the attention of a model, over `num_blocks` of sequences and
    the spare ones."""
    most = _INT32_MAX // (page * config.num_kv_heads * config.head_dim) - NUM_SPARE
    heads, kv_heads, size = config.num_heads, config.num_kv_heads, config.head_dim
    for holds, found in (
        (page % PAGE == 0 and page <= _MAX_PAGE, f"a KV page of {page}, no {PAGE} to {_MAX_PAGE}"),
        (size % 16 == 0 and size <= 512, f"heads of {size}, no multiple of 16 up to 512"),
        (heads <= 256 and config.group <= 64, f"{heads} heads, {config.group} of a key/value head"),
        (heads * size < _MAX_ROW, f"{heads} heads of {size}, {_MAX_ROW} together or more"),
        (kv_heads * size <= _MAX_ROW, f"{kv_heads} key/value heads of {size}, over {_MAX_ROW}"),
        (num_blocks <= most, f"{num_blocks} KV blocks, more than {most}"),
        (
            min(config.context, num_blocks * page) <= _MAX_CONTEXT,
            f"a context of {config.context}, over {_MAX_CONTEXT}",
        ),
    ):
        if not holds:
            raise ModelError(f"the NPU's attention does not take {found}")
