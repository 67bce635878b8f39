"""How many TEs a host has room for: their number, and the memory of all of them with the weights that they share.

Pure but for `memory_bytes`, which reads what this machine has. This module must not know processes or the bus.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from services.worker.flowserve.backend import Backend
    from services.worker.settings import WorkerSettings

# What a TE takes beyond weights and KV until one has been measured: arrays and code of its own.
OWN_BYTES: Final = {"native": 64 << 20, "torch": 512 << 20}
_SHARE: Final = (4, 5)  # of the machine's memory, where nothing is set
_LIMITS: Final = ("memory.max", "memory/memory.limit_in_bytes")  # cgroup v2 and v1


@dataclass(frozen=True, slots=True)
class Cost:
    """Bytes of a model: of each TE (KV cache and what it does not share), and of the weights of all together."""

    te_bytes: int
    weights_bytes: int

    def of(self, num_tes: int) -> int:
        """Bytes of so many TEs."""
        return num_tes * self.te_bytes + (self.weights_bytes if num_tes else 0)


@dataclass(frozen=True, slots=True)
class Budget:
    """What all TEs of a pod host may take: `max_tes` of them, and `num_bytes`."""

    max_tes: int
    num_bytes: int
    costs: Mapping[str, Cost]

    def taken(self, held: Mapping[str, int]) -> int:
        """Bytes of so many TEs of each model."""
        return sum(self.costs[model].of(number) for model, number in held.items())

    def fits(self, held: Mapping[str, int], model: str) -> bool:
        """Whether there is room for one more TE of `model` beside those of each model."""
        if sum(held.values()) >= self.max_tes:
            return False
        more = {**held, model: held.get(model, 0) + 1}
        return self.taken(more) <= self.num_bytes


def default_bytes(costs: Mapping[str, Cost], fleet: Mapping[str, int], memory: int) -> int:
    """The budget where none is set: four fifths of `memory` bytes. Whoever asks for a `fleet` that is always up, or for
    a model at all, is not refused for an estimate: more, where these take more."""
    of_fleet = sum(costs[model].of(number) for model, number in fleet.items())
    of_one = max((cost.of(1) for cost in costs.values()), default=0)
    return max(memory * _SHARE[0] // _SHARE[1], of_fleet, of_one)


def kv_pool_bytes(backend: Backend, settings: WorkerSettings) -> int:
    """Of one TE's KV cache, in this host's memory."""
    if backend.device != "cpu":
        return 0
    by_tokens = -(-settings.kv_tokens // backend.page) * backend.bytes_per_block
    return (by_tokens or settings.kv_bytes) * backend.tp * backend.pp


def memory_bytes(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """What this process may use: the machine's memory, or its container's share."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in _LIMITS:
        try:
            text = (cgroup / name).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            total = min(total, int(text))
    return total


def own_bytes(pid: int, kv_bytes: int) -> int:
    """What a TE that has come up takes beside weights and KV cache: its anonymous memory, a share of what it shares; 0
    where it cannot be told. Blocks for some milliseconds: not for the event loop."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    fields = dict(line.split(":", 1) for line in lines[1:] if ":" in line)
    try:
        num_bytes = int(fields["Pss_Anon"].split()[0]) * 1024
    except (KeyError, ValueError):
        return 0
    # A KV cache whose pages were never written is not among them.
    return num_bytes - kv_bytes if num_bytes > kv_bytes else num_bytes
