"""`deepflow bench autoscale`: its rivals, its loads, and the command."""

from __future__ import annotations

from pathlib import Path

import orjson
from typer.testing import CliRunner

from deepflow.bench.autoscale.rules import Hpa, known
from deepflow.bench.autoscale.shapes import made
from deepflow.bench.cli import app
from deepflow.sim.profile import NPU_34B_TP4
from services.scheduler.cluster.autoscaler import Observation

SEEN = Observation(model="m", min_tes=0, max_tes=64)


def test_the_hpa_like_rule_waits_five_minutes_before_it_goes_down() -> None:
    """Up by the ratio at the next look, down to the highest of the last five minutes, never to none."""
    hpa, ready = Hpa(2.0), 1
    targets = {}
    for now in range(700):
        seen = Observation(
            model="m", min_tes=0, max_tes=64, ready=ready, running=12 if now < 60 else 0
        )
        ready = targets[now] = hpa.observe(seen, float(now)).target
    assert targets[59] == 6
    assert targets[300] == 6
    assert targets[699] == 1


def test_the_oracle_has_tes_up_before_the_load_comes() -> None:
    """Nothing in the silence, something ahead of the first request after it."""
    calls = made("zeros", 240.0, 3)
    rule = known(calls, NPU_34B_TP4, 2.0, 0.0)
    assert rule.observe(SEEN, 60.0).target == 0
    assert rule.observe(SEEN, 119.0).target >= 1
    assert rule.observe(SEEN, 125.0).target >= 2


def test_loads_are_a_function_of_their_seed() -> None:
    """The same seed gives the same calls, another one others."""
    for name in ("bursts", "waves", "zeros", "steps", "spikes", "lone"):
        assert made(name, 200.0, 1) == made(name, 200.0, 1) != made(name, 200.0, 2)


def test_the_command_compares_all_fleets(tmp_path: Path) -> None:
    """Attainment and TE-seconds of each, in one report with a picture beside it."""
    picture = tmp_path / "fleet.png"
    line = ["autoscale", "--quick", "--trace", "zeros", "--json", "-", "--picture", str(picture)]
    done = CliRunner().invoke(app, line)
    assert done.exit_code == 0, done.output
    metrics = orjson.loads(done.stdout)["metrics"]
    for kind in ("deepflow", "hpa", "oracle", "fixed-2", "fixed-4"):
        assert 0 < metrics[f"attainment.{kind}"] <= 1
        assert metrics[f"te_seconds.{kind}"] > 0
    assert metrics["te_seconds_vs_oracle"] > 1
    assert picture.stat().st_size > 1000
