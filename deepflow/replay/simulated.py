"""A trace in the simulator: the same code that decides on a platform, in virtual time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from deepflow.bench import machine
from deepflow.bench.report import Report
from deepflow.bench.route.oracle import ideal
from deepflow.bench.sample import Goal
from deepflow.sim.cluster import simulate
from deepflow.sim.profile import NPU_34B_TP4, Profile
from deepflow.sim.report import Outcome, Result
from deepflow.sim.scenario import Scenario, noisy, oracle
from deepflow.sim.trace import Call, faster
from services.scheduler.policy.roster import DEFAULT


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """What serves the trace. `accuracy` is that of the predictor of output lengths."""

    num_tes: int = 8
    num_pairs: int = 0  # of a prefill and a decode TE each, beside them
    num_jes: int = 1
    policy: str = DEFAULT
    profile: Profile = NPU_34B_TP4
    num_blocks: int | None = (
        None  # of the trace's size, per TE; None: what the profile has room for
    )
    accuracy: float = 1.0
    speed: float = 1.0
    goals: tuple[Goal, ...] = ()
    seed: int = 0

    def scenario(self) -> Scenario:
        """The same for the simulator."""
        scenario = Scenario.of(
            self.num_tes,
            self.profile,
            num_pairs=self.num_pairs,
            num_blocks=self.num_blocks,
            policy=self.policy,
            seed=self.seed,
        )
        predict = oracle if self.accuracy >= 1 else noisy(self.accuracy)
        return replace(scenario, num_jes=self.num_jes, predict=predict)


def replay_simulated(calls: Sequence[Call], name: str, deployment: Deployment) -> Report:
    """Simulate the whole trace; the same arguments give the same figures. Raises ConfigError for an unknown policy."""
    result = simulate(faster(calls, deployment.speed), deployment.scenario())
    found = sum(one.cached_tokens for one in result.requests)
    metrics = result.metrics(slo_ttft_s=math.inf, slo_tpot_s=math.inf)
    del metrics["goodput"]
    if deployment.goals:
        metrics["goodput"] = _goodput(result, deployment.goals)
    best = ideal(calls)
    return Report(
        bench="replay",
        metrics=metrics | {"hit_vs_ideal": found / best if best else 1.0},
        machine=machine.describe(),
        settings=asdict(deployment) | {"trace": name, "profile": deployment.profile.name},
        notes=["simulated: all times are virtual"],
    )


def _goodput(result: Result, goals: Sequence[Goal]) -> float:
    """Requests per second, by arrival, that were done within every limit."""
    num_good = sum(
        one.ok and all(_value_s(one, goal) * 1000 <= goal.limit_ms for goal in goals)
        for one in result.requests
    )
    arrivals = [one.arrived_s for one in result.requests]
    return num_good / max(max(arrivals) - min(arrivals), 1e-9)


def _value_s(one: Outcome, goal: Goal) -> float:
    values = {"ttft": one.ttft_s, "tpot": one.tpot_s, "e2el": one.jct_s}
    return values[goal.measure] or 0.0
