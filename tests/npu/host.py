"""The hardware that is missing: `torch.npu`'s memory, streams and graphs on the CPU, for operators on CPU tensors.

It stands behind the protocol of `npu_runtime.py`, below all code of ours. A graph keeps what an NPU's keeps: the calls
of operators with their tensors, and nothing of the Python around them. So what our code changes between two replays
other than in place, or reads from the device while it records, shows as a wrong result or an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from services.worker.flowserve.device.npu_runtime import HostInputs

# What torch-npu lets `NPUGraph.update` change, by operator (`UPDATE_SPECS` in `_npugraph_handlers/ifa_handler.py`).
UPDATED = {"npu_fused_infer_attention_score_v2.default": {"actual_seq_qlen", "actual_seq_kvlen"}}
# A tensor made of the host's numbers, and a number read from the device: neither can be recorded.
UNRECORDABLE = ("lift_fresh", "_local_scalar_dense", "nonzero")


class GraphError(RuntimeError):
    """What on an NPU would fail, or wait for ever."""


@dataclass
class Call:
    """A recorded call and the tensors that it wrote to."""

    function: Callable[..., Any]
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: list[torch.Tensor]  # but for those that are its arguments, or views of them

    def repeat(self) -> None:
        """Write the same tensors anew."""
        new = self.function(*self.args, **self.kwargs)
        for old, value in zip(self.results, _made(new, self.args, self.kwargs), strict=True):
            old.copy_(value)


class HostGraph(TorchDispatchMode):  # type: ignore[no-untyped-call]  # of torch's own
    """`torch.npu.NPUGraph`, recorded with `auto_dispatch_capture=True`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Call] = []
        self._is_updated = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.__name__
        if name.partition(".")[0] in UNRECORDABLE:
            raise GraphError(f"{name} in a graph")
        result = func(*args, **kwargs)
        made = _made(result, args, kwargs)
        self.calls.append(Call(func, name, args, dict(kwargs), made))
        return result

    def poison(self) -> None:
        """Nothing is computed while it is recorded."""
        for call in self.calls:
            for tensor in call.results:
                tensor.fill_(torch.nan if tensor.is_floating_point() else 0)

    def update(self, cpu_update_input: Sequence[Mapping[str, Sequence[int]]]) -> None:
        calls = [call for call in self.calls if call.name in UPDATED]
        updates = list(cpu_update_input) * (len(calls) if len(cpu_update_input) == 1 else 1)
        if len(updates) != len(calls):
            raise GraphError(f"{len(updates)} updates for {len(calls)} calls")
        for call, update in zip(calls, updates, strict=True):
            if not update.keys() <= UPDATED[call.name] & call.kwargs.keys():
                raise GraphError(f"{call.name} has no {sorted(update)} to be updated")
            call.kwargs |= {key: list(value) for key, value in update.items()}
        self._is_updated = True

    def replay(self) -> None:
        if not self._is_updated and any(call.name in UPDATED for call in self.calls):
            raise GraphError("a replay waits for an update that does not come")
        self._is_updated = False
        for call in self.calls:
            call.repeat()


class HostRuntime:
    """`services.worker.flowserve.device.npu_runtime.Runtime` on the CPU."""

    name = "no NPU"
    place = torch.device("cpu")

    def memory(self) -> tuple[int, int]:
        return 24 << 30, 64 << 30

    def synchronize(self) -> None:
        """Nothing is ever under way."""

    def graph(self) -> HostInputs:
        return HostGraph()

    @contextmanager
    def recording(self, graph: HostInputs) -> Iterator[None]:
        assert isinstance(graph, HostGraph)
        with graph:
            yield
        graph.poison()


def _made(result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors of a result that are neither arguments nor views of them."""
    given = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
    return [t for t in _tensors(result) if t.untyped_storage().data_ptr() not in given]


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]
