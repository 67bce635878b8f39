"""The decoder: one definition for the Llama family (Llama, SmolLM2, Mistral, Qwen2, Qwen3 dense).

A step's rows are (sequence, position) pairs of any mix of sequences, decode rows and prompt chunks alike. Everything
but attention works row by row; all values between the products are fp32. In `w8a8` every row's result is independent
of the other rows, bit for bit: the integer products are exact, the norms reduce one row at a time, and element-wise
work uses only operations that round alike in a vector's body and in its tail (which rules out `silu`, `sigmoid` and
fused multiply-adds). This module must not know requests, sampling, or who owns which block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as functional

from services.worker.flowserve.attention import AttentionPlan, BlockSizes, Span
from services.worker.flowserve.checkpoint import Checkpoint
from services.worker.flowserve.config import ModelConfig, ModelError
from services.worker.flowserve.kv import KVCache
from services.worker.flowserve.linear import DTYPES, Linear, Rows, make_linear
from services.worker.flowserve.rope import RotaryTable, rotate

__all__ = ["Decoder", "Span", "StepInput"]


@dataclass(frozen=True, slots=True)
class StepInput:
    """One step: the rows of all its sequences, one after the other in the order of `spans`.

    `tokens[i]` stands at `positions[i]` of its sequence; `sample_rows` are the rows whose logits are wanted.
    """

    tokens: list[int]
    positions: list[int]
    spans: list[Span]
    sample_rows: list[int]


@dataclass(frozen=True, slots=True)
class _Layer:
    attention_norm: torch.Tensor  # [width]
    qkv: Linear  # width -> (num_heads + 2 * num_kv_heads) * head_dim
    head_norm: (
        torch.Tensor | None
    )  # [num_heads + num_kv_heads, head_dim], Qwen3's q_norm and k_norm
    out: Linear  # num_heads * head_dim -> width
    mlp_norm: torch.Tensor  # [width]
    gate_up: Linear  # width -> 2 * hidden
    down: Linear  # hidden -> width
    window: int | None


class Decoder:
    """The weights of one model and the arithmetic over them. `forward` is the whole interface."""

    def __init__(self, config: ModelConfig, checkpoint: Checkpoint, dtype: str) -> None:
        if dtype not in DTYPES:
            raise ModelError(f"unknown dtype {dtype!r}; served are {', '.join(DTYPES)}")
        self.config = config
        self.dtype = dtype
        loader = _Loader(config, checkpoint, dtype)
        self._embeddings = loader.embeddings()  # [vocab, width], as stored
        self._layers = [loader.layer(index) for index in range(config.num_layers)]
        self._norm = loader.norm("model.norm.weight")
        self._head = loader.head()  # width -> vocab
        self._rotary = RotaryTable(config)
        self._block_sizes = BlockSizes.measure(config)

    @classmethod
    def load(cls, folder: Path, *, dtype: str = "w8a8") -> Decoder:
        """Reads a model folder in Hugging Face form; `dtype` is w8a8, fp32 or bf16. Raises ModelError naming the
        architecture, key or tensor at fault."""
        return cls(ModelConfig.from_folder(folder), Checkpoint(folder), dtype)

    @property
    def kv_dtype(self) -> torch.dtype:
        """What a cache for this decoder stores: bfloat16 in bf16, else float32."""
        return torch.bfloat16 if self.dtype == "bf16" else torch.float32

    @torch.inference_mode()
    def forward(self, step: StepInput, kv: KVCache) -> torch.Tensor:
        """Computes the rows of `step`, stores their keys and values in `kv`, and returns logits fp32
        [len(step.sample_rows), vocab]."""
        plan = AttentionPlan(self.config, step.spans, kv, self._block_sizes)
        cos, sin = self._rotary.rows(torch.tensor(step.positions))  # [T, 1, head_dim] each
        x = functional.embedding(torch.tensor(step.tokens), self._embeddings).float()  # [T, width]
        for layer, cache in zip(self._layers, kv.layers, strict=True):
            h = self._attend(
                layer, rms_norm(x, layer.attention_norm, self._eps), plan, cos, sin, cache
            )
            x = x + h
            h = rms_norm(x, layer.mlp_norm, self._eps)
            x = x + layer.down(swiglu(layer.gate_up(h)))
        if not step.sample_rows:
            return torch.empty(0, self.config.vocab)
        x = x[torch.tensor(step.sample_rows)]  # [S, width]
        return self._head(rms_norm(x, self._norm, self._eps))

    @property
    def _eps(self) -> float:
        return self.config.norm_eps

    def _attend(
        self,
        layer: _Layer,
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


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """[T, 2 * hidden], the gate's half first -> silu(gate) * up, [T, hidden].

    silu(g) is g / (1 + exp(-g)), spelt out: torch's own rounds differently where a vector ends (module's docstring).
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return gate.neg().exp_().add_(1.0).reciprocal_().mul_(gate).mul_(up)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., n], weight broadcastable to x -> x over its root mean square along n, times weight."""
    return (x * x.square().mean(dim=-1, keepdim=True).add_(eps).rsqrt_()).mul_(weight)


class _Loader:
    """Names of Hugging Face checkpoints turned into the decoder's parts, one stored tensor alive at a time."""

    def __init__(self, config: ModelConfig, checkpoint: Checkpoint, dtype: str) -> None:
        self._config = config
        self._checkpoint = checkpoint
        self._dtype = dtype

    def embeddings(self) -> torch.Tensor:
        """[vocab, width] as stored."""
        size = (self._config.vocab, self._config.width)
        return self._checkpoint.tensor("model.embed_tokens.weight", size)

    def norm(self, name: str) -> torch.Tensor:
        """fp32 [width]."""
        return self._checkpoint.tensor(name, (self._config.width,)).float()

    def head(self) -> Linear:
        """The output projection; a tied one is a copy of the embeddings in the product's own form."""
        config = self._config
        name = "model.embed_tokens" if config.tied else "lm_head"
        return self._linear([(name, config.vocab)], config.width, bias=False)

    def layer(self, index: int) -> _Layer:
        """The decoder layer `index`."""
        config, prefix = self._config, f"model.layers.{index}"
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        qkv = [(f"{attention}.q_proj", q), (f"{attention}.k_proj", kv), (f"{attention}.v_proj", kv)]
        gate_up = [(f"{mlp}.gate_proj", config.hidden), (f"{mlp}.up_proj", config.hidden)]
        out, down = [(f"{attention}.o_proj", config.width)], [(f"{mlp}.down_proj", config.width)]
        return _Layer(
            attention_norm=self.norm(f"{prefix}.input_layernorm.weight"),
            qkv=self._linear(qkv, config.width, bias=config.qkv_bias),
            head_norm=self._head_norm(attention),
            out=self._linear(out, q, bias=config.out_bias),
            mlp_norm=self.norm(f"{prefix}.post_attention_layernorm.weight"),
            gate_up=self._linear(gate_up, config.width, bias=config.mlp_bias),
            down=self._linear(down, config.hidden, bias=config.mlp_bias),
            window=config.windows[index],
        )

    def _head_norm(self, attention: str) -> torch.Tensor | None:
        config = self._config
        if not config.qk_norm:
            return None
        size = (config.head_dim,)
        q = self._checkpoint.tensor(f"{attention}.q_norm.weight", size).float()
        k = self._checkpoint.tensor(f"{attention}.k_norm.weight", size).float()
        return torch.stack([q] * config.num_heads + [k] * config.num_kv_heads)

    def _linear(self, parts: list[tuple[str, int]], num_inputs: int, *, bias: bool) -> Linear:
        """The weights named `parts` (with their numbers of outputs) as one product."""

        def read() -> Iterator[Rows]:
            for name, num_outputs in parts:
                weight = self._checkpoint.tensor(f"{name}.weight", (num_outputs, num_inputs))
                yield (
                    weight,
                    self._checkpoint.tensor(f"{name}.bias", (num_outputs,)) if bias else None,
                )

        num_outputs = sum(size for _, size in parts)
        return make_linear(
            read(), num_outputs=num_outputs, num_inputs=num_inputs, dtype=self._dtype
        )
