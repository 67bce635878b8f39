"""Settings of the pod host and of its Task Executors: one frozen value, read once from `DEEPFLOW_*` variables.

A pod host hands its own environment down to its TEs and adds the variables that make a TE one (`for_te`). This
module must not know processes, the bus or torch.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shared.arena.place import arena_dir
from shared.config import ConfigError, Reader, Settings
from shared.distflow.backend import BACKENDS

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

DEVICES = ("auto", "cpu", "cuda", "npu")
DTYPES = ("auto", "w8a8", "fp32", "bf16")
KERNELS = ("auto", "native", "torch")
ROLES = ("colocated", "prefill", "decode")
_KV_BYTES = 1 << 30
_MAX_TES = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings(Settings):
    """What a pod host needs, and what all its TEs have in common."""

    models: tuple[str, ...]
    min_tes: int  # of each model, that both prefill and decode: always up
    max_tes: int  # and with demand; equal: a fixed number
    num_prefill: int  # TEs of each model for the one
    num_decode: int  # and for the other
    device: str  # auto: the best there is
    tp: int  # executors that share each layer of a model
    pp: int  # stages of layers, each of `tp` executors
    dtype: str  # auto: what the device computes best at a quality within the bars
    kernels: str  # what computes w8a8; auto: native where this processor and installation have it
    kv_bytes: int  # per TE; counts only where `kv_tokens` is 0
    kv_tokens: int  # per TE
    max_num_seqs: int
    max_batched_tokens: int
    asynchronous: bool  # plan a step while the one before it runs
    speculation: int  # guesses a step may check for one choice; 0: none
    max_waiting: int
    threads: int  # compute threads of one executor; 0: the pod host shares the cores among its TEs
    zygote: bool  # fork TEs from a process that has imported what they need
    warm_tes: int  # pre-warmed TEs, of no model yet
    fork: bool  # take weights from a running TE, where this host has none
    fork_bytes_s: float  # so fast a TE that has requests gives its weights to others; 0: no limit
    preload_bytes: int  # of weights kept in the page cache for models that are not up; -1: a quarter of the memory
    pod_bytes: int  # what all TEs and weights may take; 0: four fifths of the memory
    pod_tes: int  # at most so many TEs
    migrate_after_s: float  # a TE that is scaled down lets its requests go on elsewhere after this
    load_timeout_s: float  # a TE that is not ready by then is replaced
    arena_dir: Path  # the host's, shared with its cache service
    fabric: str  # the address that DistFlow binds to
    distflow: str  # how bytes travel besides sockets: nothing, or mooncake
    fetch_timeout_s: (
        float  # a fetch may take so long, or a quarter of what computing takes; then it is computed
    )
    fetch_min_s: float  # what is computed within that time is not asked for elsewhere

    @classmethod
    def read(cls, reader: Reader) -> dict[str, Any]:
        """The fields' values. Raises ConfigError."""
        # A model that is named twice is served by one group of TEs.
        names = reader.text("DEEPFLOW_MODELS", "smollm2-135m").split(",")
        models = tuple(dict.fromkeys(name.strip() for name in names if name.strip()))
        if not models:
            raise ConfigError("DEEPFLOW_MODELS names no model")
        num_prefill, num_decode = read_pd(reader.text("DEEPFLOW_PD", ""))
        split = num_prefill > 0
        min_tes, max_tes = read_range(reader.text("DEEPFLOW_WORKERS", "0" if split else "1"))
        if not max_tes and not split:
            raise ConfigError("DEEPFLOW_WORKERS=0: nobody may serve; 0..1 starts one when asked")
        max_num_seqs = reader.integer("DEEPFLOW_MAX_NUM_SEQS", 64, 1, 4096)
        dtype = reader.choice("DEEPFLOW_DTYPE", "auto", DTYPES)
        kernels = read_kernels(reader)
        read_graphs(reader)  # a bad value is told before a TE is started
        tp = reader.integer("DEEPFLOW_TP", 1, 1, 64)
        pp = reader.integer("DEEPFLOW_PP", 1, 1, 64)
        common = Settings.read(reader)
        return common | {
            "models": models,
            "min_tes": min_tes,
            "max_tes": max_tes,
            "num_prefill": num_prefill,
            "num_decode": num_decode,
            "device": reader.choice("DEEPFLOW_DEVICE", "auto", DEVICES),
            "tp": tp,
            "pp": pp,
            "dtype": dtype,
            "kernels": kernels,
            "kv_bytes": reader.integer("DEEPFLOW_KV_BYTES", _KV_BYTES, 1, 1 << 50),
            "kv_tokens": reader.integer("DEEPFLOW_KV_TOKENS", 0, 0, 1 << 40),
            "max_num_seqs": max_num_seqs,
            # Every sequence of the batch moves on in every step.
            "max_batched_tokens": reader.integer(
                "DEEPFLOW_MAX_BATCHED_TOKENS", max(256, max_num_seqs), max_num_seqs, 1 << 20
            ),
            "asynchronous": reader.flag("DEEPFLOW_ASYNC", False),
            "speculation": reader.integer("DEEPFLOW_SPECULATION", 0, 0, 64),
            "max_waiting": reader.integer("DEEPFLOW_MAX_WAITING", 256, 0, 1 << 20),
            "threads": reader.integer("DEEPFLOW_THREADS", 0, 0, 1024),
            "zygote": reader.flag("DEEPFLOW_ZYGOTE", True),
            "warm_tes": reader.integer("DEEPFLOW_WARM_TES", 1, 0, _MAX_TES),
            "fork": reader.flag("DEEPFLOW_FORK", True),
            "fork_bytes_s": reader.number("DEEPFLOW_FORK_BYTES_S", 256e6, 0.0, 1e12),
            "preload_bytes": reader.integer("DEEPFLOW_PRELOAD_BYTES", -1, -1, 1 << 50),
            "pod_bytes": reader.integer("DEEPFLOW_POD_BYTES", 0, 0, 1 << 50),
            "pod_tes": reader.integer("DEEPFLOW_POD_TES", 256, 1, _MAX_TES),
            "migrate_after_s": reader.number("DEEPFLOW_MIGRATE_AFTER_S", 5.0, 0.0, 3600.0),
            "load_timeout_s": reader.number("DEEPFLOW_LOAD_TIMEOUT_S", 600.0, 1.0, 86400.0),
            "arena_dir": arena_dir(reader, common["home_dir"]),
            "fabric": reader.text("DEEPFLOW_FABRIC", "127.0.0.1"),
            "distflow": reader.choice("DEEPFLOW_DISTFLOW", "", BACKENDS),
            "fetch_timeout_s": reader.number("DEEPFLOW_FETCH_TIMEOUT_S", 2.0, 0.0, 60.0),
            "fetch_min_s": reader.number("DEEPFLOW_FETCH_MIN_MS", 15.0, 0.0, 60_000.0) / 1000,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class TeSettings(WorkerSettings):
    """What one TE needs."""

    pod: str  # the instance name of its pod host
    model: str = ""  # until it is assigned
    role: str = "colocated"  # one of ROLES: what it is meant for; it runs any task

    @classmethod
    def read(cls, reader: Reader) -> dict[str, Any]:
        """The fields' values. Raises ConfigError."""
        fields = WorkerSettings.read(reader)
        if not (pod := reader.text("DEEPFLOW_TE_POD", "")):
            raise ConfigError("DEEPFLOW_TE_POD is not set: a TE is started by a pod host")
        return fields | {"pod": pod}


def for_te(env: Mapping[str, str], *, pod: str) -> dict[str, str]:
    """The environment that all TEs of `pod` start in: the pod host's own, and what makes it a TE's. Of which model, on
    how many threads, and which accelerators it sees, comes with its assignment."""
    return {
        **env,
        "DEEPFLOW_TE_POD": pod,
        "DEEPFLOW_INSTANCE": "",
        "DEEPFLOW_PARENT_PID": str(os.getpid()),
        **compute_env(1),
    }


def read_range(text: str) -> tuple[int, int]:
    """The bounds in a text like `2` (a fixed number) or `0..8`. Raises ConfigError."""
    match = re.fullmatch(r"(\d{1,4})(?:\.\.(\d{1,4}))?", text.strip())
    low, high = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if not 0 <= low <= high <= _MAX_TES:
        raise ConfigError(f"DEEPFLOW_WORKERS={text}: must be like 2 or 0..8, at most {_MAX_TES}")
    return low, high


def read_pd(text: str) -> tuple[int, int]:
    """The numbers of prefill and of decode TEs in a text like `1p2d`; none of either where it is empty.

    Raises ConfigError.
    """
    if not text:
        return 0, 0
    match = re.fullmatch(r"(\d{1,4})p(\d{1,4})d", text)
    numbers = (int(match[1]), int(match[2])) if match else (0, 0)
    if not all(0 < number <= _MAX_TES for number in numbers):
        raise ConfigError(f"DEEPFLOW_PD={text}: must be like 1p1d, at least one of each")
    return numbers


def read_kernels(reader: Reader) -> str:
    """The decoder's kernels, one of KERNELS. Raises ConfigError."""
    return reader.choice("DEEPFLOW_KERNELS", "auto", KERNELS)


def read_graphs(reader: Reader) -> bool:
    """Whether decode steps are recorded where the device can. Ranks that share a model read it alike, as their
    environment is one. Raises ConfigError."""
    return reader.flag("DEEPFLOW_GRAPHS", True)


def default_threads(num_cores: int, num_tes: int, *, native: bool) -> int:
    """Compute threads of each of `num_tes` TEs: its share of the cores, with torch's kernels of all but one.

    Native threads wait for work, not for each other: on two cores, beside one other busy process, a decode step takes
    as long on two threads as on one, and alone 1.5 times less from eight sequences on. torch's parallel regions each
    wait for the slowest thread: there the second thread gained nothing in quiet and cost a factor of 4.6 beside a busy
    process.
    """
    return max(1, (num_cores if native else num_cores - 1) // num_tes)


def compute_env(num_threads: int) -> dict[str, str]:
    """The environment under which torch is to be loaded: read once, by the runtimes beneath it."""
    threads = str(num_threads)
    return {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": threads,
        # torch would load every accelerator plug-in it finds; a device module imports its own.
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
    }


def num_cores() -> int:
    """Cores this process may run on (a container's share, not the machine's)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
