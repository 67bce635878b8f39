"""How much `bench route` simulates, and the bars it measures against. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Final

from deepflow.bench.report import Bar
from deepflow.bench.route.oracle import ideal
from deepflow.sim.profile import NPU_34B_TP4, Profile, pairs
from deepflow.sim.trace import Call
from services.scheduler.policy.roster import DEFAULT, NAMES

OURS: Final = DEFAULT
BARS: Final = (
    Bar("hit_vs_ideal", ">=", 0.98, "hits / ideal, unlimited blocks"),
    Bar("hit_vs_pooled_1000", ">=", 0.97, "hits / pooled LRU, 1,000 blocks per TE"),
    Bar("hit_vs_pooled_2000", ">=", 0.97, "hits / pooled LRU, 2,000 blocks per TE"),
    Bar("imbalance_p99_60s", "<=", 1.4, "max / mean work in windows of 60 s, p99"),
    Bar("ttft_p99_vs_best", ">=", 1.0, "P99 TTFT, best other policy / ours, worst rate"),
    Bar("goodput_vs_best", ">=", 1.0, "goodput, ours / best other policy, worst rate"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Sizes. `loads` are the ladder's rates as shares of what all TEs can take; `rates`, requests per second, go
    before them."""

    num: int = 3000  # requests of a generated trace
    num_tes: int = 8
    num_jes: int = 1
    profile: Profile = NPU_34B_TP4
    policies: tuple[str, ...] = NAMES  # ours first
    loads: tuple[float, ...] = (0.3, 0.5, 0.7, 0.85, 1.0, 1.2)
    rates: tuple[float, ...] = ()
    num_blocks: tuple[int, ...] = (
        1000,
        2000,
    )  # per TE, where hits are compared with a pool of equal size
    slo_ttft_s: float = 5.0  # a good request keeps both
    slo_tpot_s: float = 0.1

    def ladder(self, calls: Sequence[Call]) -> tuple[float, ...]:
        """The rates, requests per second, ascending."""
        if self.rates:
            return tuple(sorted(self.rates))
        most = capacity(calls, self.profile, self.num_tes)
        return tuple(float(f"{load * most:.2g}") for load in self.loads)


QUICK: Final = Plan(num=250, num_tes=3, policies=NAMES[:2], loads=(0.5, 1.0))


def capacity(calls: Sequence[Call], profile: Profile, num_tes: int) -> float:
    """About how many of the requests `num_tes` TEs can serve per second, were all found that one cache could hold.

    Every row is counted as one of a full step.
    """
    share = ideal(calls) / sum(call.input_length for call in calls)
    row_s = profile.rows_s(profile.max_batched_tokens) / profile.max_batched_tokens
    works_s = []
    for call in calls:
        cached = int(share * call.input_length)
        own = call.input_length - cached
        works_s.append(
            row_s * (own + call.output_length)
            + profile.prefill_pair_s * pairs(cached, own)
            + profile.decode_pair_s * pairs(call.input_length, call.output_length)
        )
    return num_tes / fmean(works_s)


def rate_of(calls: Sequence[Call]) -> float:
    """Requests per second."""
    return len(calls) / max((calls[-1].timestamp_ms - calls[0].timestamp_ms) / 1000, 1e-9)
