"""What a Job Executor can be told by its environment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shared.config import Reader, Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerSettings(Settings):
    """Bounds and time limits of one JE; replicas may differ."""

    task_timeout_s: float = 0.3  # a TE's shell answers in a few ms, whatever its engine does
    max_in_flight: int = 1024  # requests being decided at once
    park_max_s: float = 300.0  # caps a request's own park budget
    park_max_requests: int = 1024
    park_max_bytes: int = 64 * 1024 * 1024
    pd_min_tokens: int = (
        512  # a prompt with so many uncached tokens is prefilled on one TE and decoded on another
    )
    decisions_kept: int = 64
    seed: int | None = None  # of ties; None: another one at each start

    @classmethod
    def read(cls, reader: Reader) -> dict[str, Any]:
        """Raises ConfigError naming the variable."""
        seed = reader.integer("DEEPFLOW_SCHEDULER_SEED", -1, -1, 2**63 - 1)
        return {
            **Settings.read(reader),
            "task_timeout_s": reader.number("DEEPFLOW_TASK_TIMEOUT_S", 0.3, 0.01, 60.0),
            "max_in_flight": reader.integer("DEEPFLOW_SCHEDULER_MAX_IN_FLIGHT", 1024, 1, 1_000_000),
            "park_max_s": reader.number("DEEPFLOW_PARK_MAX_S", 300.0, 0.0, 86_400.0),
            "park_max_requests": reader.integer("DEEPFLOW_PARK_MAX_REQUESTS", 1024, 0, 1_000_000),
            "park_max_bytes": reader.integer("DEEPFLOW_PARK_MAX_BYTES", 64 * 1024 * 1024, 0, 2**40),
            "pd_min_tokens": reader.integer("DEEPFLOW_PD_MIN_TOKENS", 512, 1, 1 << 30),
            "decisions_kept": reader.integer("DEEPFLOW_SCHEDULER_DECISIONS_KEPT", 64, 1, 10_000),
            "seed": None if seed < 0 else seed,
        }
