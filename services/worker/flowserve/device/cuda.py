"""An NVIDIA GPU: cuBLAS, torch's own operations, Triton's kernels for attention where they run, CUDA graphs.

Rows are bf16 between the products (fp32 where the model is served in that), sums and norms fp32. Everything goes into
the thread's current stream, in order; of what a step asks for only `floats` waits, besides it `read_blocks`, a
recording, and what loads weights. Sums are in the order that the libraries choose, so a row's last bits may depend on
its batch. This module must not know layers or weights' names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy.typing as npt
import torch
import torch.nn.functional as functional

from services.worker.flowserve.config import ModelConfig, ModelError
from services.worker.flowserve.decoder import Floats
from services.worker.flowserve.device import accelerator
from services.worker.flowserve.device.cpu_kv import bytes_per_block
from services.worker.flowserve.device.cuda_linear import (
    CudaExperts,
    CudaInt8Linear,
    CudaLinear,
    swiglu,
)
from services.worker.flowserve.device.device import (
    DecodePlan,
    Embedding,
    Experts,
    Graph,
    Linear,
    Memory,
    Rows,
)
from services.worker.flowserve.device.paged import NUM_SPARE, PagedKV, wait
from services.worker.flowserve.tensorfile import Array
from shared import log

if TYPE_CHECKING:
    from torch.cuda import _POOL_HANDLE

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "w8a8": torch.bfloat16}
_BFLOAT16_SINCE = (8, 0)  # compute capability: Ampere


class CudaGraph:
    """A `Graph`. All graphs of a device share the memory of one pool, so a result is gone with any other's replay.

    What is to be recorded runs twice before, beside the usual stream, so that libraries have their workspaces and
    Triton its kernels; it may therefore write only what it would write again.
    """

    def __init__(
        self, compute: Callable[[], torch.Tensor], place: torch.device, pool: _POOL_HANDLE
    ) -> None:
        current = torch.cuda.current_stream(place)
        beside = torch.cuda.Stream(place)  # type: ignore[no-untyped-call]
        beside.wait_stream(current)
        with torch.cuda.stream(beside):
            for _ in range(2):
                compute()
        current.wait_stream(beside)
        self._graph = torch.cuda.CUDAGraph()
        # What other threads ask of CUDA meanwhile, as NCCL's watchdog does, is none of this recording's business.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._result = compute()

    def replay(self) -> torch.Tensor:
        """See `Graph`."""
        self._graph.replay()
        return self._result


class CudaDevice:
    """See `Device`. `place` may also be the CPU, on which all but graphs, pinned memory and kernels is the same."""

    name = "cuda"
    page = 16
    collective = "nccl"
    reads_prepared = False

    def __init__(self, place: torch.device) -> None:
        self.place = place
        self.has_graphs = place.type == "cuda"
        self._pool: _POOL_HANDLE | None = None

    @classmethod
    def open(cls, index: int = 0) -> CudaDevice:
        """GPU `index` of those that this process sees. Raises ModelError saying what is missing for it."""
        if (why_not := available(index)) is not None:
            raise ModelError(f"no CUDA device {index}: {why_not}")
        place = torch.device("cuda", index)
        torch.cuda.set_device(place)
        return cls(place)

    @property
    def description(self) -> str:
        """What computes, in a few words."""
        if self.place.type != "cuda":
            return f"torch {torch.__version__} as on CUDA, on the CPU"
        return f"{torch.cuda.get_device_name(self.place)}, torch {torch.__version__}"

    def memory(self) -> Memory:
        """As the driver counts it, with all processes' use."""
        free, total = torch.cuda.mem_get_info(self.place)
        return Memory(free, total)

    def activations(self, dtype: str) -> torch.dtype:
        """bf16, but fp32 in fp32."""
        if dtype not in _DTYPES:
            raise ModelError(f"CUDA serves {', '.join(_DTYPES)}, not {dtype!r}")
        if dtype != "fp32" and self.place.type == "cuda":
            capability = torch.cuda.get_device_capability(self.place)
            if capability < _BFLOAT16_SINCE:
                name = torch.cuda.get_device_name(self.place)
                raise ModelError(
                    f"{name} does not multiply bfloat16, which {dtype} needs; serve fp32"
                )
        return _DTYPES[dtype]

    def tensor(self, array: npt.NDArray[Any], dtype: torch.dtype | None = None) -> torch.Tensor:
        """See `Device`: through pinned memory, without waiting."""
        return accelerator.upload(array, self.place).to(dtype)

    def floats(self, x: torch.Tensor) -> Floats:
        """See `Device`: through pinned memory."""
        host = accelerator.host_tensor(tuple(x.shape), torch.float32, self.place)
        host.copy_(x.float(), non_blocking=True)
        wait(self.place)
        floats: Floats = host.numpy()
        return floats

    def linear(self, parts: Iterable[Rows], size: tuple[int, int], dtype: str) -> Linear:
        """See `Device`."""
        if dtype == "w8a8":
            return CudaInt8Linear(parts, size, self.place)
        return CudaLinear(parts, size, self.activations(dtype), self.place)

    def embedding(self, stored: Array, stored_dtype: str, dtype: str) -> Embedding:
        """A copy on the device."""
        return accelerator.embedding(stored, stored_dtype, self.activations(dtype), self.place)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """See `Device`."""
        return functional.rms_norm(x, weight.shape, weight, eps)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Device`."""
        total = residual + x
        return self.rms_norm(total, weight, eps), total

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
        """See `Device`; in w8a8 the experts stay bf16, for want of a grouped product in int8."""
        return CudaExperts(gate_up, down, size, self.activations(dtype), self.place)

    def route(
        self, logits: torch.Tensor, num_chosen: int, *, renormalise: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Device`: weights in fp32, numbers in int64."""
        weights, chosen = logits.float().softmax(dim=-1).topk(num_chosen, dim=-1)
        if renormalise:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights, chosen

    def bytes_per_block(self, config: ModelConfig, page: int, dtype: str) -> int:
        """See `Device`."""
        return bytes_per_block(config, page, self.activations(dtype))

    def allocate_kv(self, config: ModelConfig, num_blocks: int, page: int, dtype: str) -> PagedKV:
        """See `Device`; any page will do. Kernels compute if they compile here and agree with plain torch on a small
        problem of this model's shape, which is found out now, not in the middle of a step. Raises InvalidRequest where
        the memory that is free does not hold the blocks."""
        activations = self.activations(dtype)
        kind = self._kind_of_kv(config, page, activations)
        if self.place.type == "cuda":
            torch.cuda.empty_cache()  # what loading has left to torch counts as taken
            num_bytes = (num_blocks + NUM_SPARE) * self.bytes_per_block(config, page, dtype)
            accelerator.require_room(num_bytes, self.memory(), self.place)
        return kind(config, num_blocks, page, activations, self.place)

    def _kind_of_kv(self, config: ModelConfig, page: int, dtype: torch.dtype) -> type[PagedKV]:
        if self.place.type != "cuda":
            return PagedKV
        torch.cuda.set_device(self.place)
        try:
            from services.worker.flowserve.device.paged_kernels import KernelKV, check

            check(config, page, dtype, self.place)
        except (
            Exception
        ) as error:  # no Triton, no C compiler, a card that it does not know, other numbers
            log.note("kernels_unused", device=str(self.place), why=repr(error))
            return PagedKV
        return KernelKV

    def capture(self, compute: Callable[[], torch.Tensor], plan: DecodePlan) -> Graph:
        """See `Device`."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        return CudaGraph(compute, self.place, self._pool)


def available(index: int = 0) -> str | None:
    """Why GPU `index` cannot be had, None if it can."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no driver for CUDA {torch.version.cuda}, or no GPU"
    if index >= torch.cuda.device_count():
        return f"this process sees {torch.cuda.device_count()}"
    return None
