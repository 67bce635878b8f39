"""Paged attention against a dense reference, and its last resort of one block size."""

from __future__ import annotations

import random

import pytest
import torch

from services.worker.flowserve.config import ModelConfig
from services.worker.flowserve.decoder import Span
from services.worker.flowserve.device.cpu_attention import AttentionPlan, BlockSizes
from services.worker.flowserve.device.cpu_kv import KVCache, bytes_per_block

CONFIG = ModelConfig.from_dict(
    {
        "architectures": ["MistralForCausalLM"],
        "hidden_size": 96,
        "intermediate_size": 32,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "num_hidden_layers": 1,
        "max_position_embeddings": 512,
        "vocab_size": 32,
        "sliding_window": 100,
    }
)
SIZES = {"measured": BlockSizes.measure(CONFIG), "last-resort": BlockSizes(8, 1)}
# (rows already cached, rows in this step) of each sequence: decode, short and long chunks, tile edges.
STEP = [(0, 1), (63, 1), (64, 1), (200, 1), (0, 70), (30, 33), (128, 5), (95, 2)]


class _Paged:
    """Random queries, keys and values of some sequences, the keys and values also laid out in a paged cache."""

    def __init__(self, lengths: list[int]) -> None:
        generator = torch.Generator().manual_seed(3)
        per_row = CONFIG.num_heads + 2 * CONFIG.num_kv_heads
        self.rows = [
            torch.randn(length, per_row, CONFIG.head_dim, generator=generator) for length in lengths
        ]
        self.kv = KVCache(CONFIG, num_blocks=128)
        free = list(range(128))
        random.Random(0).shuffle(free)
        self.tables = [[free.pop() for _ in range(-(-length // 16))] for length in lengths]

    def attend(self, step: list[tuple[int, int, int]], sizes: BlockSizes) -> list[torch.Tensor]:
        """One step of (sequence, start, length) parts, written and attended -> a result per part."""
        spans = [Span(start, length, self.tables[index]) for index, start, length in step]
        rows = torch.cat([self.rows[index][start : start + n] for index, start, n in step])
        plan = AttentionPlan(CONFIG, spans, self.kv, sizes)
        plan.write(self.kv.layers[0], *rows[:, CONFIG.num_heads :].chunk(2, dim=1))
        result = plan.attend(self.kv.layers[0], rows[:, : CONFIG.num_heads], 100)
        return list(result.split([length for _, _, length in step]))

    def dense(self, index: int) -> torch.Tensor:
        """The whole sequence by the textbook, in double precision."""
        q, k, v = self.rows[index].double().split((6, 2, 2), dim=1)
        k, v = (x.repeat_interleave(CONFIG.group, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * CONFIG.head_dim**-0.5
        at = torch.arange(q.shape[0])
        behind = at.unsqueeze(1) - at
        scores.masked_fill_((behind < 0) | (behind >= 100), -torch.inf)
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1).float()


@pytest.mark.parametrize("sizes", SIZES)
def test_equals_dense_attention(sizes: str) -> None:
    """A mixed step of decode rows and prompt chunks gives each row the dense, windowed result."""
    paged = _Paged([start + length for start, length in STEP])
    paged.attend([(i, 0, start) for i, (start, _) in enumerate(STEP) if start], SIZES[sizes])
    results = paged.attend([(i, start, n) for i, (start, n) in enumerate(STEP)], SIZES[sizes])
    for index, (start, _) in enumerate(STEP):
        torch.testing.assert_close(results[index], paged.dense(index)[start:], rtol=0, atol=2e-6)


@pytest.mark.parametrize("sizes", SIZES)
def test_rows_keep_their_bits(sizes: str) -> None:
    """Each row of a mixed step has the very bits it has when its sequence is attended alone and whole."""
    paged = _Paged([start + length for start, length in STEP])
    alone = [
        paged.attend([(i, 0, start + n)], SIZES[sizes])[0] for i, (start, n) in enumerate(STEP)
    ]
    together = paged.attend([(i, start, n) for i, (start, n) in enumerate(STEP)], SIZES[sizes])
    for (start, _), whole, part in zip(STEP, alone, together, strict=True):
        assert torch.equal(whole[start:], part)


@pytest.mark.parametrize("sizes", SIZES)
def test_what_a_block_held_before_stays_unseen(sizes: str) -> None:
    """Not even what is no number leaks out of cells that a sequence has not written."""
    paged = _Paged([start + length for start, length in STEP])
    paged.kv.layers[0][: paged.kv.null_block] = torch.nan
    for index, (start, length) in enumerate(STEP):
        (found,) = paged.attend([(index, 0, start + length)], SIZES[sizes])
        torch.testing.assert_close(found, paged.dense(index), rtol=0, atol=2e-6)


def test_a_page_must_divide_the_tile() -> None:
    """A page size that the tile cannot be cut into is refused."""
    kv = KVCache(CONFIG, num_blocks=1, page=48)
    with pytest.raises(ValueError, match="48"):
        AttentionPlan(CONFIG, [Span(0, 1, [0])], kv, SIZES["measured"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_bytes_are_what_is_allocated(dtype: torch.dtype) -> None:
    """`bytes_per_block` is exact, but for the one spare block."""
    kv = KVCache(CONFIG, num_blocks=7, dtype=dtype)
    allocated = sum(layer.nbytes for layer in kv.layers)
    assert allocated == 8 * bytes_per_block(CONFIG, 16, dtype)
