"""What the cache service can be told by its environment."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from shared.arena.place import arena_dir
from shared.config import ConfigError, Reader, Settings
from shared.distflow.backend import BACKENDS

_MIB: Final = 1024 * 1024
_GIB: Final = 1024 * _MIB
_TIB: Final = 1024 * _GIB


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSettings(Settings):
    """Bounds and time limits of one replica, and where its host's arena lies."""

    index_bytes: int = 256 * _MIB  # about 1.3 million pages
    dump_timeout_s: float = 5.0
    arena_dir: Path
    arena_bytes: int | None = 0  # 0: by what the host has; None: no arena, the directory only
    segment_bytes: int = 64 * _MIB
    ssd_dir: Path
    ssd_bytes: int = 0  # 0: none
    ssd_all: bool = False  # also pages that nobody has asked for twice
    fabric: str = "127.0.0.1"  # where DistFlow listens
    distflow: str = ""  # how bytes travel besides sockets: nothing, or mooncake
    fetch_bytes: int = 1 * _GIB  # on their way from SSD and other hosts at once
    lease_bytes: int = 1 * _GIB  # held for others to read at once

    @classmethod
    def read(cls, reader: Reader) -> dict[str, Any]:
        """Raises ConfigError naming the variable."""
        base = Settings.read(reader)
        home = base["home_dir"]
        return {
            **base,
            "index_bytes": reader.integer("DEEPFLOW_INDEX_BYTES", 256 * _MIB, 4096, _TIB),
            "dump_timeout_s": reader.number("DEEPFLOW_DUMP_TIMEOUT_S", 5.0, 0.05, 300.0),
            "arena_dir": arena_dir(reader, home),
            "arena_bytes": _arena_bytes(reader),
            "segment_bytes": reader.integer("DEEPFLOW_SEGMENT_BYTES", 64 * _MIB, 65536, 16 * _GIB),
            "ssd_dir": reader.path("DEEPFLOW_SSD_DIR", home / "ssd"),
            "ssd_bytes": reader.integer("DEEPFLOW_SSD_BYTES", 0, 0, 1024 * _TIB),
            "ssd_all": reader.flag("DEEPFLOW_SSD_ALL", False),
            "fabric": reader.text("DEEPFLOW_FABRIC", "127.0.0.1"),
            "distflow": reader.choice("DEEPFLOW_DISTFLOW", "", BACKENDS),
            "fetch_bytes": reader.integer("DEEPFLOW_FETCH_BYTES", 1 * _GIB, 65536, _TIB),
            "lease_bytes": reader.integer("DEEPFLOW_LEASE_BYTES", 1 * _GIB, 65536, _TIB),
        }


def _arena_bytes(reader: Reader) -> int | None:
    if reader.text("DEEPFLOW_ARENA_BYTES", "0").lower() == "off":
        return None
    try:
        return reader.integer("DEEPFLOW_ARENA_BYTES", 0, 0, 1024 * _TIB)
    except ConfigError as error:
        raise ConfigError(f"{error}, nor off") from error
