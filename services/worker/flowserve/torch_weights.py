"""The weights of a torch decoder, or of one executor's share: from a checkpoint in any type that its device serves, or
from prepared weights in the CPU's W8A8.

A rank reads only the rows and columns that are its own. Where inputs are cut (`out`, `down`), the results of the ranks
are to be added up, so one of them has the bias. This module must not know the arithmetic between the products.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from services.worker.flowserve.checkpoint import Checkpoint
from services.worker.flowserve.config import ModelConfig, ModelError, MoeConfig
from services.worker.flowserve.device.cpu_linear import Int8Linear, RowLinear, SparseLinears
from services.worker.flowserve.device.device import Device, Embedding, Linear, Rows
from services.worker.flowserve.layout import GATES, padded
from services.worker.flowserve.mlp import DenseMlp, Mlp, MoeMlp, SharedMlp
from services.worker.flowserve.prepared import Prepared
from services.worker.flowserve.quantise import GROUP, PANEL, Floats
from services.worker.flowserve.rank import Rank
from services.worker.flowserve.rotation import RotatedCheckpoint

_EMBED = "model.embed_tokens"


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer; H query heads, KH key/value heads of D values."""

    attention_norm: torch.Tensor  # [width]
    qkv: Linear  # width -> (H + 2 * KH) * D
    q_norm: torch.Tensor | None  # [D], Qwen3
    k_norm: torch.Tensor | None
    out: Linear  # H * D -> width
    mlp_norm: torch.Tensor  # [width]
    mlp: Mlp
    window: int | None


@dataclass(frozen=True, slots=True)
class Weights:
    """An executor's weights: `embed` in the first stage, `norm` and `head` in the last; both of this rank's tokens."""

    embed: Embedding | None
    layers: list[Layer]
    norm: torch.Tensor | None  # [width]
    head: Linear | None  # width -> tokens of this rank


def from_checkpoint(
    config: ModelConfig,
    checkpoint: Checkpoint | RotatedCheckpoint,
    dtype: str,
    device: Device,
    rank: Rank,
) -> Weights:
    """Products in `dtype`; `config` is the whole model's. Raises ModelError naming a tensor that is missing or odd,
    and where the device has no memory for all."""
    width, head_dim = config.width, config.head_dim
    activations = device.activations(dtype)
    own_q, own_kv = (
        range(heads.start * head_dim, heads.stop * head_dim)
        for heads in (rank.heads(config), rank.kv_heads(config))
    )
    own_vocab = rank.vocab(config.vocab)
    num_q, num_kv = config.num_heads * head_dim, config.num_kv_heads * head_dim

    def by_outputs(
        parts: dict[str, tuple[int, range]], num_inputs: int, *, bias: bool = False
    ) -> Linear:
        """The matrices named `parts` (with their numbers of outputs, and those of this rank) as one product."""

        def read() -> Iterator[Rows]:
            for name, (size, rows) in parts.items():
                weight = checkpoint.floats(f"{name}.weight", (size, num_inputs), rows=rows)
                if missing := len(rows) - len(weight):
                    weight = np.pad(weight, ((0, missing), (0, 0)))
                yield (
                    weight,
                    checkpoint.floats(f"{name}.bias", (size,), rows=rows) if bias else None,
                )

        num_outputs = sum(len(rows) for _, rows in parts.values())
        return device.linear(read(), (num_outputs, num_inputs), dtype)

    def by_inputs(name: str, num_inputs: int, columns: range, *, bias: bool) -> Linear:
        """The matrix `name`, of whose inputs this rank has `columns`."""

        def read() -> Iterator[Rows]:
            weight = checkpoint.floats(f"{name}.weight", (width, num_inputs), columns=columns)
            is_first = bias and rank.tp == 0
            yield weight, checkpoint.floats(f"{name}.bias", (width,)) if is_first else None

        return device.linear(read(), (width, len(columns)), dtype)

    def norm(name: str, size: int = width) -> torch.Tensor:
        return device.tensor(checkpoint.floats(f"{name}.weight", (size,)), activations)

    def dense(name: str, size: int, *, bias: bool) -> DenseMlp:
        """The MLP `name` of `size` hidden values."""
        own = rank.hidden(size)
        gate_up = {f"{name}.gate_proj": (size, own), f"{name}.up_proj": (size, own)}
        return DenseMlp(
            device,
            by_outputs(gate_up, width, bias=bias),
            by_inputs(f"{name}.down_proj", size, own, bias=bias),
            rotation(size),
        )

    def rotation(size: int) -> torch.Tensor | None:
        """Of the inputs of such a `down_proj`."""
        if not isinstance(checkpoint, RotatedCheckpoint):
            return None
        return device.tensor(checkpoint.of_hidden(size).matrix, activations)

    def sparse(block: str, moe: MoeConfig) -> MoeMlp:
        """The mixture of experts `block`."""
        own, names = rank.hidden(moe.hidden), moe.names
        experts = [f"{block}.experts.{expert}" for expert in range(moe.num_experts)]
        inwards, outwards = (moe.hidden, width), (width, moe.hidden)

        def gate_up() -> Iterator[Floats]:
            for expert in experts:
                gate, up = f"{expert}.{names.gate}.weight", f"{expert}.{names.up}.weight"
                yield np.concatenate(
                    [checkpoint.floats(part, inwards, rows=own) for part in (gate, up)]
                )

        def down() -> Iterator[Floats]:
            for expert in experts:
                yield checkpoint.floats(f"{expert}.{names.down}.weight", outwards, columns=own)

        def in_float(name: str, num_outputs: int) -> Linear:
            weight = checkpoint.floats(f"{name}.weight", (num_outputs, width))
            kind = "bf16" if dtype == "w8a8" else dtype
            return device.linear([(weight, None)], (num_outputs, width), kind)

        shared = None
        if moe.shared_hidden is not None:
            mlp = dense(f"{block}.shared_expert", moe.shared_hidden, bias=False)
            shared = SharedMlp(mlp, in_float(f"{block}.shared_expert_gate", 1))
        return MoeMlp(
            device,
            in_float(f"{block}.gate", moe.num_experts),
            device.experts(gate_up(), down(), (moe.num_experts, width, len(own)), dtype),
            moe.num_chosen,
            moe.renormalise,
            shared,
        )

    def mlp(index: int) -> Mlp:
        prefix = f"model.layers.{index}"
        if config.moe is not None and config.sparse[index]:
            return sparse(f"{prefix}.{config.moe.names.block}", config.moe)
        return dense(f"{prefix}.mlp", config.hidden, bias=config.mlp_bias)

    def layer(index: int) -> Layer:
        prefix = f"model.layers.{index}"
        attention = f"{prefix}.self_attn"
        return Layer(
            attention_norm=norm(f"{prefix}.input_layernorm"),
            qkv=by_outputs(
                {
                    f"{attention}.q_proj": (num_q, own_q),
                    f"{attention}.k_proj": (num_kv, own_kv),
                    f"{attention}.v_proj": (num_kv, own_kv),
                },
                width,
                bias=config.qkv_bias,
            ),
            q_norm=norm(f"{attention}.q_norm", head_dim) if config.qk_norm else None,
            k_norm=norm(f"{attention}.k_norm", head_dim) if config.qk_norm else None,
            out=by_inputs(f"{attention}.o_proj", num_q, own_q, bias=config.out_bias),
            mlp_norm=norm(f"{prefix}.post_attention_layernorm"),
            mlp=mlp(index),
            window=config.windows[index],
        )

    def embed() -> Embedding:
        shape = (config.vocab, width)
        return device.embedding(
            *checkpoint.stored(f"{_EMBED}.weight", shape, rows=own_vocab), dtype
        )

    def head() -> Linear:
        name = _EMBED if config.tied else "lm_head"
        return by_outputs({name: (config.vocab, own_vocab)}, width)

    with _memory_of(device):
        return Weights(
            embed=embed() if rank.is_first else None,
            layers=[layer(index) for index in rank.layers(config.num_layers)],
            norm=norm("model.norm") if rank.is_last else None,
            head=head() if rank.is_last else None,
        )


def from_prepared(prepared: Prepared, device: Device, rank: Rank) -> Weights:
    """Products in the CPU's W8A8, unpacked into memory: outputs without padding, gate and up told apart."""
    config, arrays = prepared.config, prepared.arrays
    width, head_dim = config.width, config.head_dim
    q, kv = rank.heads(config), rank.kv_heads(config)
    own_vocab = rank.vocab(config.vocab)
    every = np.arange(width)
    is_first = rank.tp == 0

    def linear(
        name: str,
        rows: npt.NDArray[np.intp],
        piece: int,
        groups: slice = slice(None),
        *,
        bias: bool = True,
    ) -> Linear:
        codes, scales = arrays[f"{name}.codes"], arrays[f"{name}.scales"]
        biases = arrays.get(f"{name}.bias") if bias else None
        return Int8Linear(codes, scales, biases, rows=rows, piece=piece, groups=groups)

    def vector(name: str) -> torch.Tensor:
        return device.tensor(arrays[name])

    first_value = config.num_heads + config.num_kv_heads
    places = [*q, *(config.num_heads + h for h in kv), *(first_value + h for h in kv)]
    heads = np.array(places)[:, None] * padded(head_dim) + np.arange(head_dim)
    per_head = padded(head_dim) // GROUP
    head_groups = slice(q.start * per_head, q.stop * per_head)

    def dense(name: str, size: int) -> DenseMlp:
        """The MLP `name` of `size` hidden values."""
        own = rank.hidden(size)
        hidden = np.array(own)
        gates = hidden // GATES * PANEL + hidden % GATES
        groups = slice(own.start // GROUP, -(-own.stop // GROUP))
        return DenseMlp(
            device,
            linear(f"{name}.gate_up", np.concatenate((gates, gates + GATES)), width),
            linear(f"{name}.down", every, len(hidden), groups, bias=is_first),
        )

    def mlp(index: int) -> Mlp:
        prefix, moe = f"layers.{index}", config.moe
        if moe is None or not config.sparse[index]:
            return dense(prefix, config.hidden)
        shared = None
        if moe.shared_hidden is not None:
            gate = RowLinear(arrays[f"{prefix}.shared_gate"])
            shared = SharedMlp(dense(f"{prefix}.shared", moe.shared_hidden), gate)
        return MoeMlp(
            device,
            RowLinear(arrays[f"{prefix}.router"]),
            SparseLinears(
                [dense(f"{prefix}.experts.{e}", moe.hidden) for e in range(moe.num_experts)]
            ),
            moe.num_chosen,
            moe.renormalise,
            shared,
        )

    def layer(index: int) -> Layer:
        prefix = f"layers.{index}"
        norms = vector(f"{prefix}.head_norm") if config.qk_norm else None
        return Layer(
            attention_norm=vector(f"{prefix}.attention_norm"),
            qkv=linear(f"{prefix}.qkv", heads.reshape(-1), width),
            q_norm=None if norms is None else norms[0],
            k_norm=None if norms is None else norms[1],
            out=linear(f"{prefix}.out", every, head_dim, head_groups, bias=is_first),
            mlp_norm=vector(f"{prefix}.mlp_norm"),
            mlp=mlp(index),
            window=config.windows[index],
        )

    tokens = np.minimum(np.array(own_vocab), config.vocab - 1)
    embed = arrays["embed"][own_vocab.start : own_vocab.stop]
    return Weights(
        embed=device.embedding(embed, "F32", "w8a8") if rank.is_first else None,
        layers=[layer(index) for index in rank.layers(config.num_layers)],
        norm=vector("norm") if rank.is_last else None,
        head=linear("head", tokens, width) if rank.is_last else None,
    )


@contextmanager
def _memory_of(device: Device) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ModelError(f"no memory on {device.place} for the weights: {error}") from error
