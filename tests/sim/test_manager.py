"""Autoscaling in the simulator: TEs follow the load, no request is lost, and the same run is the same."""

from __future__ import annotations

import pytest

from deepflow.bench.autoscale.bench import QUICK, run_one
from deepflow.bench.autoscale.shapes import calls_of, made, zeros
from deepflow.sim.cluster import simulate
from deepflow.sim.scaling import Autoscaling
from deepflow.sim.scenario import Scenario

CALLS = calls_of(zeros(10.0, 110.0, 8.0), 250.0, 1)
SCENARIO = Scenario(tes=(), load_s=1.0, autoscaling=Autoscaling(max_tes=6))


def test_tes_come_with_the_load_and_go_with_it() -> None:
    """From none to several, back to none, and again; every request gets all its tokens."""
    result = simulate(CALLS, SCENARIO)
    assert result.num_done == len(CALLS)
    assert result.num_resubmissions == 0
    targets = [one.target for one in result.decisions]
    assert 1 < max(targets) <= 6
    woken = [one.at for one in result.decisions if one.target and not one.ready]
    assert min(woken) < 30 < 100 < max(woken)
    assert result.te_seconds < 0.5 * 6 * result.duration_s


def test_the_same_run_is_the_same() -> None:
    """Nothing but the arguments counts, also where TEs come and go."""
    assert simulate(CALLS, SCENARIO).to_json() == simulate(CALLS, SCENARIO).to_json()


def test_a_fixed_fleet_pays_for_every_second() -> None:
    """TE-seconds of TEs that are always there: their number times the length of the run."""
    result = simulate(CALLS, Scenario.of(3))
    assert result.te_seconds == pytest.approx(3 * result.duration_s)


def test_who_knows_the_future_pays_least() -> None:
    """The oracle serves as many in time as the AUTOSCALER, for less; the HPA-like rule never goes to zero."""
    calls = made("zeros", 240.0, 2)
    ours, hpa, oracle = (run_one(kind, calls, QUICK, 0) for kind in ("deepflow", "hpa", "oracle"))
    assert oracle.te_seconds < ours.te_seconds
    assert oracle.attainment >= ours.attainment > 0.9
    assert min(one.target for one in hpa.decisions) >= 1
    assert ours.failed_share == hpa.failed_share == oracle.failed_share == 0
