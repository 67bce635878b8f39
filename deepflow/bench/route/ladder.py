"""Every policy at every rate: simulated runs, side by side on the cores of this machine.

It must not know bars or reports.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace

from deepflow.bench.distribution import percentile
from deepflow.bench.route.plan import Plan
from deepflow.bench.route.spread import spread
from deepflow.sim.cluster import simulate
from deepflow.sim.report import Outcome, Result
from deepflow.sim.scenario import Scenario
from deepflow.sim.trace import Call, faster
from services.worker.settings import num_cores


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One run: a policy at so many times the trace's own rate, with so many blocks per TE (None: the profile's).

    Without `is_timed` TEs do everything at once, and 0 blocks are blocks without bounds.
    """

    policy: str
    label: str  # the rate, or the number of blocks
    speed: float = 1.0
    num_blocks: int | None = None
    is_timed: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a cell brought. `found` are prompt tokens from a cache, `figures` by the names of their metrics."""

    found: int
    imbalance: float
    figures: dict[str, float]


def run_all(
    cells: Iterable[Cell], calls: Sequence[Call], plan: Plan, seed: int, advance: Callable[[], None]
) -> dict[Cell, Run]:
    """The cells' runs, by processes of their own; `advance` is called at the end of each."""
    runs = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_cores(), mp_context=context, initializer=_begin) as pool:
        waiting = {pool.submit(run_one, cell, calls, plan, seed): cell for cell in cells}
        try:
            for done in as_completed(waiting):
                runs[waiting[done]] = done.result()
                advance()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return runs


def run_one(cell: Cell, calls: Sequence[Call], plan: Plan, seed: int) -> Run:
    """A run of its own, the same for the same arguments."""
    if not cell.is_timed:
        done = spread(
            calls,
            cell.policy,
            num_tes=plan.num_tes,
            num_blocks=cell.num_blocks or 0,
            seed=seed,
        )
        return Run(found=done.found, imbalance=done.imbalance_p99, figures={})
    scenario = Scenario.of(
        plan.num_tes, plan.profile, num_blocks=cell.num_blocks, policy=cell.policy, seed=seed
    )
    scenario = replace(scenario, num_jes=plan.num_jes)
    result = simulate(faster(calls, cell.speed), scenario)
    imbalances = result.imbalances()
    return Run(
        found=sum(one.cached_tokens for one in result.requests),
        imbalance=percentile(imbalances, 99) if imbalances else math.nan,
        figures=_figures(result, plan, scenario.deadline_s),
    )


def _figures(result: Result, plan: Plan, deadline_s: float) -> dict[str, float]:
    """Of one run. A request that was refused or lost counts as one that took until the deadline: a policy must not look
    quicker for what it did not do."""

    def ttft_s(one: Outcome) -> float:
        return one.ttft_s if one.ok and one.ttft_s is not None else deadline_s

    def jct_s(one: Outcome) -> float:
        return one.jct_s if one.ok else deadline_s

    ttfts, jcts = (list(map(of, result.requests)) for of in (ttft_s, jct_s))
    found = {
        "ttft_mean_s": math.fsum(ttfts) / len(ttfts),
        "ttft_p50_s": percentile(ttfts, 50),
        "ttft_p99_s": percentile(ttfts, 99),
        "jct_mean_s": math.fsum(jcts) / len(jcts),
        "jct_p99_s": percentile(jcts, 99),
        "goodput": result.goodput(ttft_s=plan.slo_ttft_s, tpot_s=plan.slo_tpot_s),
        "hit": result.hit_rate,
        "failed_share": 1 - result.num_done / len(result.requests),
    }
    tpots = result.values(lambda one: one.tpot_s)
    if tpots:
        found |= {"tpot_p50_s": percentile(tpots, 50), "tpot_p99_s": percentile(tpots, 99)}
    return found


def _begin() -> None:
    """A worker has nothing to say about Ctrl-C, which reaches the whole group, and does not outlive its parent."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "only a worker has a parent"
    parent.join()
    os._exit(1)
