"""The weights of a torch decoder: from a checkpoint in float types, or from prepared weights in W8A8.

This module must not know the arithmetic between the products.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from services.worker.flowserve.checkpoint import Checkpoint
from services.worker.flowserve.config import ModelConfig
from services.worker.flowserve.layout import GATES, padded
from services.worker.flowserve.linear import FloatLinear, Int8Linear, Linear, Rows
from services.worker.flowserve.prepared import Prepared
from services.worker.flowserve.quantise import PANEL, Floats
from services.worker.flowserve.tensorfile import Array, as_floats


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer; H query heads, KH key/value heads of D values."""

    attention_norm: torch.Tensor  # [width]
    qkv: Linear  # width -> (H + 2 * KH) * D
    head_norm: torch.Tensor | None  # [H + KH, D], Qwen3's q_norm and k_norm
    out: Linear  # H * D -> width
    mlp_norm: torch.Tensor  # [width]
    gate_up: Linear  # width -> 2 * hidden, the gate's half first
    down: Linear  # hidden -> width
    window: int | None


@dataclass(frozen=True, slots=True)
class Weights:
    """All weights of a decoder."""

    embeddings: Array  # [vocab, width], as stored
    embed_dtype: str
    layers: list[Layer]
    norm: torch.Tensor  # [width]
    head: Linear  # width -> vocab

    def embed(self, tokens: list[int]) -> torch.Tensor:
        """fp32 [T, width]."""
        return torch.from_numpy(as_floats(self.embeddings[tokens], self.embed_dtype))


def from_checkpoint(config: ModelConfig, checkpoint: Checkpoint, dtype: torch.dtype) -> Weights:
    """Products in `dtype`. Raises ModelError naming a tensor that is missing or odd."""
    width, hidden = config.width, config.hidden
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim

    def linear(parts: dict[str, int], num_inputs: int, *, bias: bool = False) -> Linear:
        """The weights named `parts` (with their numbers of outputs) as one product."""

        def read() -> Iterator[Rows]:
            for name, size in parts.items():
                weight = checkpoint.floats(f"{name}.weight", (size, num_inputs))
                yield weight, checkpoint.floats(f"{name}.bias", (size,)) if bias else None

        return FloatLinear(read(), (sum(parts.values()), num_inputs), dtype)

    def norm(name: str, size: int = width) -> Floats:
        return checkpoint.floats(f"{name}.weight", (size,))

    def layer(index: int) -> Layer:
        prefix = f"model.layers.{index}"
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        head_norm = None
        if config.qk_norm:
            norms = [norm(f"{attention}.{name}", config.head_dim) for name in ("q_norm", "k_norm")]
            head_norm = _by_head(config, np.stack(norms))
        return Layer(
            attention_norm=torch.from_numpy(norm(f"{prefix}.input_layernorm")),
            qkv=linear(
                {f"{attention}.q_proj": q, f"{attention}.k_proj": kv, f"{attention}.v_proj": kv},
                width,
                bias=config.qkv_bias,
            ),
            head_norm=head_norm,
            out=linear({f"{attention}.o_proj": width}, q, bias=config.out_bias),
            mlp_norm=torch.from_numpy(norm(f"{prefix}.post_attention_layernorm")),
            gate_up=linear(
                {f"{mlp}.gate_proj": hidden, f"{mlp}.up_proj": hidden}, width, bias=config.mlp_bias
            ),
            down=linear({f"{mlp}.down_proj": width}, hidden, bias=config.mlp_bias),
            window=config.windows[index],
        )

    name = "model.embed_tokens"
    embeddings, embed_dtype = checkpoint.stored(f"{name}.weight", (config.vocab, width))
    return Weights(
        embeddings=embeddings,
        embed_dtype=embed_dtype,
        layers=[layer(index) for index in range(config.num_layers)],
        norm=torch.from_numpy(norm("model.norm")),
        head=linear({name if config.tied else "lm_head": config.vocab}, width),
    )


def from_prepared(prepared: Prepared) -> Weights:
    """Products in W8A8, unpacked into memory: the padding of outputs is left out, gate and up are told apart."""
    config, arrays = prepared.config, prepared.arrays

    def linear(name: str, rows: npt.NDArray[np.intp], piece: int) -> Linear:
        codes, scales = arrays[f"{name}.codes"], arrays[f"{name}.scales"]
        return Int8Linear(codes, scales, arrays.get(f"{name}.bias"), rows=rows, piece=piece)

    def vector(name: str) -> torch.Tensor:
        return torch.from_numpy(arrays[name].copy())  # torch wants memory that it may write

    width, hidden, head_dim = config.width, config.hidden, config.head_dim
    num_heads = config.num_heads + 2 * config.num_kv_heads
    heads = np.arange(num_heads)[:, None] * padded(head_dim) + np.arange(head_dim)
    gates = np.arange(hidden) // GATES * PANEL + np.arange(hidden) % GATES

    def layer(index: int) -> Layer:
        prefix = f"layers.{index}"
        head_norm = arrays.get(f"{prefix}.head_norm")
        return Layer(
            attention_norm=vector(f"{prefix}.attention_norm"),
            qkv=linear(f"{prefix}.qkv", heads.reshape(-1), width),
            head_norm=None if head_norm is None else _by_head(config, head_norm),
            out=linear(f"{prefix}.out", np.arange(width), head_dim),
            mlp_norm=vector(f"{prefix}.mlp_norm"),
            gate_up=linear(f"{prefix}.gate_up", np.concatenate((gates, gates + GATES)), width),
            down=linear(f"{prefix}.down", np.arange(width), hidden),
            window=config.windows[index],
        )

    return Weights(
        embeddings=arrays["embed"],
        embed_dtype="F32",
        layers=[layer(index) for index in range(config.num_layers)],
        norm=vector("norm"),
        head=linear("head", np.arange(config.vocab), width),
    )


def _by_head(config: ModelConfig, norms: Floats) -> torch.Tensor:
    """q_norm and k_norm [2, D] -> [H + KH, D], one row for each head that has a norm."""
    return torch.from_numpy(norms.repeat((config.num_heads, config.num_kv_heads), axis=0))
