"""Ascend's runtime: all that is called on `torch.npu` rather than as an operator, behind one small protocol.

The only module that imports `torch_npu`, by hand and when a device is opened. What the operators compute on, memory,
streams and graphs, is here; without an NPU the operators still have their schemas, and this protocol a stand-in. This
module must not know operators or models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from services.worker.flowserve.config import ModelError

_INSTALL = "pip install 'deepflow[npu]'"
_CANN = "is CANN installed, and its set_env.sh sourced?"


class HostInputs(Protocol):
    """A recorded computation, some of whose inputs are lists on the host: `torch.npu.NPUGraph`."""

    def update(self, cpu_update_input: Sequence[Mapping[str, Sequence[int]]]) -> None:
        """The lists by the names of the arguments, for each recorded call of an operator that has such, in order, or
        once for all. Each replay needs one update."""
        ...

    def replay(self) -> None: ...


class Runtime(Protocol):
    """One NPU. `name` is the card's, `place` where its tensors are."""

    name: str
    place: torch.device

    def memory(self) -> tuple[int, int]:
        """Bytes free and in all."""
        ...

    def synchronize(self) -> None:
        """Wait for all that was launched."""
        ...

    def graph(self) -> HostInputs:
        """An empty graph."""
        ...

    def recording(self, graph: HostInputs) -> AbstractContextManager[None]:
        """What is launched meanwhile is not computed but recorded in `graph`."""
        ...


class AscendRuntime:
    """See `Runtime`. Opening it claims the device for this process. Raises ModelError saying what is missing."""

    def __init__(self, index: int = 0) -> None:
        try:
            import torch_npu
        except ModuleNotFoundError as error:
            if error.name != "torch_npu":
                raise ModelError(f"torch-npu does not load: {error}; {_INSTALL}") from error
            raise ModelError(f"torch-npu is not installed: {_INSTALL}, and install CANN") from error
        except (ImportError, OSError, RuntimeError) as error:
            raise ModelError(f"torch-npu does not load: {error}; {_CANN}") from error
        self._npu: Any = torch_npu.npu
        if not self._npu.is_available():
            raise ModelError(f"torch-npu sees no device; {_CANN} Is the driver loaded?")
        num_devices = self._npu.device_count()
        if index >= num_devices:
            raise ModelError(f"there is no NPU {index}: torch-npu sees {num_devices}")
        try:
            # With compilation on, an operator is compiled anew for every shape, and rotation takes heads of 128 only.
            self._npu.set_compile_mode(jit_compile=False)
            self._npu.config.allow_internal_format = (
                True  # else casting weights to one does nothing
            )
            self._npu.set_device(index)
            self.name: str = self._npu.get_device_name(index)
        except RuntimeError as error:
            raise ModelError(f"NPU {index} does not open: {error}") from error
        if not self._npu.is_bf16_supported():
            raise ModelError(f"{self.name} has no bfloat16, in which models are served")
        self.place = torch.device("npu", index)
        self._pool: Any = None

    def memory(self) -> tuple[int, int]:
        """See `Runtime`; what loading has left to torch's allocator is given back before it is counted."""
        self._npu.empty_cache()
        free, total = self._npu.mem_get_info(self.place)
        return int(free), int(total)

    def synchronize(self) -> None:
        """See `Runtime`."""
        self._npu.synchronize()

    def graph(self) -> HostInputs:
        """See `Runtime`."""
        graph: HostInputs = self._npu.NPUGraph()
        return graph

    def recording(self, graph: HostInputs) -> AbstractContextManager[None]:
        """See `Runtime`. All graphs share one pool of memory: one of them runs at a time. What other threads ask of the
        NPU meanwhile, as HCCL's do, is none of a recording's business."""
        if self._pool is None:
            self._pool = self._npu.graph_pool_handle()
        context: AbstractContextManager[None] = self._npu.graph(
            graph,
            pool=self._pool,
            capture_error_mode="thread_local",
            auto_dispatch_capture=True,
        )
        return context
