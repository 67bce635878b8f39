"""What a decoder asks of a device: memory, products, the small operations between them, attention over pages, graphs.

One protocol, one module for each device behind it; `TorchDecoder` is written over it and names none. Rows are the
tokens of a step, T of them, in one float type (`Device.activations`). This module must not know layers, weights'
names, requests or processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

from services.worker.flowserve.config import ModelConfig
from services.worker.flowserve.decoder import Floats, Span, Splice
from services.worker.flowserve.pic import Angles
from services.worker.flowserve.tensorfile import Array

# A decode step of more rows computes longer than it takes to tell the device what, so it is not recorded.
MAX_GRAPH_ROWS: Final = 256

Rows = tuple[Floats, Floats | None]  # rows of weights fp32 [n, in] and their bias [n]


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of the device."""

    free: int
    total: int


class Linear(Protocol):
    """x [T, in] -> [T, out], both in the device's activations."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...


class Experts(Protocol):
    """A layer's experts, or one rank's slice of each: x [T, width], weights [T, k] and chosen experts [T, k] as `route`
    gave them -> [T, width], the sum over a row's k choices j of weights[:, j] * down(swiglu(gate_up(x))) of expert
    chosen[:, j]."""

    def __call__(
        self, x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor
    ) -> torch.Tensor: ...


class Plan(Protocol):
    """Where a step's rows are, and where they are read and written: made once, used by every layer."""

    def rotate(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """q [T, H, D] and k [T, KH, D], turned by their positions in the pairs (i, i + D / 2). May overwrite both."""
        ...

    def write(self, layer: Any, k: torch.Tensor, v: torch.Tensor) -> None:
        """Store k and v [T, KH, D], views perhaps, in the layer's blocks."""
        ...

    def attend(self, layer: Any, q: torch.Tensor, window: int | None) -> torch.Tensor:
        """Causal attention of q [T, H, D] over what the layer holds of their sequences -> [T, H * D]."""
        ...


class DecodePlan(Plan, Protocol):
    """A plan of up to `num_rows` single rows whose tensors stay where they are, so that a graph may hold them."""

    num_rows: int

    def fill(self, spans: Sequence[Span]) -> bool:
        """Make it the plan of these spans, each of length 1; rows beyond them compute what nobody reads. False where it
        cannot hold them: they have more pages, or the device's attention does not take them in one call."""
        ...


class Embedding(Protocol):
    """ids int64 [T] of the rows it holds -> [T, width] in the device's activations."""

    def __call__(self, ids: torch.Tensor) -> torch.Tensor: ...


class KV(Protocol):
    """The paged cache of one executor's layers: blocks 0 to num_blocks - 1 of `page` tokens. What a layer is made of is
    the device's own business."""

    num_blocks: int
    page: int

    @property
    def layers(self) -> Sequence[Any]: ...

    def plan(self, spans: Sequence[Span]) -> Plan:
        """The plan of one step: decode rows and prompt chunks of any mix of sequences."""
        ...

    def read_blocks(self, blocks: Sequence[int]) -> npt.NDArray[np.uint8]:
        """The blocks' bytes over all layers on the host, [blocks, bytes per block], in the device's own layout."""
        ...

    def write_blocks(self, blocks: Sequence[int], data: npt.NDArray[np.uint8]) -> None:
        """The other way: what `read_blocks` gave, on a device of the same kind, of the same model and page."""
        ...


@runtime_checkable
class SplicingKV(KV, Protocol):
    """A cache that can move keys and values to other positions."""

    def splice(self, splice: Splice, angles: Angles) -> None:
        """Copy cells, see `Splice`; keys turn by `angles`."""
        ...


class GraphKV(KV, Protocol):
    """A cache whose plans may stay where a graph finds them."""

    def decode_plan(self, num_rows: int, num_pages: int) -> DecodePlan:
        """A plan that may be filled anew, for `num_rows` rows of up to `num_pages` pages each."""
        ...


class Graph(Protocol):
    """A recorded computation."""

    def replay(self) -> torch.Tensor:
        """Run it on what its inputs hold now; its result stays valid until the next replay."""
        ...


class Device(Protocol):
    """One accelerator, or the CPU. All calls belong to one thread at a time.

    `name` is cpu, cuda or npu; `page` the tokens of a KV block it likes best; `collective` the backend of
    torch.distributed between devices of its kind; `reads_prepared`: its W8A8 is that of `prepared.py`, in groups, and
    made by `torch_weights.from_prepared`, else `linear` quantises weights by output and activations by row.
    """

    name: str
    place: torch.device
    page: int
    collective: str
    reads_prepared: bool

    @property
    def description(self) -> str:
        """What computes, in a few words ("NVIDIA H100, torch 2.13.0")."""
        ...

    def memory(self) -> Memory:
        """What is free now, and there in all."""
        ...

    def activations(self, dtype: str) -> torch.dtype:
        """The type of rows between products when a model is served in `dtype` (w8a8, fp32, bf16). Raises ModelError
        for one that it cannot serve, saying why."""
        ...

    def tensor(self, array: npt.NDArray[Any], dtype: torch.dtype | None = None) -> torch.Tensor:
        """A copy on the device, cast to `dtype` there."""
        ...

    def floats(self, x: torch.Tensor) -> Floats:
        """A copy in fp32 on the host, once it is computed."""
        ...

    # ------------------------------------------------------------------------------------------------ row by row

    def linear(self, parts: Iterable[Rows], size: tuple[int, int], dtype: str) -> Linear:
        """The product with weights [out, in] = `size`, made of `parts` stacked along the outputs. They are consumed
        one by one, so that a lazy iterable keeps only one stored tensor alive at a time. Routers are asked for in bf16
        where the model is served in w8a8."""
        ...

    def embedding(self, stored: Array, stored_dtype: str, dtype: str) -> Embedding:
        """Of the rows [n, width] of a model that is served in `dtype`, as its checkpoint stores them."""
        ...

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x [..., n] over its root mean square along n, times weight [n]."""
        ...

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(rms_norm(residual + x), residual + x). May overwrite both."""
        ...

    def swiglu(self, gate_up: torch.Tensor) -> torch.Tensor:
        """[T, 2 * n], the gate's half first -> silu(gate) * up, [T, n]."""
        ...

    # ---------------------------------------------------------------------------------------- mixtures of experts

    def experts(
        self,
        gate_up: Iterable[Floats],
        down: Iterable[Floats],
        size: tuple[int, int, int],
        dtype: str,
    ) -> Experts:
        """The experts of one layer, (experts, width, hidden) = `size` of them: `gate_up` gives [2 * hidden, width] of
        each in turn, the gate's half first, then `down` gives [width, hidden] of each. Both are lazy, one matrix at a
        time, and all of `gate_up` is consumed before `down`. No expert has biases."""
        ...

    def route(
        self, logits: torch.Tensor, num_chosen: int, *, renormalise: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """logits [T, experts] -> weights [T, k] and the numbers of the chosen experts [T, k], k = `num_chosen`: the
        largest of softmax(logits), the largest first, over their sum where `renormalise`. In which types is the
        device's own business: only its `Experts` reads them."""
        ...

    # ------------------------------------------------------------------------------------------------- attention

    def bytes_per_block(self, config: ModelConfig, page: int, dtype: str) -> int:
        """Memory of one KV block over all layers of `config` when served in `dtype`."""
        ...

    def allocate_kv(self, config: ModelConfig, num_blocks: int, page: int, dtype: str) -> KV:
        """A cache of blocks 0 to num_blocks - 1, whose cells hold finite numbers. Raises ModelError for a page that
        the device's attention cannot read, InvalidRequest where there is no memory for it."""
        ...


@runtime_checkable
class GraphDevice(Device, Protocol):
    """A device that records steps, if it `has_graphs`."""

    has_graphs: bool

    def allocate_kv(self, config: ModelConfig, num_blocks: int, page: int, dtype: str) -> GraphKV:
        """See `Device`."""
        ...

    def capture(self, compute: Callable[[], torch.Tensor], plan: DecodePlan) -> Graph:
        """Record `compute`, which reads `plan` and tensors that stay where they are."""
        ...


def as_graph_device(device: Device) -> GraphDevice | None:
    """The device, if it records steps."""
    return device if isinstance(device, GraphDevice) and device.has_graphs else None
