"""What TEs take of the memory that they share with others: proportional set sizes, from the kernel (Linux).

It must not know what a TE does. A page that n processes map counts one nth in each.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

_KIB: Final = 1024
_MB: Final = 1e6


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes: `pss` in all; of these `anonymous`, and `file` (mapped files: weights, libraries)."""

    pss: int = 0
    anonymous: int = 0
    file: int = 0

    def __add__(self, other: Memory) -> Memory:
        return Memory(
            self.pss + other.pss, self.anonymous + other.anonymous, self.file + other.file
        )


def memory_of(pids: Iterable[int]) -> Memory:
    """Of all these processes together; one that ended meanwhile takes nothing."""
    total = Memory()
    for pid in pids:
        with contextlib.suppress(OSError):
            total += parse(Path(f"/proc/{pid}/smaps_rollup").read_text())
    return total


def family(pid: int) -> list[int]:
    """A process and all its descendants."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        return [pid, *(child.pid for child in process.children(recursive=True))]
    return []


def parse(text: str) -> Memory:
    """A `smaps_rollup`. Shared memory (the host's KV arena) counts as file."""
    fields = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        words = value.split()
        if len(words) == 2 and words[1] == "kB":
            fields[name] = int(words[0]) * _KIB
    pss, anonymous = fields.get("Pss", 0), fields.get("Pss_Anon", 0)
    return Memory(pss, anonymous, fields.get("Pss_File", 0) + fields.get("Pss_Shmem", 0))


def extra_te_mb(before: Memory, after: Memory, num_more: int) -> dict[str, float]:
    """What each of the TEs that came added, MB: in all, anonymous, of files."""
    return {
        "extra_te_mb": (after.pss - before.pss) / num_more / _MB,
        "extra_te_anonymous_mb": (after.anonymous - before.anonymous) / num_more / _MB,
        "extra_te_file_mb": (after.file - before.file) / num_more / _MB,
    }
