"""The CPU through eager torch: reference of all other devices, and W8A8's fallback where native kernels cannot run.

Rows are fp32 between the products, whatever these use. In `w8a8` a row's result depends on no other row, bit for bit:
the integer products are exact, the norms reduce one row at a time, and element-wise work uses only operations that
round alike in a vector's body and in its tail (which rules out `silu`, `sigmoid` and fused multiply-adds). This module
must not know layers or weights' names.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from services.worker.flowserve.config import ModelConfig, ModelError
from services.worker.flowserve.decoder import Floats, Span, Splice
from services.worker.flowserve.device import cells
from services.worker.flowserve.device.cpu_attention import AttentionPlan, BlockSizes
from services.worker.flowserve.device.cpu_kv import KVCache, bytes_per_block
from services.worker.flowserve.device.cpu_linear import FloatLinear, SparseLinears
from services.worker.flowserve.device.device import (
    Embedding,
    Experts,
    Linear,
    Memory,
    Rows,
)
from services.worker.flowserve.mlp import DenseMlp
from services.worker.flowserve.pic import Angles
from services.worker.flowserve.rope import RotaryTable
from services.worker.flowserve.tensorfile import Array, as_floats

_FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16}


class CpuPlan(AttentionPlan):
    """A `Plan`: attention's, and the rotation of its rows."""

    def __init__(
        self,
        config: ModelConfig,
        spans: Sequence[Span],
        kv: KVCache,
        sizes: BlockSizes,
        rotary: RotaryTable,
    ) -> None:
        super().__init__(config, spans, kv, sizes)
        half_cos, half_sin = map(
            torch.from_numpy, rotary.upto(max(span.start + span.length for span in spans) - 1)
        )
        positions = torch.cat([torch.arange(s.start, s.start + s.length) for s in spans])
        cos, sin = half_cos[positions], half_sin[positions]
        self._cos = torch.cat((cos, cos), -1).unsqueeze(1)  # [T, 1, D]
        self._sin = torch.cat((-sin, sin), -1).unsqueeze(1)

    def rotate(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Plan`."""
        return rotate(q, self._cos, self._sin), rotate(k, self._cos, self._sin)


class CpuKV(KVCache):
    """A `KV` of zeros. The operating system hands out its memory page by page, as blocks are first written."""

    def __init__(self, config: ModelConfig, num_blocks: int, page: int, dtype: torch.dtype) -> None:
        super().__init__(config, num_blocks, page, dtype)
        self._config = config
        self._rotary = RotaryTable(config)
        self._sizes = BlockSizes.measure(config)

    def plan(self, spans: Sequence[Span]) -> CpuPlan:
        """See `KV`."""
        return CpuPlan(self._config, spans, self, self._sizes, self._rotary)

    def read_blocks(self, blocks: Sequence[int]) -> npt.NDArray[np.uint8]:
        """See `KV`: [layer][key heads, value heads][page][D] of each block."""
        index = torch.tensor(blocks)
        layers = [x.index_select(0, index).view(torch.uint8).flatten(1) for x in self.layers]
        data: npt.NDArray[np.uint8] = torch.cat(layers, dim=1).numpy()
        return data

    def write_blocks(self, blocks: Sequence[int], data: npt.NDArray[np.uint8]) -> None:
        """See `KV`."""
        index = torch.tensor(blocks)
        parts = torch.from_numpy(data).chunk(len(self.layers), dim=1)
        for layer, part in zip(self.layers, parts, strict=True):
            values = part.contiguous().view(layer.dtype).view(-1, *layer.shape[1:])
            layer.index_copy_(0, index, values)

    def splice(self, splice: Splice, angles: Angles) -> None:
        """See `SplicingKV`."""
        cells.move(self.layers, self.page, splice, angles, CpuDevice.place)


class CpuDevice:
    """See `Device`."""

    name = "cpu"
    place = torch.device("cpu")
    page = 16
    collective = "gloo"
    reads_prepared = True

    @property
    def description(self) -> str:
        """What computes, in a few words."""
        return f"torch, {torch.get_num_threads()} threads"

    def memory(self) -> Memory:
        """Of the machine, as the system counts it."""
        unit = os.sysconf("SC_PAGE_SIZE")
        return Memory(os.sysconf("SC_AVPHYS_PAGES") * unit, os.sysconf("SC_PHYS_PAGES") * unit)

    def activations(self, dtype: str) -> torch.dtype:
        """fp32 always."""
        return torch.float32

    def tensor(self, array: npt.NDArray[Any], dtype: torch.dtype | None = None) -> torch.Tensor:
        """A copy: torch wants memory that it may write."""
        return torch.tensor(array, dtype=dtype)

    def floats(self, x: torch.Tensor) -> Floats:
        """The tensor's own memory."""
        floats: Floats = x.float().numpy()
        return floats

    def linear(self, parts: Iterable[Rows], size: tuple[int, int], dtype: str) -> Linear:
        """In fp32 or bf16; W8A8 is made of prepared weights (`torch_weights.from_prepared`)."""
        if dtype not in _FLOATS:
            raise ModelError(f"the CPU multiplies floats in {', '.join(_FLOATS)}, not {dtype!r}")
        return FloatLinear(parts, size, _FLOATS[dtype])

    def embedding(self, stored: Array, stored_dtype: str, dtype: str) -> Embedding:
        """The file's own pages."""

        def embed(ids: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(as_floats(stored[ids.numpy()], stored_dtype))

        return embed

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """See `Device`."""
        return rms_norm(x, weight, eps)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Device`."""
        total = residual + x
        return rms_norm(total, weight, eps), total

    def swiglu(self, gate_up: torch.Tensor) -> torch.Tensor:
        """See `Device`."""
        return swiglu(gate_up)

    def experts(
        self,
        gate_up: Iterable[Floats],
        down: Iterable[Floats],
        size: tuple[int, int, int],
        dtype: str,
    ) -> Experts:
        """One product for each expert that a row has chosen."""
        _, width, hidden = size
        gate_ups = [self.linear([(weight, None)], (2 * hidden, width), dtype) for weight in gate_up]
        downs = [self.linear([(weight, None)], (width, hidden), dtype) for weight in down]
        return SparseLinears([DenseMlp(self, *each) for each in zip(gate_ups, downs, strict=True)])

    def route(
        self, logits: torch.Tensor, num_chosen: int, *, renormalise: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Device`: weights in fp32, numbers in int64."""
        return route(logits, num_chosen, renormalise=renormalise)

    def bytes_per_block(self, config: ModelConfig, page: int, dtype: str) -> int:
        """See `Device`."""
        return bytes_per_block(config, page, _kv_dtype(dtype))

    def allocate_kv(self, config: ModelConfig, num_blocks: int, page: int, dtype: str) -> CpuKV:
        """See `Device`; keys and values are fp32 in fp32, else bfloat16."""
        return CpuKV(config, num_blocks, page, _kv_dtype(dtype))


def _kv_dtype(dtype: str) -> torch.dtype:
    return torch.float32 if dtype == "fp32" else torch.bfloat16


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


def route(
    logits: torch.Tensor, num_chosen: int, *, renormalise: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """logits fp32 [T, experts] -> weights fp32 [T, k] and experts int64 [T, k], by falling probability; of equal ones,
    by rising number, so that the choice is one in any batch."""
    probabilities = logits.softmax(dim=-1)
    weights, chosen = probabilities.sort(dim=-1, descending=True, stable=True)
    weights, chosen = weights[:, :num_chosen].clone(), chosen[:, :num_chosen]
    if renormalise:
        weights.div_(weights.sum(dim=-1, keepdim=True))
    return weights, chosen


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., n], weight broadcastable to x -> x over its root mean square along n, times weight."""
    return (x * x.square().mean(dim=-1, keepdim=True).add_(eps).rsqrt_()).mul_(weight)
