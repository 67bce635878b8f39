"""The decoder in eager torch: one definition for the Llama family (Llama, SmolLM2, Mistral, Qwen2, Qwen3 dense).

It serves fp32 and bf16, is W8A8's reference, and W8A8 itself where the native kernels cannot run. A step's rows are
(sequence, position) pairs of any mix of sequences, decode rows and prompt chunks alike. Everything but attention works
row by row; all values between the products are fp32. In `w8a8` every row's result is independent of the other rows,
bit for bit: the integer products are exact, the norms reduce one row at a time, and element-wise work uses only
operations that round alike in a vector's body and in its tail (which rules out `silu`, `sigmoid` and fused
multiply-adds). This module must not know requests, sampling, or who owns which block.
"""

from __future__ import annotations

from pathlib import Path

import torch

from services.worker.flowserve.attention import AttentionPlan, BlockSizes
from services.worker.flowserve.checkpoint import Checkpoint
from services.worker.flowserve.config import ModelConfig, ModelError
from services.worker.flowserve.decoder import Floats, Span, StepInput
from services.worker.flowserve.kv import KVCache, bytes_per_block
from services.worker.flowserve.prepared import open_prepared
from services.worker.flowserve.rope import RotaryTable
from services.worker.flowserve.torch_weights import Layer, Weights, from_checkpoint, from_prepared

_FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16}


class TorchDecoder:
    """A `decoder.Decoder`. `dtype` is w8a8, fp32 or bf16; keys and values are fp32 in fp32, else bfloat16."""

    def __init__(self, config: ModelConfig, weights: Weights, dtype: str) -> None:
        self.config = config
        self._weights = weights
        self._dtype = dtype
        self._kv_dtype = torch.float32 if dtype == "fp32" else torch.bfloat16
        self._kv: KVCache | None = None
        self._rotary = RotaryTable(config)
        self._block_sizes = BlockSizes.measure(config)

    @classmethod
    def load(cls, folder: Path, *, dtype: str, cache_dir: Path) -> TorchDecoder:
        """Reads a model folder in Hugging Face form; W8A8 comes from prepared weights below `cache_dir`. Raises
        ModelError naming the architecture, key or tensor at fault."""
        if dtype == "w8a8":
            prepared = open_prepared(folder, cache_dir)
            return cls(prepared.config, from_prepared(prepared), dtype)
        if dtype not in _FLOATS:
            raise ModelError(f"unknown dtype {dtype!r}; served are w8a8, {', '.join(_FLOATS)}")
        config = ModelConfig.from_folder(folder)
        return cls(config, from_checkpoint(config, Checkpoint(folder), _FLOATS[dtype]), dtype)

    @property
    def description(self) -> str:
        """What computes, in a few words."""
        return f"torch, {self._dtype}, {torch.get_num_threads()} threads"

    @property
    def timings(self) -> dict[str, float]:
        """Nobody measures here."""
        return {}

    def bytes_per_block(self, page: int) -> int:
        """Memory of one KV block of `page` positions over all layers."""
        return bytes_per_block(self.config, page, self._kv_dtype)

    def allocate(self, num_blocks: int, page: int) -> None:
        """Makes the KV cache."""
        self._kv = KVCache.allocate(
            self.config, num_blocks=num_blocks, page=page, dtype=self._kv_dtype
        )

    @torch.inference_mode()
    def forward(self, step: StepInput) -> Floats:
        """Computes the rows of `step`, stores their keys and values, and returns logits fp32
        [len(step.sample_rows), vocab]."""
        assert self._kv is not None, "allocate comes first"
        weights, eps = self._weights, self.config.norm_eps
        plan = AttentionPlan(self.config, step.spans, self._kv, self._block_sizes)
        cos, sin = self._rotation(step.spans)  # [T, 1, D] each
        x = weights.embed(step.tokens)  # [T, width]
        for layer, cache in zip(weights.layers, self._kv.layers, strict=True):
            h = rms_norm(x, layer.attention_norm, eps)
            x = x + self._attend(layer, h, plan, cos, sin, cache)
            h = rms_norm(x, layer.mlp_norm, eps)
            x = x + layer.down(swiglu(layer.gate_up(h)))
        if not step.sample_rows:
            return torch.empty(0, self.config.vocab).numpy()
        x = x[torch.tensor(step.sample_rows)]  # [S, width]
        logits: Floats = weights.head(rms_norm(x, weights.norm, eps)).numpy()
        return logits

    def _attend(
        self,
        layer: Layer,
        x: torch.Tensor,
        plan: AttentionPlan,
        cos: torch.Tensor,
        sin: torch.Tensor,
        cache: torch.Tensor,
    ) -> torch.Tensor:
        """x [T, width] -> [T, width]."""
        config = self.config
        num_rotated = config.num_heads + config.num_kv_heads
        qkv = layer.qkv(x).view(x.shape[0], -1, config.head_dim)  # [T, heads + 2 * kv heads, D]
        heads, values = qkv[:, :num_rotated], qkv[:, num_rotated:]
        if layer.head_norm is not None:
            heads = rms_norm(heads, layer.head_norm, config.norm_eps)
        heads = rotate(heads, cos, sin)  # [T, heads + kv heads, D]
        plan.write(cache, torch.cat((heads[:, config.num_heads :], values), dim=1))
        return layer.out(plan.attend(heads, cache, layer.window))

    def _rotation(self, spans: list[Span]) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin) of the step's rows, [T, 1, D] each, as `rotate` wants them."""
        half_cos, half_sin = map(
            torch.from_numpy, self._rotary.upto(max(span.start + span.length for span in spans) - 1)
        )
        positions = torch.cat([torch.arange(s.start, s.start + s.length) for s in spans])
        cos, sin = half_cos[positions], half_sin[positions]
        return torch.cat((cos, cos), -1).unsqueeze(1), torch.cat((-sin, sin), -1).unsqueeze(1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [T, heads, D], cos and sin [T, 1, D] (sin's first half negated) -> x rotated, in the pairs (i, i + D / 2).

    Products and sum are separate calls: a fused multiply-add rounds differently in a vector's tail than in its body,
    which would let a row's bits depend on its place in the batch.
    """
    swapped = x.roll(x.shape[-1] // 2, dims=-1)
    return (x * cos).add_(swapped.mul_(sin))


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """[T, 2 * hidden], the gate's half first -> silu(gate) * up, [T, hidden].

    silu(g) is g / (1 + exp(-g)), spelt out: torch's own rounds differently where a vector ends (module's docstring).
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return gate.neg().exp_().add_(1.0).reciprocal_().mul_(gate).mul_(up)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., n], weight broadcastable to x -> x over its root mean square along n, times weight."""
    return (x * x.square().mean(dim=-1, keepdim=True).add_(eps).rsqrt_()).mul_(weight)
