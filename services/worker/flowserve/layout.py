"""What a prepared file holds: the tensors of a checkpoint fused, padded, quantised and packed for one W8A8 decoder.

Names and shapes, where Dp, Hp, ... are the head's size, the hidden width, ... padded to a multiple of 32 with zeros:

    embed                              fp32 [vocab, width]
    norm, layers.{i}.attention_norm, layers.{i}.mlp_norm   fp32 [width]
    layers.{i}.head_norm               fp32 [2, D], q_norm and k_norm, where a model has them
    layers.{i}.qkv                     width -> (H + 2 * KH) * Dp: query heads, key heads, value heads
    layers.{i}.out                     H * Dp -> width
    layers.{i}.gate_up                 width -> 2 * Hp: of each 32 outputs, 16 of the gate, then the same 16 of up
    layers.{i}.down                    Hp -> width
    layers.{i}.router                  fp32 [experts, width], in a sparse layer, which has instead of gate_up and down:
    layers.{i}.experts.{e}.gate_up, .down   as above, of an expert's size
    layers.{i}.shared.gate_up, .down        the same of the shared expert, where there is one
    layers.{i}.shared_gate             fp32 [1, width]
    head                               width -> vocab

Each product is kept as `.codes`, `.scales` (see `quantise.pack`) and, where it has one, `.bias` fp32 [N]. The residual
stream is kept rotated: so `embed` is fp32, and the norms' weights, all but Qwen3's of the heads, are ones. What reads
the residual undoes it in its weights, what adds to it does it there, and a root mean square does not see it; only a
norm's weights would, so they go into the products behind. On 20,000 tokens it takes a third off the divergence. This
module must not know files other than by the checkpoint that it reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

import numpy as np

from services.worker.flowserve.checkpoint import Checkpoint
from services.worker.flowserve.config import ModelConfig, ModelError, MoeConfig
from services.worker.flowserve.quantise import GROUP, PANEL, Floats, pack, quantise_weights
from services.worker.flowserve.rotation import Rotation
from services.worker.flowserve.tensorfile import NUMPY_TYPES, Array

ALIGNMENT: Final = (
    128  # of every tensor in the file and in memory: vectors of a padded width stay in their bounds
)
GATES: Final = PANEL // 2  # gate outputs of a panel, before the up outputs of the same numbers

_PROJECTIONS: Final = ("gate_proj", "up_proj", "down_proj")

_Arrange = Callable[[list[Floats]], Floats]


class Entry(NamedTuple):
    """Type, in safetensors' words, and shape of one tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def padded_bytes(self) -> int:
        """Its size in the file."""
        return padded(math.prod(self.shape) * self._itemsize, ALIGNMENT)

    @property
    def stored(self) -> dict[str, object]:
        """Type and shape in the file: flat, with zeros behind, where the size is no multiple of the alignment."""
        num_stored = self.padded_bytes // self._itemsize
        whole = num_stored == math.prod(self.shape)
        return {"dtype": self.dtype, "shape": list(self.shape) if whole else [num_stored]}

    @property
    def _itemsize(self) -> int:
        return np.dtype(NUMPY_TYPES[self.dtype]).itemsize


def padded(size: int, multiple: int = GROUP) -> int:
    """`size`, rounded up."""
    return -(-size // multiple) * multiple


def layout_of(config: ModelConfig) -> dict[str, Entry]:
    """The tensors of the file, in its order."""
    head_dim, width = padded(config.head_dim), padded(config.width)
    layout = {
        "embed": Entry("F32", (config.vocab, config.width)),
        "norm": Entry("F32", (config.width,)),
    }

    def add(name: str, num_outputs: int, num_inputs: int, *, bias: bool) -> None:
        panels = num_outputs // PANEL
        layout[f"{name}.codes"] = Entry("U8", (panels, num_inputs // 4, PANEL, 4))
        layout[f"{name}.scales"] = Entry("BF16", (panels, num_inputs // GROUP, PANEL))
        if bias:
            layout[f"{name}.bias"] = Entry("F32", (num_outputs,))

    def add_mlp(name: str, size: int, *, bias: bool) -> None:
        add(f"{name}.gate_up", 2 * padded(size), width, bias=bias)
        add(f"{name}.down", width, padded(size), bias=bias)

    def add_experts(layer: str, moe: MoeConfig) -> None:
        layout[f"{layer}.router"] = Entry("F32", (moe.num_experts, config.width))
        for expert in range(moe.num_experts):
            add_mlp(f"{layer}.experts.{expert}", moe.hidden, bias=False)
        if moe.shared_hidden is not None:
            layout[f"{layer}.shared_gate"] = Entry("F32", (1, config.width))
            add_mlp(f"{layer}.shared", moe.shared_hidden, bias=False)

    for index in range(config.num_layers):
        layer = f"layers.{index}"
        layout[f"{layer}.attention_norm"] = Entry("F32", (config.width,))
        layout[f"{layer}.mlp_norm"] = Entry("F32", (config.width,))
        if config.qk_norm:
            layout[f"{layer}.head_norm"] = Entry("F32", (2, config.head_dim))
        num_heads = config.num_heads + 2 * config.num_kv_heads
        add(f"{layer}.qkv", num_heads * head_dim, width, bias=config.qkv_bias)
        add(f"{layer}.out", width, config.num_heads * head_dim, bias=config.out_bias)
        if config.moe is not None and config.sparse[index]:
            add_experts(layer, config.moe)
        else:
            add_mlp(layer, config.hidden, bias=config.mlp_bias)
    add("head", padded(config.vocab), width, bias=False)
    return layout


def tensors_of(config: ModelConfig, checkpoint: Checkpoint) -> Iterator[tuple[str, Array]]:
    """The tensors of the file, made one product at a time. Raises ModelError naming a tensor that is missing or odd."""
    width, head_dim = config.width, config.head_dim
    rotation = Rotation(width)
    q, kv = config.num_heads * head_dim, config.num_kv_heads * head_dim

    def vector(name: str, size: int = width) -> Floats:
        return checkpoint.floats(f"{name}.weight", (size,))

    def product(
        name: str,
        sources: dict[str, int],
        num_inputs: int,
        *,
        outputs: _Arrange,
        inputs: Callable[[Floats], Floats],
        bias: bool = False,
    ) -> Iterator[tuple[str, Array]]:
        """The matrices `sources` (names, numbers of outputs) as one: rows by `outputs`, columns by `inputs`."""
        weights = outputs(
            [checkpoint.floats(f"{n}.weight", (size, num_inputs)) for n, size in sources.items()]
        )
        try:
            codes, scales = quantise_weights(inputs(weights))
        except ValueError as error:
            raise ModelError(f"{' + '.join(sources)}: {error}") from error
        packed_codes, packed_scales = pack(codes, scales)
        yield f"{name}.codes", packed_codes
        yield f"{name}.scales", packed_scales
        if bias:
            columns = [
                checkpoint.floats(f"{n}.bias", (size,))[:, None] for n, size in sources.items()
            ]
            yield f"{name}.bias", outputs(columns)[:, 0]

    def by_head(parts: list[Floats]) -> Floats:
        """[heads * D, C] each -> [all heads * Dp, C]."""
        cut = [part.reshape(-1, head_dim, part.shape[-1]) for part in parts]
        return _pad(np.concatenate(cut), axis=1).reshape(-1, parts[0].shape[-1])

    def inputs_by_head(weights: Floats) -> Floats:
        """[N, H * D] -> [N, H * Dp]."""
        return _pad_last(weights.reshape(len(weights), -1, head_dim)).reshape(len(weights), -1)

    def normed_inputs(norm: str) -> Callable[[Floats], Floats]:
        """[N, width] -> [N, width padded], for rows that were divided by their root mean square and are rotated."""
        weight = vector(norm)
        return lambda weights: _pad_last(rotation(weights * weight))

    def to_residual(parts: list[Floats]) -> Floats:
        """[width, C] -> [width padded, C], what is added to the rotated residual."""
        (only,) = parts
        return _pad(rotation(only.T).T, axis=0)

    def mlp(
        name: str,
        sources: list[str],
        size: int,
        inputs: Callable[[Floats], Floats],
        *,
        bias: bool = False,
    ) -> Iterator[tuple[str, Array]]:
        """The MLP of the matrices `sources` (gate, up, down), of `size` hidden values."""
        gate, up, down = sources
        gate_up = {gate: size, up: size}
        yield from product(
            f"{name}.gate_up", gate_up, width, outputs=_interleave, inputs=inputs, bias=bias
        )
        yield from product(
            f"{name}.down", {down: width}, size, outputs=to_residual, inputs=_pad_last, bias=bias
        )

    def experts(layer: str, block: str, moe: MoeConfig, norm: str) -> Iterator[tuple[str, Array]]:
        """The mixture `block`. Its router is read once a row and decides much, so it stays as precise as it is."""
        inputs, weight = normed_inputs(norm), vector(norm)

        def routes(name: str, num_outputs: int) -> Floats:
            stored = checkpoint.floats(f"{block}.{name}.weight", (num_outputs, width))
            return rotation(stored * weight)

        yield f"{layer}.router", routes("gate", moe.num_experts)
        for expert in range(moe.num_experts):
            sources = [f"{block}.experts.{expert}.{part}" for part in moe.names[1:]]
            yield from mlp(f"{layer}.experts.{expert}", sources, moe.hidden, inputs)
        if moe.shared_hidden is not None:
            yield f"{layer}.shared_gate", routes("shared_expert_gate", 1)
            sources = [f"{block}.shared_expert.{part}" for part in _PROJECTIONS]
            yield from mlp(f"{layer}.shared", sources, moe.shared_hidden, inputs)

    ones = np.ones(width, np.float32)
    embed = checkpoint.floats("model.embed_tokens.weight", (config.vocab, width))
    yield "embed", rotation(embed)
    yield "norm", ones
    for index in range(config.num_layers):
        layer, source = f"layers.{index}", f"model.layers.{index}"
        attention, mlp_norm = f"{source}.self_attn", f"{source}.post_attention_layernorm"
        yield f"{layer}.attention_norm", ones
        yield f"{layer}.mlp_norm", ones
        if config.qk_norm:
            norms = [vector(f"{attention}.{name}", head_dim) for name in ("q_norm", "k_norm")]
            yield f"{layer}.head_norm", np.stack(norms)
        sources = {f"{attention}.q_proj": q, f"{attention}.k_proj": kv, f"{attention}.v_proj": kv}
        yield from product(
            f"{layer}.qkv",
            sources,
            width,
            outputs=by_head,
            inputs=normed_inputs(f"{source}.input_layernorm"),
            bias=config.qkv_bias,
        )
        yield from product(
            f"{layer}.out",
            {f"{attention}.o_proj": width},
            q,
            outputs=to_residual,
            inputs=inputs_by_head,
            bias=config.out_bias,
        )
        if config.moe is not None and config.sparse[index]:
            block = f"{source}.{config.moe.names.block}"
            yield from experts(layer, block, config.moe, mlp_norm)
        else:
            parts = [f"{source}.mlp.{part}" for part in _PROJECTIONS]
            inputs = normed_inputs(mlp_norm)
            yield from mlp(layer, parts, config.hidden, inputs, bias=config.mlp_bias)
    head = "model.embed_tokens" if config.tied else "lm_head"
    yield from product(
        "head", {head: config.vocab}, width, outputs=_pad_first, inputs=normed_inputs("model.norm")
    )


def _pad(array: Floats, *, axis: int) -> Floats:
    missing = padded(array.shape[axis]) - array.shape[axis]
    if not missing:
        return array
    shape = list(array.shape)
    shape[axis] = missing
    return np.concatenate((array, np.zeros(shape, np.float32)), axis=axis)


def _pad_last(array: Floats) -> Floats:
    return _pad(array, axis=-1)


def _pad_first(parts: list[Floats]) -> Floats:
    (only,) = parts
    return _pad(only, axis=0)


def _interleave(parts: list[Floats]) -> Floats:
    """gate and up, [hidden, C] each -> [2 * Hp, C], in turn 16 of the one and 16 of the other."""
    cut = [_pad(part, axis=0).reshape(-1, GATES, part.shape[-1]) for part in parts]
    return np.stack(cut, axis=1).reshape(-1, parts[0].shape[-1])
