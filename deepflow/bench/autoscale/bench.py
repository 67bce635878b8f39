"""`bench autoscale`: the AUTOSCALER in the simulator beside fixed fleets, a rule like Kubernetes', an oracle.

What is asked is which share of the requests is served within the objective, and how many TE-seconds that takes: every
second in which a TE is there, starting, ready or draining.
"""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Final

from rich.progress import Progress

from deepflow.bench import machine
from deepflow.bench.autoscale.rules import Hpa, known, work_s
from deepflow.bench.progress import step
from deepflow.bench.report import Bar, Report
from deepflow.sim.cluster import simulate
from deepflow.sim.profile import NPU_34B_TP4, Profile
from deepflow.sim.report import Outcome, Result
from deepflow.sim.scaling import Autoscaling, Decision, Rule
from deepflow.sim.scenario import Scenario, TeSpec
from deepflow.sim.trace import Call
from services.scheduler.cluster.autoscaler import Autoscaler
from services.worker.settings import num_cores

OURS: Final = "deepflow"
HPA: Final = "hpa"
ORACLE: Final = "oracle"
BARS: Final = (
    Bar("attainment", ">=", 0.97, "requests served within the objective"),
    Bar("te_seconds_vs_hpa", "<", 1.0, "TE-seconds, ours / the HPA-like rule's"),
    Bar("te_seconds_vs_fixed", "<", 1.0, "TE-seconds, ours / the least fixed fleet as good"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Times are seconds. `fixed`: sizes of fixed fleets; `hpa_per_te`: requests in flight per TE that it aims at."""

    span_s: float = 1800.0  # of a generated trace
    profile: Profile = NPU_34B_TP4
    start_s: float = 2.0
    slo_ttft_s: float = 5.0
    max_tes: int = 64
    fixed: tuple[int, ...] = (1, 2, 4, 6, 8, 12, 16)
    hpa_per_te: float = 2.0


QUICK: Final = Plan(span_s=90.0, fixed=(2, 4))


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """How a fleet did."""

    attainment: float
    te_seconds: float
    ttft_p50_s: float
    ttft_p99_s: float
    failed_share: float
    num_starts: int
    decisions: tuple[Decision, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoscaleReport(Report):
    """With the decisions, for the picture alone."""

    decisions: dict[str, tuple[Decision, ...]] = field(default_factory=dict)


def bench_autoscale(
    calls: Sequence[Call], name: str, plan: Plan, seed: int, progress: Progress
) -> AutoscaleReport:
    """Every fleet on the same calls. `name` is what a person calls the trace."""
    kinds = [OURS, HPA, ORACLE, *(f"fixed-{num}" for num in plan.fixed)]
    runs: dict[str, Run] = {}
    context = multiprocessing.get_context("spawn")
    with (
        step(progress, f"{name}: {len(calls)} requests", len(kinds)) as advance,
        ProcessPoolExecutor(num_cores(), mp_context=context) as pool,
    ):
        waiting = {pool.submit(run_one, kind, calls, plan, seed): kind for kind in kinds}
        for done in as_completed(waiting):
            runs[waiting[done]] = done.result()
            advance()
    ours, hpa, oracle = runs[OURS], runs[HPA], runs[ORACLE]
    metrics = {
        "attainment": ours.attainment,
        "te_seconds": ours.te_seconds,
        "te_seconds_vs_hpa": ours.te_seconds / hpa.te_seconds,
        "te_seconds_vs_oracle": ours.te_seconds / max(oracle.te_seconds, 1e-9),
    }
    as_good = [
        runs[f"fixed-{num}"].te_seconds
        for num in plan.fixed
        if runs[f"fixed-{num}"].attainment >= ours.attainment
    ]
    if as_good:
        metrics["te_seconds_vs_fixed"] = ours.te_seconds / min(as_good)
    for kind in kinds:
        found = asdict(runs[kind])
        del found["decisions"]
        metrics |= {f"{key}.{kind}": float(value) for key, value in found.items()}
    return AutoscaleReport(
        bench="autoscale",
        metrics=metrics,
        machine=machine.describe(),
        settings=asdict(plan)
        | {
            "trace": name,
            "num": len(calls),
            "work_s": round(sum(work_s(call, plan.profile) for call in calls), 1),
            "profile": plan.profile.name,
            "seed": seed,
        },
        bars=BARS,
        notes=[
            f"simulated: a TE ({plan.profile.name}) takes {plan.start_s:g} s to start; the rule is the code that ships",
            f"within the objective: all tokens, the first of them after at most {plan.slo_ttft_s:g} s",
            "TE-seconds: every second in which a TE is there, starting, ready or draining",
            "the oracle knows every request before it comes, and starts TEs ahead of it",
        ],
        decisions={kind: runs[kind].decisions for kind in (OURS, HPA, ORACLE)},
    )


def run_one(kind: str, calls: Sequence[Call], plan: Plan, seed: int) -> Run:
    """A run of its own, the same for the same arguments."""
    hop_s = plan.profile.answer_s / 2
    spec = TeSpec(profile=plan.profile)
    if kind.startswith("fixed-"):
        scenario = Scenario.of(int(kind.removeprefix("fixed-")), plan.profile, seed=seed)
    else:
        make: Callable[[], Rule] = Autoscaler
        if kind == HPA:
            make = partial(Hpa, plan.hpa_per_te)
        elif kind == ORACLE:
            begins = 2 * Scenario(tes=()).beat_s
            make = partial(known, calls, plan.profile, plan.start_s + 1.0, begins)
        scaling = Autoscaling(make=make, max_tes=plan.max_tes, slo_ttft_s=plan.slo_ttft_s)
        scenario = Scenario(
            tes=(), like=spec, load_s=plan.start_s, hop_s=hop_s, seed=seed, autoscaling=scaling
        )
    return _judged(simulate(calls, scenario), plan)


def _judged(result: Result, plan: Plan) -> Run:
    def is_good(one: Outcome) -> bool:
        return one.ok and one.ttft_s is not None and one.ttft_s <= plan.slo_ttft_s

    num = max(len(result.requests), 1)
    return Run(
        attainment=sum(map(is_good, result.requests)) / num,
        te_seconds=result.te_seconds,
        ttft_p50_s=_finite(result.ttft_s(0.5)),
        ttft_p99_s=_finite(result.ttft_s(0.99)),
        failed_share=1 - result.num_done / num,
        num_starts=len(result.tes),
        decisions=result.decisions,
    )


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0
