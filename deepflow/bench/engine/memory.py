"""What a process holds in memory, from /proc (Linux). It must not know what the process does."""

from __future__ import annotations

from pathlib import Path
from typing import Final

_KIB: Final = 1024


def memory_bytes(pid: int | str = "self") -> dict[str, int]:
    """`peak` and `resident` in all; of the resident, `anonymous` (its own) and `file` (mapped files: weights and
    libraries, one copy for all processes that map them). Nothing where the kernel does not tell."""
    try:
        status = _fields(Path(f"/proc/{pid}/status").read_text())
        rollup = _fields(Path(f"/proc/{pid}/smaps_rollup").read_text())
    except OSError:
        return {}
    return {
        "peak": status["VmHWM"],
        "resident": rollup["Rss"],
        "anonymous": rollup["Anonymous"],
        "file": rollup["Rss"] - rollup["Anonymous"],
        "private": rollup["Private_Clean"] + rollup["Private_Dirty"],
        "shared": rollup["Shared_Clean"] + rollup["Shared_Dirty"],
    }


def _fields(text: str) -> dict[str, int]:
    """Bytes of the lines `Name:   123 kB`."""
    fields = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        words = value.split()
        if len(words) == 2 and words[1] == "kB":
            fields[name] = int(words[0]) * _KIB
    return fields
