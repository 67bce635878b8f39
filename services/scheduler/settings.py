"""What a Job Executor can be told by its environment."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.scheduler.policy.roster import DEFAULT, NAMES
from shared.config import Reader, Settings
from shared.queue import LEASE_S
from shared.store.settings import StoreSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerSettings(Settings):
    """Bounds and time limits of one JE; replicas may differ."""

    task_timeout_s: float = 0.3  # a TE's shell answers in a few ms, whatever its engine does
    max_in_flight: int = 1024  # requests being decided at once
    park_max_s: float = 300.0  # caps a request's own park budget
    park_max_requests: int = 1024
    park_max_bytes: int = 64 * 1024 * 1024
    pd_min_tokens: int = 512  # no prompt with fewer uncached tokens is split over two TEs
    decisions_kept: int = 1024  # requests whose placement can be asked for
    policy: str = DEFAULT
    heatmaps_dir: Path  # <encoded model>.json: which TE type a request is for
    tree_bytes: int = 256 * 1024 * 1024  # of all prompt trees: about a million pages
    dump_timeout_s: float = 5.0
    record: str = "off"  # lengths: what the decode-length predictor is trained on is kept
    record_bytes: int = 256 * 1024 * 1024  # on disk, of all models
    predictor_every: int = 2000  # answers recorded between two trainings for a model
    job_lease_s: float = LEASE_S  # how long a job stays with a scheduler that fell silent
    num_batches: int = 8  # at once in this JE; those beyond wait in the work queue
    batch_max_in_flight: int = (
        256  # lines of batches, per model; how many there are is found by trying
    )
    store: StoreSettings
    cluster_lease_s: float = (
        3.0  # after so long without a word of the leader another scheduler leads
    )
    slo_ttft_s: float = 1.0  # a first token that takes longer is late: more TEs are called for
    seed: int | None = None  # of ties; None: another one at each start

    @classmethod
    def read(cls, reader: Reader) -> dict[str, Any]:
        """Raises ConfigError naming the variable."""
        seed = reader.integer("DEEPFLOW_SCHEDULER_SEED", -1, -1, 2**63 - 1)
        settings = Settings.read(reader)
        return {
            **settings,
            "task_timeout_s": reader.number("DEEPFLOW_TASK_TIMEOUT_S", 0.3, 0.01, 60.0),
            "max_in_flight": reader.integer("DEEPFLOW_SCHEDULER_MAX_IN_FLIGHT", 1024, 1, 1_000_000),
            "park_max_s": reader.number("DEEPFLOW_PARK_MAX_S", 300.0, 0.0, 86_400.0),
            "park_max_requests": reader.integer("DEEPFLOW_PARK_MAX_REQUESTS", 1024, 0, 1_000_000),
            "park_max_bytes": reader.integer("DEEPFLOW_PARK_MAX_BYTES", 64 * 1024 * 1024, 0, 2**40),
            "pd_min_tokens": reader.integer("DEEPFLOW_PD_MIN_TOKENS", 512, 1, 1 << 30),
            "decisions_kept": reader.integer(
                "DEEPFLOW_SCHEDULER_DECISIONS_KEPT", 1024, 1, 1_000_000
            ),
            "policy": reader.choice("DEEPFLOW_POLICY", DEFAULT, NAMES),
            "heatmaps_dir": reader.path("DEEPFLOW_HEATMAPS", settings["home_dir"] / "heatmaps"),
            "tree_bytes": reader.integer("DEEPFLOW_TREE_BYTES", 1 << 28, 1 << 16, 1 << 40),
            "dump_timeout_s": reader.number("DEEPFLOW_DUMP_TIMEOUT_S", 5.0, 0.05, 300.0),
            "record": reader.choice("DEEPFLOW_RECORD", "off", ("off", "lengths")),
            "record_bytes": reader.integer("DEEPFLOW_RECORD_BYTES", 1 << 28, 1 << 20, 1 << 40),
            "predictor_every": reader.integer("DEEPFLOW_PREDICTOR_EVERY", 2000, 200, 1 << 30),
            "job_lease_s": reader.number("DEEPFLOW_JOB_LEASE_S", LEASE_S, 0.5, 600.0),
            "num_batches": reader.integer("DEEPFLOW_BATCHES", 8, 1, 1024),
            "batch_max_in_flight": reader.integer("DEEPFLOW_BATCH_MAX_IN_FLIGHT", 256, 1, 65_536),
            "cluster_lease_s": reader.number("DEEPFLOW_CLUSTER_LEASE_S", 3.0, 0.5, 60.0),
            "slo_ttft_s": reader.number("DEEPFLOW_SLO_TTFT_S", 1.0, 0.01, 3600.0),
            "store": StoreSettings.read(reader, settings["home_dir"]),
            "seed": None if seed < 0 else seed,
        }
