"""Graphs without a GPU: a `CudaDevice` on the CPU that records operations and replays them on the same memory.

As with CUDA, a replay runs no Python: every value that the recorded function worked out on the host is what it was, and
every tensor lies where it lay. Before a replay all that the recording made is spoilt, so that what would be read from
the last one shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from services.worker.flowserve.device.cuda import CudaDevice
from services.worker.flowserve.device.device import DecodePlan

# What a graph cannot hold: a number that goes to the host, and one that comes from it.
_FORBIDDEN = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.lift_fresh.default)


class Recording(TorchDispatchMode):
    """A `Graph`."""

    def __init__(self, compute: Callable[[], torch.Tensor]) -> None:
        super().__init__()
        self._operations: list[tuple[Any, Any, dict[str, Any], list[torch.Tensor]]] = []
        with self:
            self._result = compute()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in _FORBIDDEN, f"{func} in a graph"
        out = func(*args, **(kwargs or {}))
        self._operations.append((func, args, kwargs or {}, _made(out, (args, kwargs))))
        return out

    def replay(self) -> torch.Tensor:
        """See `Graph`."""
        for *_, made in self._operations:
            for x in made:
                x.fill_(torch.nan if x.is_floating_point() else 77)
        for func, args, kwargs, made in self._operations:
            out = func(*args, **kwargs)
            for x, new in zip(made, _made(out, (args, kwargs)), strict=True):
                x.copy_(new)
        return self._result


class RecordingDevice(CudaDevice):
    """A `Device` on the CPU with graphs."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.has_graphs = True

    def capture(self, compute: Callable[[], torch.Tensor], plan: DecodePlan) -> Recording:
        """See `Device`."""
        return Recording(compute)


def _made(out: Any, given: Any) -> list[torch.Tensor]:
    """What an operation made anew: no argument, nor view of one."""
    places = {x.untyped_storage().data_ptr() for x in _tensors(given)}
    return [x for x in _tensors(out) if x.untyped_storage().data_ptr() not in places]


def _tensors(value: Any) -> list[torch.Tensor]:
    def walk(value: Any) -> Iterator[torch.Tensor]:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            for each in value:
                yield from walk(each)
        elif isinstance(value, dict):
            yield from walk(list(value.values()))

    return list(walk(value))
