"""What the cache service can be told by its environment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shared.config import Reader, Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSettings(Settings):
    """Bounds and time limits of one replica."""

    index_bytes: int = 256 * 1024 * 1024  # about 1.3 million pages
    dump_timeout_s: float = 5.0

    @classmethod
    def read(cls, reader: Reader) -> dict[str, Any]:
        """Raises ConfigError naming the variable."""
        return {
            **Settings.read(reader),
            "index_bytes": reader.integer(
                "DEEPFLOW_INDEX_BYTES", 256 * 1024 * 1024, 4096, 1024 * 1024 * 1024 * 1024
            ),
            "dump_timeout_s": reader.number("DEEPFLOW_DUMP_TIMEOUT_S", 5.0, 0.05, 300.0),
        }
