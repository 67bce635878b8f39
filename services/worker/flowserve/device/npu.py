"""The Ascend NPU: torch-npu's operators, called as `torch.ops.npu`, on one card. Written against torch-npu 2.13.0.

Rows are bfloat16. W8A8 is the NPU's own (`npu_linear.py`), not the CPU's. What an operator takes and how is as its
documentation says; where that contradicts itself, the call is not used. This module must not know layers or weights'
names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy.typing as npt
import torch

from services.worker.flowserve.config import ModelConfig, ModelError
from services.worker.flowserve.decoder import Floats
from services.worker.flowserve.device import accelerator
from services.worker.flowserve.device.cpu_kv import bytes_per_block
from services.worker.flowserve.device.device import (
    DecodePlan,
    Embedding,
    Experts,
    Graph,
    Linear,
    Memory,
    Rows,
)
from services.worker.flowserve.device.npu_attention import NUM_SPARE, PAGE, check
from services.worker.flowserve.device.npu_kv import NpuDecodePlan, NpuKV
from services.worker.flowserve.device.npu_linear import make_experts, make_linear
from services.worker.flowserve.device.npu_runtime import AscendRuntime, Runtime
from services.worker.flowserve.tensorfile import Array


class NpuDevice:
    """See `Device`."""

    name = "npu"
    page = PAGE
    collective = "hccl"
    has_graphs = True
    reads_prepared = False

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.place = runtime.place

    @classmethod
    def open(cls, index: int = 0) -> NpuDevice:
        """The NPU `index` of those that this process sees. Raises ModelError saying what is missing."""
        return cls(AscendRuntime(index))

    @property
    def description(self) -> str:
        """What computes, in a few words."""
        return f"{self._runtime.name}, torch {torch.__version__}"

    def memory(self) -> Memory:
        """See `Device`."""
        return Memory(*self._runtime.memory())

    def activations(self, dtype: str) -> torch.dtype:
        """bfloat16 in bf16 and w8a8."""
        if dtype not in ("bf16", "w8a8"):
            raise ModelError(
                f"the NPU serves bf16 and w8a8, not {dtype}: its attention takes 16-bit floats only"
            )
        return torch.bfloat16

    def tensor(self, array: npt.NDArray[Any], dtype: torch.dtype | None = None) -> torch.Tensor:
        """See `Device`: through pinned memory, without waiting."""
        return accelerator.upload(array, self.place).to(dtype)

    def floats(self, x: torch.Tensor) -> Floats:
        """See `Device`."""
        floats: Floats = x.float().cpu().numpy()
        return floats

    def linear(self, parts: Iterable[Rows], size: tuple[int, int], dtype: str) -> Linear:
        """See `Device`."""
        self.activations(dtype)
        return make_linear(parts, size, dtype, self.place)

    def embedding(self, stored: Array, stored_dtype: str, dtype: str) -> Embedding:
        """See `Device`: in bf16, as the rows are."""
        return accelerator.embedding(stored, stored_dtype, self.activations(dtype), self.place)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """See `Device`."""
        normed: torch.Tensor
        normed, _ = torch.ops.npu.npu_rms_norm(x.contiguous(), weight, eps)
        return normed

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Device`."""
        normed, _, total = torch.ops.npu.npu_add_rms_norm(x, residual, weight, eps)
        return normed, total

    def swiglu(self, gate_up: torch.Tensor) -> torch.Tensor:
        """See `Device`."""
        result: torch.Tensor = torch.ops.npu.npu_swiglu(gate_up, -1)
        return result

    def experts(
        self,
        gate_up: Iterable[Floats],
        down: Iterable[Floats],
        size: tuple[int, int, int],
        dtype: str,
    ) -> Experts:
        """See `Device`."""
        self.activations(dtype)
        return make_experts(gate_up, down, size, dtype, self.place)

    def route(
        self, logits: torch.Tensor, num_chosen: int, *, renormalise: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Device`: fp32 and int32. The softmax of the largest is that of all over the sum of the largest."""
        weights, chosen, _ = torch.ops.npu.npu_moe_gating_top_k_softmax_v2(
            logits.float().contiguous(), k=num_chosen, renorm=int(renormalise)
        )
        return weights, chosen

    def bytes_per_block(self, config: ModelConfig, page: int, dtype: str) -> int:
        """See `Device`."""
        return bytes_per_block(config, page, self.activations(dtype))

    def allocate_kv(self, config: ModelConfig, num_blocks: int, page: int, dtype: str) -> NpuKV:
        """See `Device`; keys and values are bfloat16. Raises InvalidRequest where the memory that is free does not hold
        the blocks."""
        check(config, num_blocks, page)
        num_bytes = (num_blocks + NUM_SPARE) * self.bytes_per_block(config, page, dtype)
        accelerator.require_room(num_bytes, self.memory(), self.place)
        return NpuKV(config, num_blocks, page, self._runtime)

    def capture(self, compute: Callable[[], torch.Tensor], plan: DecodePlan) -> Graph:
        """See `Device`."""
        assert isinstance(plan, NpuDecodePlan)
        return NpuGraph(self._runtime, compute, plan)


class NpuGraph:
    """See `Graph`. Its tensors are where they were; the lengths of the sequences are handed over for each replay."""

    def __init__(
        self, runtime: Runtime, compute: Callable[[], torch.Tensor], plan: NpuDecodePlan
    ) -> None:
        self._runtime = runtime
        self._plan = plan
        compute()  # what an operator sets up at its first call is no part of the graph
        runtime.synchronize()
        self._graph = runtime.graph()
        with plan.longest(), runtime.recording(self._graph):
            self._result = compute()

    def replay(self) -> torch.Tensor:
        """See `Graph`. An update changes the recorded calls themselves, so the replay before must be over."""
        self._runtime.synchronize()
        self._graph.update(cpu_update_input=self._plan.host_inputs)
        self._graph.replay()
        return self._result
