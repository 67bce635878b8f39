"""`bench route --throughput` on a few TEs: every point is measured, and its figures fit together."""

from __future__ import annotations

import pytest
from rich.progress import Progress

from deepflow.bench.route.throughput import ThroughputPlan, bench_throughput


def test_every_point_has_figures_that_fit_together() -> None:
    """Each number of TEs meets each length; more work per request never makes a JE faster."""
    plan = ThroughputPlan(
        num_tes=(2, 5), prompt_lens=(1024, 2048), system_len=256, num_conversations=4, num_tokens=1
    )
    report = bench_throughput(plan, 0, Progress(disable=True))
    for point in ("2.1024", "5.1024", "2.2048", "5.2048"):
        found = {
            name.removesuffix(f".{point}"): value
            for name, value in report.metrics.items()
            if name.endswith(f".{point}")
        }
        assert 0 <= found["with_upkeep_per_s"] <= found["with_codec_per_s"]
        assert found["with_codec_per_s"] <= found["placements_per_s"]
        decision_us = found["split_us"] + found["place_us"] + found["books_us"]
        assert found["placements_per_s"] == pytest.approx(1e6 / decision_us)
        # At least: a system prompt, and the pages of 32 prompts.
        assert found["tree_mb"] * 1e6 >= 200 * (256 + 16 * 512) / plan.page
    (table,) = report.tables()
    assert [column.header for column in table.columns] == [
        "tokens:", "2 TEs, 1024", "5 TEs, 1024", "2 TEs, 2048", "5 TEs, 2048"
    ]  # fmt: skip
