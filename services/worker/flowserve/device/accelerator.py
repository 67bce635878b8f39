"""What a GPU and an NPU do alike: memory that they read by themselves, embeddings and rotary tables in their own, and
the room for a KV cache.

This module must not know either's library, layers or weights' names.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as functional

from services.worker.flowserve.config import ModelConfig
from services.worker.flowserve.decoder import Span
from services.worker.flowserve.device.device import Embedding, Memory
from services.worker.flowserve.rope import RotaryTable
from services.worker.flowserve.tensorfile import Array, as_floats
from shared.errors import InvalidRequest

_ROWS_AT_ONCE: Final = 4096  # of an embedding, on their way through the host's memory


class Rotary:
    """The rotary table on the device. It grows with the longest context; rows once given never change. `scale` is the
    factor that is in it."""

    def __init__(self, config: ModelConfig, place: torch.device) -> None:
        self.place = place
        self._table = RotaryTable(config)
        self.scale = self._table.scale
        self.cos = torch.empty((0, config.head_dim // 2), device=place)
        self.sin = self.cos

    def reach(self, position: int) -> None:
        """See to it that `cos` and `sin`, fp32 [positions, D / 2], hold `position`."""
        if len(self.cos) <= position:
            cos, sin = self._table.upto(max(position, 2 * len(self.cos)))
            self.cos, self.sin = (upload(x, self.place) for x in (cos, sin))


def host_tensor(shape: tuple[int, ...], dtype: torch.dtype, place: torch.device) -> torch.Tensor:
    """Memory of the host that the device reads and writes by itself. torch keeps what is let go of for the next call,
    and not before the copies that use it are done."""
    return torch.empty(shape, dtype=dtype, pin_memory=place.type != "cpu")


def upload(array: npt.NDArray[Any], place: torch.device) -> torch.Tensor:
    """A copy on the device, which may still be under way; what is computed afterwards comes after it."""
    dtype = torch.from_numpy(np.empty(0, array.dtype)).dtype
    host = host_tensor(array.shape, dtype, place)
    host.numpy()[...] = array
    return host.to(place, non_blocking=True)


def embedding(
    stored: Array, stored_dtype: str, dtype: torch.dtype, place: torch.device
) -> Embedding:
    """`Device.embedding`: a copy in `dtype` on the device, some rows at a time."""
    weight = torch.empty(stored.shape, dtype=dtype, device=place)
    for begin in range(0, len(stored), _ROWS_AT_ONCE):
        rows = slice(begin, begin + _ROWS_AT_ONCE)
        weight[rows] = torch.from_numpy(as_floats(stored[rows], stored_dtype)).to(dtype)

    def embed(ids: torch.Tensor) -> torch.Tensor:
        return functional.embedding(ids, weight)

    return embed


def require_room(num_bytes: int, memory: Memory, place: torch.device) -> None:
    """Raises InvalidRequest where a KV cache of `num_bytes` does not fit what is free."""
    if num_bytes > memory.free:
        raise InvalidRequest(
            f"the KV cache takes {num_bytes} bytes, and {place} has {memory.free} free:"
            " lower DEEPFLOW_KV_BYTES or DEEPFLOW_KV_TOKENS"
        )


def pages_of(span: Span, page: int) -> int:
    """Pages that hold a span's rows and all before them."""
    return -(-(span.start + span.length) // page)
