"""The paged KV cache in torch: keys and values of all layers in blocks of `page` positions, addressed by block number.

Who owns a block is the engine's ledger (`rtc/`); this module must not know sequences. One block more than asked
for is kept and stays zero: it pads block tables.
"""

from __future__ import annotations

import torch

from services.worker.flowserve.config import ModelConfig


class KVCache:
    """`layers[i]` is [num_blocks + 1, 2 * num_kv_heads, page, head_dim]: the key heads, then the value heads. Zeroed.

    A (block, head) pair is one contiguous [page, head_dim] matrix, so a tile of several blocks is gathered by rows into
    a contiguous operand of a matrix product.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        page: int = 16,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (config.num_layers, num_blocks + 1, 2 * config.num_kv_heads, page, config.head_dim)
        self.layers = tuple(torch.zeros(shape, dtype=dtype))
        self.num_blocks = num_blocks
        self.page = page

    @property
    def null_block(self) -> int:
        """The number of the block that pads tables; never written."""
        return self.num_blocks


def bytes_per_block(config: ModelConfig, page: int = 16, dtype: torch.dtype = torch.float32) -> int:
    """Memory of one block over all layers."""
    return config.kv_bytes(page, dtype.itemsize)
