"""What a prepared file holds: the tensors of a checkpoint fused, padded, quantised and packed for one W8A8 decoder.

Names and shapes, where Dp, Hp, ... are the head's size, the hidden width, ... padded to a multiple of 32 with zeros:

    embed                              fp32 [vocab, width]
    norm, layers.{i}.attention_norm, layers.{i}.mlp_norm   fp32 [width]
    layers.{i}.head_norm               fp32 [2, D], q_norm and k_norm, where a model has them
    layers.{i}.qkv                     width -> (H + 2 * KH) * Dp: query heads, key heads, value heads
    layers.{i}.out                     H * Dp -> width
    layers.{i}.gate_up                 width -> 2 * Hp: of each 32 outputs, 16 of the gate, then the same 16 of up
    layers.{i}.down                    Hp -> width
    head                               width -> vocab

Each product is kept as `.codes`, `.scales` (see `quantise.pack`) and, where it has one, `.bias` fp32 [N]. The residual
stream is kept rotated, see `_Rotation`: so `embed` is fp32, and the norms' weights, all but Qwen3's of the heads, are
ones. This module must not know files other than by the checkpoint that it reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

import numpy as np

from services.worker.flowserve.checkpoint import Checkpoint
from services.worker.flowserve.config import ModelConfig, ModelError
from services.worker.flowserve.quantise import GROUP, PANEL, Floats, pack, quantise_weights
from services.worker.flowserve.tensorfile import NUMPY_TYPES, Array

ALIGNMENT: Final = (
    128  # of every tensor in the file and in memory: vectors of a padded width stay in their bounds
)
GATES: Final = PANEL // 2  # gate outputs of a panel, before the up outputs of the same numbers

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
    head_dim, hidden, width = padded(config.head_dim), padded(config.hidden), padded(config.width)
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

    for index in range(config.num_layers):
        layer = f"layers.{index}"
        layout[f"{layer}.attention_norm"] = Entry("F32", (config.width,))
        layout[f"{layer}.mlp_norm"] = Entry("F32", (config.width,))
        if config.qk_norm:
            layout[f"{layer}.head_norm"] = Entry("F32", (2, config.head_dim))
        num_heads = config.num_heads + 2 * config.num_kv_heads
        add(f"{layer}.qkv", num_heads * head_dim, width, bias=config.qkv_bias)
        add(f"{layer}.out", width, config.num_heads * head_dim, bias=config.out_bias)
        add(f"{layer}.gate_up", 2 * hidden, width, bias=config.mlp_bias)
        add(f"{layer}.down", width, hidden, bias=config.mlp_bias)
    add("head", padded(config.vocab), width, bias=False)
    return layout


def tensors_of(config: ModelConfig, checkpoint: Checkpoint) -> Iterator[tuple[str, Array]]:
    """The tensors of the file, made one product at a time. Raises ModelError naming a tensor that is missing or odd."""
    width, hidden, head_dim = config.width, config.hidden, config.head_dim
    rotation = _Rotation(width)
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

    ones = np.ones(width, np.float32)
    embed = checkpoint.floats("model.embed_tokens.weight", (config.vocab, width))
    yield "embed", rotation(embed)
    yield "norm", ones
    for index in range(config.num_layers):
        layer, source = f"layers.{index}", f"model.layers.{index}"
        attention, mlp = f"{source}.self_attn", f"{source}.mlp"
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
        sources = {f"{mlp}.gate_proj": hidden, f"{mlp}.up_proj": hidden}
        yield from product(
            f"{layer}.gate_up",
            sources,
            width,
            outputs=_interleave,
            inputs=normed_inputs(f"{source}.post_attention_layernorm"),
            bias=config.mlp_bias,
        )
        yield from product(
            f"{layer}.down",
            {f"{mlp}.down_proj": width},
            hidden,
            outputs=to_residual,
            inputs=_pad_last,
            bias=config.mlp_bias,
        )
    head = "model.embed_tokens" if config.tied else "lm_head"
    yield from product(
        "head", {head: config.vocab}, width, outputs=_pad_first, inputs=normed_inputs("model.norm")
    )


class _Rotation:
    """Turns rows [..., width] by an orthogonal matrix: Hadamard's, in blocks of up to 64 (the idea of QuaRot, arXiv
    2404.00456).

    It spreads an outlier over its block, so that the groups of activations lose fewer digits to it. What reads the
    residual undoes it in its weights, what adds to it does it there, and a root mean square does not see it; only a
    norm's weights would, so they go into the products behind. On 20,000 tokens it takes a third off the divergence.
    """

    def __init__(self, width: int) -> None:
        self._size = 1
        while self._size < 64 and width % (2 * self._size) == 0:
            self._size *= 2
        matrix = np.ones((1, 1))
        while len(matrix) < self._size:
            matrix = np.block([[matrix, matrix], [matrix, -matrix]])
        self._matrix = (matrix / math.sqrt(self._size)).astype(np.float32)

    def __call__(self, rows: Floats) -> Floats:
        blocks = rows.reshape(*rows.shape[:-1], -1, self._size)
        turned: Floats = (blocks @ self._matrix).reshape(rows.shape)
        return turned


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
