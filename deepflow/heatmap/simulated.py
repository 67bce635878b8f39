"""Two TEs in the simulator: for large grids, and for hardware that is not here."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from deepflow.heatmap.grid import Shape
from deepflow.sim.cluster import simulate
from deepflow.sim.profile import Profile
from deepflow.sim.scenario import Scenario
from deepflow.sim.trace import Call
from shared.errors import Internal

_LONG_S: Final = 1e6  # nobody gives up


class Simulated:
    """TEs of one profile."""

    source: Final = "simulator"

    def __init__(self, profile: Profile) -> None:
        self._profile = profile
        self._whole = _patient(Scenario.of(2, profile), profile)
        self._pair = _patient(Scenario.of(0, profile, num_pairs=1), profile)

    async def capacity(self, shape: Shape) -> float:
        """By the profile: a batch as large as fits, whose prompts are computed beside it."""
        profile, context = self._profile, shape.prefill_len + shape.decode_len // 2
        batch = max(1, min(profile.max_num_seqs, profile.kv_tokens // context))
        decode_s = profile.decode_s(batch, batch * context, 1) / batch * shape.decode_len
        return 2.0 / (profile.prefill_s(shape.prefill_len) + decode_s)

    async def jct_s(self, shape: Shape, times_s: Sequence[float], seed: int) -> tuple[float, float]:
        """Both, in virtual time."""
        page = self._profile.page
        num_pages = -(-shape.prefill_len // page)
        calls = [
            Call(
                timestamp_ms=time_s * 1000,
                input_length=shape.prefill_len,
                output_length=shape.decode_len,
                hash_ids=tuple(range(number * num_pages, (number + 1) * num_pages)),
            )
            for number, time_s in enumerate(times_s)
        ]
        return _mean_jct_s(calls, self._whole, seed), _mean_jct_s(calls, self._pair, seed)


def _patient(scenario: Scenario, profile: Profile) -> Scenario:
    """Every request is taken, and split where there is a pair."""
    tes = tuple(replace(te, max_waiting=1 << 20) for te in scenario.tes)
    return replace(
        scenario,
        tes=tes,
        page=profile.page,
        deadline_s=_LONG_S,
        park_s=_LONG_S,
        min_split_tokens=1,
    )


def _mean_jct_s(calls: Sequence[Call], scenario: Scenario, seed: int) -> float:
    result = simulate(calls, replace(scenario, seed=seed))
    times_s = [one.jct_s for one in result.requests if one.ok]
    if len(times_s) != len(calls):
        raise Internal(f"{len(calls) - len(times_s)} of {len(calls)} simulated requests failed")
    return statistics.fmean(times_s)
