"""`bench route`: every policy on a trace: hits beside what could be had, then in the simulator at a ladder of rates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Final

from rich.progress import Progress
from rich.table import Table

from deepflow.bench import machine
from deepflow.bench.progress import step
from deepflow.bench.report import Report, number, number_table
from deepflow.bench.route.ladder import Cell, Run, run_all
from deepflow.bench.route.oracle import ideal, pooled
from deepflow.bench.route.plan import BARS, OURS, Plan, rate_of
from deepflow.sim.trace import Call

_UNLIMITED: Final = "unlimited"
# What is shown side by side, a row per policy and a column per rate.
_SHOWN: Final = {
    "ttft_p99_s": "TTFT p99, s",
    "ttft_mean_s": "TTFT mean, s",
    "tpot_p99_s": "TPOT p99, s",
    "jct_p99_s": "JCT p99, s",
    "goodput": "goodput, 1/s",
    "loaded_hit_vs_ideal": "hits / ideal",
}


class RouteReport(Report):
    """As any report, but its tables."""

    __slots__ = ()

    def tables(self) -> list[Table]:
        """A table per measure with policies in lines and rates in columns; the rest one to a line."""
        policies, rates = self.settings["policies"], self.settings["ladder"]
        tables = []
        for name, title in _SHOWN.items():
            table = Table(f"{title} at", *(f"{rate:g}/s" for rate in rates), box=None)
            for policy in policies:
                values = (self.metrics.get(f"{name}.{policy}.{rate:g}") for rate in rates)
                table.add_row(
                    policy, *("-" if value is None else number(value) for value in values)
                )
            tables.append(table)
        rest = {name: value for name, value in self.metrics.items() if name.count(".") < 2}
        return [*tables, number_table(rest)]


def bench_route(
    calls: Sequence[Call], name: str, plan: Plan, seed: int, progress: Progress
) -> Report:
    """Hits without time, then the ladder. `name` is what a person calls the trace."""
    described = machine.describe()
    own_rate, rates = rate_of(calls), plan.ladder(calls)
    sizes = {_UNLIMITED: 0} | {str(blocks): blocks for blocks in plan.num_blocks}
    hits = [
        Cell(policy=policy, label=label, num_blocks=blocks, is_timed=False)
        for label, blocks in sizes.items()
        for policy in plan.policies
    ]
    ladder = [
        Cell(policy=policy, label=f"{rate:g}", speed=rate / own_rate)
        for rate in reversed(rates)  # the longest runs first
        for policy in plan.policies
    ]
    with step(progress, f"{name}: {len(calls)} requests", len(hits) + len(ladder)) as advance:
        runs = run_all([*ladder, *hits], calls, plan, seed, advance)
    metrics = _hits({cell: runs[cell] for cell in hits}, calls, plan)
    metrics |= _against(
        {(cell.policy, cell.label): runs[cell].figures for cell in ladder},
        plan.policies,
        [f"{rate:g}" for rate in rates],
    )
    best = max(ideal(calls), 1)
    for cell in sorted(ladder, key=lambda cell: (plan.policies.index(cell.policy), cell.speed)):
        done = runs[cell]
        figures = done.figures | {"loaded_hit_vs_ideal": done.found / best}
        if not math.isnan(done.imbalance):
            figures["loaded_imbalance_p99_60s"] = done.imbalance
        metrics |= {f"{key}.{cell.policy}.{cell.label}": figures[key] for key in figures}
    return RouteReport(
        bench="route",
        metrics=metrics,
        machine=described,
        settings=asdict(plan)
        | {
            "trace": name,
            "num": len(calls),
            "own_rate": round(own_rate, 3),
            "ladder": rates,
            "profile": plan.profile.name,
            "seed": seed,
        },
        bars=BARS,
        notes=[
            f"simulated: {plan.num_tes} TEs ({plan.profile.name}); what decides is the code that ships",
            "hits and imbalance beside what could be had: every request over before the next; under load: loaded_*",
            "a request that was refused or lost counts as one that took until its deadline",
            f"a good request: TTFT <= {plan.slo_ttft_s:g} s and TPOT <= {plan.slo_tpot_s:g} s",
        ],
    )


def _hits(runs: Mapping[Cell, Run], calls: Sequence[Call], plan: Plan) -> dict[str, float]:
    """Ours without a suffix, for the bars; every policy's with its name."""
    bounds = {_UNLIMITED: max(ideal(calls), 1)}
    bounds |= {
        str(blocks): max(pooled(calls, blocks * plan.num_tes), 1) for blocks in plan.num_blocks
    }
    found = {}
    for cell, run in runs.items():
        is_free = cell.label == _UNLIMITED
        name = "hit_vs_ideal" if is_free else f"hit_vs_pooled_{cell.label}"
        found[f"{name}.{cell.policy}"] = run.found / bounds[cell.label]
        if is_free and not math.isnan(
            run.imbalance
        ):  # of a trace of less than a minute there is none
            found[f"imbalance_p99_60s.{cell.policy}"] = run.imbalance
    ours = {
        name.removesuffix(f".{OURS}"): value
        for name, value in found.items()
        if name.endswith(f".{OURS}")
    }
    return ours | found


def _against(
    figures: Mapping[tuple[str, str], Mapping[str, float]],
    policies: Sequence[str],
    rates: Sequence[str],
) -> dict[str, float]:
    """Ours beside the best of all others at each rate, and the worst of that; nothing unless both were run."""
    others = [policy for policy in policies if policy != OURS]
    if OURS not in policies or not others:
        return {}
    found: dict[str, float] = {}
    for rate in rates:
        ours = figures[(OURS, rate)]
        ttft_s = min(figures[(other, rate)]["ttft_p99_s"] for other in others)
        goodput = max(figures[(other, rate)]["goodput"] for other in others)
        found[f"ttft_p99_vs_best_at.{rate}"] = ttft_s / ours["ttft_p99_s"]
        found[f"goodput_vs_best_at.{rate}"] = ours["goodput"] / max(goodput, 1e-9)
    for name in ("ttft_p99_vs_best", "goodput_vs_best"):
        found[name] = min(found[f"{name}_at.{rate}"] for rate in rates)
    return found
