"""What a model demands of a machine: bytes to read for a decode step, operations for a prompt. Pure arithmetic.

Only the linear layers count. They are what cannot be avoided: a step reads each of their weights once, whatever the
batch, and multiplies each with every row. Attention, norms and the rest are overhead here, so a ratio to a limit of
the machine only gets worse by them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from services.worker.flowserve.config import ModelConfig

# int8, and a bfloat16 scale per 32 of them
_BYTES_PER_WEIGHT: Final = {"w8a8": 1 + 2 / 32, "fp32": 4.0, "bf16": 2.0}


@dataclass(frozen=True, slots=True)
class Work:
    """Weights of the linear layers: those that see every row, and the head's, which see only a prompt's last. Of
    experts, as many as one row goes through."""

    num_layer_weights: int
    num_head_weights: int

    @classmethod
    def of(cls, config: ModelConfig) -> Work:
        """What the model of this shape demands."""
        heads = config.num_heads + 2 * config.num_kv_heads
        qkv = config.width * heads * config.head_dim
        out = config.num_heads * config.head_dim * config.width
        mlps = sum(_mlp_weights(config, sparse=sparse) for sparse in config.sparse)
        return cls(config.num_layers * (qkv + out) + mlps, config.width * config.vocab)

    def bytes_per_step(self, dtype: str) -> float:
        """Weight bytes that a decode step reads."""
        return (self.num_layer_weights + self.num_head_weights) * _BYTES_PER_WEIGHT[dtype]

    def prefill_operations(self, num_tokens: int) -> int:
        """Operations of a prompt; a multiplication and its addition are two."""
        return 2 * (self.num_layer_weights * num_tokens + self.num_head_weights)

    def decode_roofline(self, tokens_per_s: float, dtype: str, bytes_per_s: float) -> float:
        """Decode at batch 1, as a share of what reading the weights alone allows."""
        return tokens_per_s / (bytes_per_s / self.bytes_per_step(dtype))

    def prefill_roofline(self, num_tokens: int, seconds: float, peak: float) -> float:
        """Operations per second of a prompt, as a share of the peak of a plain matrix product."""
        return self.prefill_operations(num_tokens) / seconds / peak


def _mlp_weights(config: ModelConfig, *, sparse: bool) -> int:
    """Of one layer, without the router: it is small, and no matrix product everywhere."""
    moe, hidden = config.moe, config.hidden
    if moe is not None and sparse:
        hidden = moe.num_chosen * moe.hidden + (moe.shared_hidden or 0)
    return 3 * config.width * hidden
