"""A device's memory as DistFlow takes it: staged through the host, pinned where the device knows that.

It works for every device torch can copy from and to (`cpu`, `cuda`, `npu`), over every way DistFlow has, at the price
of one copy more on each side. Never run on an accelerator so far. Ways from device to device without the host (CUDA
IPC, NCCL, HCCL) would be a `shared.distflow.backend.Backend` each; there is none yet.
"""

from __future__ import annotations

import threading
from typing import Final

import torch


class TensorMemory:
    """The bytes of a contiguous tensor, as a `shared.distflow.memory.Memory`. Raises ValueError for one that is not.

    Copies wait for the device: the bytes are there when a call returns. What else uses the tensor meanwhile is the
    caller's business, as with any memory that is registered.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        if not tensor.is_contiguous():
            raise ValueError("a tensor has to be contiguous to be registered")
        self._bytes = tensor.detach().view(-1).view(torch.uint8)
        self._is_pinnable = tensor.device.type == "cuda" and torch.cuda.is_available()
        self._lock = threading.Lock()  # one stream of copies at a time
        self.num_bytes: Final = self._bytes.numel()

    def staging(self, num_bytes: int) -> memoryview:
        """See `Memory`."""
        buffer = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._is_pinnable)
        return buffer.numpy().data

    def load(self, offset: int, into: memoryview) -> None:
        """See `Memory`."""
        with self._lock:
            target = torch.frombuffer(into, dtype=torch.uint8)
            target.copy_(self._bytes[offset : offset + len(into)])

    def save(self, offset: int, data: memoryview) -> None:
        """See `Memory`."""
        with self._lock:
            source = torch.frombuffer(bytearray(data) if data.readonly else data, dtype=torch.uint8)
            self._bytes[offset : offset + len(data)].copy_(source)
