"""Which device serves: the one asked for, or the best that this machine seems to have.

It looks without loading torch: a CPU that computes in native kernels never needs it. So what it picks may still fail
to open, which says why then. This module must not know models.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final

from services.worker.flowserve.config import ModelError
from services.worker.flowserve.device.torch_build import TorchBuild
from services.worker.settings import DEVICES

if TYPE_CHECKING:
    from services.worker.flowserve.device.device import Device

PAGES: Final = {
    "cpu": 16,
    "cuda": 16,
    "npu": 128,
}  # tokens of a KV block that the device's attention reads best


@dataclass(frozen=True, slots=True)
class Picked:
    """A device's name (cpu, cuda or npu) and the reason in words."""

    name: str
    why: str


def pick(wanted: str) -> Picked:
    """`wanted` itself, or for auto the first of npu, cuda and cpu that seems to be there. Raises ModelError for a name
    that is none."""
    if wanted not in DEVICES:
        raise ModelError(f"unknown device {wanted!r}; there are {', '.join(DEVICES)}")
    if wanted != "auto":
        return Picked(wanted, "it is set")
    missing = []
    for name, why_not in (("npu", _why_no_npu()), ("cuda", _why_no_cuda())):
        if why_not is None:
            return Picked(name, "it is there")
        missing.append(f"{name}: {why_not}")
    return Picked("cpu", "; ".join(missing))


def open_device(name: str, index: int = 0) -> Device:
    """The device cpu, cuda or npu, number `index` of those that this process sees. Raises ModelError saying what is
    missing for it."""
    if name == "npu":
        from services.worker.flowserve.device.npu import NpuDevice

        return NpuDevice.open(index)
    if name == "cuda":
        from services.worker.flowserve.device.cuda import CudaDevice

        return CudaDevice.open(index)
    from services.worker.flowserve.device.cpu import CpuDevice

    return CpuDevice()


def _why_no_npu() -> str | None:
    if os.environ.get("ASCEND_RT_VISIBLE_DEVICES") == "":
        return "ASCEND_RT_VISIBLE_DEVICES hides all"
    if not any(Path("/dev").glob("davinci[0-9]*")):
        return "no /dev/davinci*"
    return None if find_spec("torch_npu") else "torch-npu is not installed"


def _why_no_cuda() -> str | None:
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return "CUDA_VISIBLE_DEVICES hides all"
    if not any(Path("/dev").glob("nvidia[0-9]*")):
        return "no /dev/nvidia*"
    build = TorchBuild.installed()
    return None if build and build.cuda else "the torch installed here is built without CUDA"
