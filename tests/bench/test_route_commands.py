"""`deepflow bench route` on real TEs of a tiny random model."""

from __future__ import annotations

import os
from pathlib import Path

import orjson
import pytest

from tests.bench.test_bench_commands import _bench
from tests.worker.tiny import make_tiny


@pytest.mark.system
@pytest.mark.apart
@pytest.mark.timeout(160)
def test_the_simulator_is_held_to_real_tes(tmp_path: Path) -> None:
    """`--validate` replays one trace on both, which find the same pages, and says how far apart their times are."""
    make_tiny(tmp_path / "models" / "tiny", context=1024)
    done = _bench(tmp_path, "route", "--validate", "--quick", "--model", "tiny", "--json", "-")
    assert done.returncode == 0, done.stderr
    body = orjson.loads(done.stdout)
    metrics = body["metrics"]
    assert set(body["bars"]) == {
        f"{name}_{kind}_error" for name in ("ttft", "jct") for kind in ("mean", "p99")
    }
    for side in ("real", "simulated"):
        assert 0 < metrics[f"{side}_ttft_mean_s"] <= metrics[f"{side}_jct_mean_s"]
        assert 0 <= metrics[f"{side}_hit_share"] < 1
    assert metrics["ttft_mean_error"] == pytest.approx(
        abs(metrics["simulated_ttft_mean_s"] / metrics["real_ttft_mean_s"] - 1), abs=0.05
    )


if os.environ.get("DEEPFLOW_SOAK"):

    @pytest.mark.soak
    @pytest.mark.system
    @pytest.mark.apart
    @pytest.mark.timeout(160)
    def test_a_live_comparison_holds_the_same_conversations(tmp_path: Path) -> None:
        """`--live` asks both policies the very same, and gets the same answers."""
        make_tiny(tmp_path / "models" / "tiny", context=2048)
        done = _bench(tmp_path, "route", "--live", "--quick", "--model", "tiny", "--json", "-")
        assert done.returncode == 0, done.stderr
        metrics = orjson.loads(done.stdout)["metrics"]
        assert metrics["live_same_text_share"] == 1
        for policy in ("deepflow", "round-robin"):
            assert metrics[f"live_tokens_per_s.{policy}"] > 0
            assert metrics[f"live_hit_share.{policy}"] > 0
