"""CPU time of a tree of processes, by role and thread, from /proc. It must not know what the processes are for,
beyond how their command lines read.

A thread is told by its kernel name (`/proc/<pid>/task/<tid>/comm`): a new thread takes over the name of the one that
starts it, so the compute threads that the thread `engine` starts are called `engine` as well.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

import psutil

ENGINE_THREAD: Final = "engine"
_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")
# What a command line contains -> the role of the process and of those of its children that are none of these.
_ROLES: Final = {
    "services.worker.te": "te",
    "services.worker": "pod",
    "services.gateway": "gateway",
    "services.scheduler": "scheduler",
    "services.cache": "cache",
    "nats-server": "nats",
    "deepflow.cli.main": "launcher",
}


class Thread(NamedTuple):
    """One thread of the tree."""

    role: str
    name: str
    is_main: bool
    cpu_s: float


@dataclass(frozen=True, slots=True)
class CpuTimes:
    """What every living thread of a tree has used since it began, by (pid, tid)."""

    threads: Mapping[tuple[int, int], Thread] = field(default_factory=dict)

    def since(self, before: CpuTimes) -> dict[str, float]:
        """CPU seconds by role since `before`; the engine's threads are a role of their own, `engine`.

        What a thread used that ended in between is lost: services keep theirs.
        """
        named = any(thread.name == ENGINE_THREAD for thread in self.threads.values())
        used: dict[str, float] = defaultdict(float)
        for key, thread in self.threads.items():
            earlier = before.threads.get(key)
            role = ENGINE_THREAD if _is_engine(thread, named) else thread.role
            used[role] += thread.cpu_s - (earlier.cpu_s if earlier is not None else 0.0)
        return dict(used)

    @property
    def names_engine(self) -> bool:
        """Whether the engine's threads could be told by name; else all but a TE's main thread count as engine."""
        return any(thread.name == ENGINE_THREAD for thread in self.threads.values())


def _is_engine(thread: Thread, named: bool) -> bool:
    if named:
        return thread.name == ENGINE_THREAD
    return thread.role == "te" and not thread.is_main


def cpu_times(root_pid: int) -> CpuTimes:
    """Of the process `root_pid` and all its descendants."""
    threads: dict[tuple[int, int], Thread] = {}
    try:
        root = psutil.Process(root_pid)
        family = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return CpuTimes()
    roles: dict[int, str] = {}
    for process in family:
        try:
            command, parent = " ".join(process.cmdline()), process.ppid()
        except psutil.Error:  # it ended meanwhile
            continue
        own = next((role for part, role in _ROLES.items() if part in command), None)
        role = roles[process.pid] = own or roles.get(parent, "other")
        threads |= _threads(process.pid, role)
    return CpuTimes(threads)


def _threads(pid: int, role: str) -> dict[tuple[int, int], Thread]:
    found = {}
    try:
        entries = list(Path(f"/proc/{pid}/task").iterdir())
    except OSError:
        return {}
    for entry in entries:
        tid = int(entry.name)
        try:
            name, cpu_s = (entry / "comm").read_text().strip(), _cpu_s(entry)
        except OSError:  # it ended meanwhile
            continue
        found[(pid, tid)] = Thread(role, name, tid == pid, cpu_s)
    return found


def _cpu_s(entry: Path) -> float:
    """User and system time: nanoseconds where the kernel counts them, else ticks of 10 ms."""
    try:
        return int((entry / "schedstat").read_text().split()[0]) / 1e9
    except (OSError, IndexError, ValueError):
        fields = (entry / "stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
