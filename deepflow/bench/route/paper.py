"""The paper's Figure 7 in the simulator: two colocated TEs and a pair, PD-aware choice against round robin.

Four TEs of the paper's size serve a trace of code generation (independent prompts of about 2,000 tokens, answers of
about 200, as its section 7 describes its own) at three loads. The heatmap that decides is measured first, on the same
simulated hardware; its stability is the other claim of section 5 that is checked here.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from random import Random
from typing import Final

from rich.progress import Progress

from deepflow.bench import machine
from deepflow.bench.progress import step
from deepflow.bench.report import Bar, Report
from deepflow.heatmap.grid import Grid, measure
from deepflow.heatmap.simulated import Simulated
from deepflow.sim.cluster import simulate
from deepflow.sim.profile import NPU_34B_TP4
from deepflow.sim.report import Outcome
from deepflow.sim.scenario import Scenario
from deepflow.sim.trace import BLOCK, Call
from services.scheduler.heatmap import Heatmap

ROUND_ROBIN: Final = "round-robin"
OURS: Final = "deepflow"
# With prompts that share nothing strict prefix is the heatmap alone, then load: the paper's rule as it stands.
POLICIES: Final = {ROUND_ROBIN: "rr", "strict-prefix": "heatmap-alone", OURS: "deepflow"}
BARS: Final = (
    Bar("stability", ">=", 0.8, "heatmap: cells with one sign at every rate"),
    Bar("jct_ratio.low", "<=", 1.02, "low load: JCT of ours / of round robin"),
    Bar("jct_ratio.mid", "<", 1.0, "mid load: JCT of ours / of round robin"),
    Bar("jct_ratio.high", "<=", 1.0, "beyond saturation (the paper: somewhat above 1)"),
)

# As `deepflow heatmap --on simulator` has it.
_GRID: Final = Grid(
    prefill_lens=(128, 256, 512, 1024, 2048, 4096, 8192, 16_384),
    ratios=(0.0156, 0.0312, 0.0625, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0),
    loads=(0.2, 0.4, 0.6),
    num_requests=64,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperPlan:
    """Loads are named; rates are requests per second of four TEs. `num` requests are run with each of the seeds."""

    rates: tuple[tuple[str, float], ...] = (("low", 2.0), ("mid", 6.0), ("high", 13.0))
    num: int = 500
    num_seeds: int = 3
    grid: Grid = _GRID


QUICK: Final = PaperPlan(
    rates=(("low", 2.0), ("mid", 6.0)),
    num=60,
    num_seeds=1,
    grid=Grid(prefill_lens=(512, 2048), ratios=(0.0625, 1.0), num_requests=12),
)


async def bench_paper(plan: PaperPlan, seed: int, progress: Progress) -> Report:
    """The heatmap first, then every load by every policy. Deterministic."""
    heatmap = (await measure(Simulated(NPU_34B_TP4), plan.grid, progress)).heatmap
    metrics = {"stability": heatmap.stability}
    total = len(plan.rates) * len(POLICIES) * plan.num_seeds
    with step(progress, "loads", total) as advance:
        for load, rate in plan.rates:
            for policy, name in POLICIES.items():
                outcomes: list[Outcome] = []
                for number in range(plan.num_seeds):
                    calls = code_generation(plan.num, rate, seed + number)
                    outcomes += _run(calls, policy, heatmap, seed + number)
                    advance()
                metrics |= _figures(f"{name}.{load}", outcomes)
            for what in ("jct", "tpot"):
                ours = metrics[f"{what}_mean_s.{POLICIES[OURS]}.{load}"]
                theirs = metrics[f"{what}_mean_s.{POLICIES[ROUND_ROBIN]}.{load}"]
                metrics[f"{what}_ratio.{load}"] = ours / theirs
    return Report(
        bench="route --paper",
        metrics=metrics,
        machine=machine.describe(),
        settings={**asdict(plan), "profile": NPU_34B_TP4.name, "seed": seed},
        bars=BARS,
        notes=[
            "simulated: two colocated TEs and one pair; requests that share nothing, Poisson arrivals.",
            "heatmap-alone is the paper's rule as it stands: the type by the sign of the heatmap, whatever the load.",
        ],
    )


def code_generation(num: int, rate: float, seed: int) -> list[Call]:
    """Independent requests: log-normal lengths of medians 1,800 and 180 tokens (means about 2,150 and 215)."""
    random = Random(f"code {seed}")
    calls, now_ms, next_id = [], 0.0, 0
    for _ in range(num):
        now_ms += random.expovariate(rate) * 1000
        length = min(16_000, max(16, int(1800 * random.lognormvariate(0.0, 0.6))))
        output = max(2, int(180 * random.lognormvariate(0.0, 0.6)))
        num_blocks = -(-length // BLOCK)
        calls.append(Call(now_ms, length, output, tuple(range(next_id, next_id + num_blocks))))
        next_id += num_blocks
    return calls


def _run(calls: Sequence[Call], policy: str, heatmap: Heatmap, seed: int) -> tuple[Outcome, ...]:
    scenario = Scenario.of(2, NPU_34B_TP4, num_pairs=1, policy=policy, seed=seed)
    return simulate(calls, replace(scenario, heatmap=heatmap)).requests


def _figures(name: str, outcomes: Sequence[Outcome]) -> dict[str, float]:
    done = [one for one in outcomes if one.ok]
    ttfts = sorted(one.ttft_s for one in done if one.ttft_s is not None)
    tpots = [tpot_s for one in done if (tpot_s := one.tpot_s) is not None]
    return {
        f"jct_mean_s.{name}": statistics.fmean(one.jct_s for one in done),
        f"tpot_mean_s.{name}": statistics.fmean(tpots),
        f"ttft_p99_s.{name}": ttfts[math.ceil(0.99 * len(ttfts)) - 1],
        f"done_share.{name}": len(done) / len(outcomes),
        f"split_share.{name}": sum(one.prefill_te != one.te for one in done) / len(done),
    }
