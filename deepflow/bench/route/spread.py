"""Placement without time: a trace on TEs that do everything at once, placed by the code that ships.

What is left is where each prompt goes: how much of it is found there, and how evenly the rest is spread. That compares
a policy with what could be found at best, which a run with queues does not: there, what is worth a wait depends on the
load. A page is a block of the trace.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Final

from deepflow.bench.distribution import percentile
from deepflow.bench.route.oracle import Cache, full_blocks
from deepflow.sim.report import WINDOW_S
from deepflow.sim.trace import BLOCK, Call
from services.scheduler.costs import Costs
from services.scheduler.heatmap import Heatmaps
from services.scheduler.lengths import Lengths
from services.scheduler.placer import Placer
from services.scheduler.policy.roster import make
from services.scheduler.prompt_tree import PromptTrees
from services.scheduler.registry import Registry
from services.scheduler.work import Length, Work
from shared.liveness import Liveness
from shared.messages import Band, TaskKind, TeBeat
from shared.rtc_messages import BlockEvents

_MODEL: Final = "model"
_BLOCK_S: Final = 1.0  # a block costs a second


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """What came of a policy: prompt tokens found, and of each full minute the most work of a TE / the mean."""

    found: int
    imbalances: tuple[float, ...]

    @property
    def imbalance_p99(self) -> float:
        """NaN for less than a minute."""
        return percentile(self.imbalances, 99) if self.imbalances else math.nan


def spread(
    calls: Sequence[Call], policy: str, *, num_tes: int, num_blocks: int = 0, seed: int = 0
) -> Spread:
    """Every call in turn, on `num_tes` TEs with room for so many blocks each, 0 for TEs without bounds."""
    costs = Costs(prefill_tokens_per_s=BLOCK / _BLOCK_S)
    registry, trees = Registry(Liveness(), costs=costs, page=BLOCK), PromptTrees()
    placer = Placer(
        policy=make(policy),
        registry=registry,
        trees=trees,
        heatmaps=Heatmaps(),
        lengths=Lengths(),
        costs=costs,
        random=Random(seed),
    )
    caches = {f"te-{number}": Cache(num_blocks) for number in range(num_tes)}
    for te in caches:
        beat = TeBeat(id=te, model=_MODEL, pod="pod", state="ready")
        registry.beat(beat, 0.0)
        trees.seen(te, _MODEL, beat.role)
    seqs = dict.fromkeys(caches, 0)
    minutes: dict[int, dict[str, int]] = {}
    found = 0
    for number, call in enumerate(calls):
        now = call.timestamp_ms / 1000
        hashes = [one.to_bytes(16, "little", signed=True) for one in full_blocks(call)]
        work = _work(number, call, hashes)
        best = placer.place(work, now).candidates[0]
        placer.asked(best, work, work.request, now)
        placer.ended(best.te, work.request)
        num_found = caches[best.te].num_found(call)
        found += num_found
        minute = minutes.setdefault(int(now // WINDOW_S), dict.fromkeys(caches, 0))
        minute[best.te] += len(hashes) - num_found
        stored, removed = caches[best.te].use(call)
        seqs[best.te] += 1
        trees.apply(
            BlockEvents(
                te=best.te,
                model=_MODEL,
                seq=seqs[best.te],
                stored=[one.to_bytes(16, "little", signed=True) for one in stored],
                removed=[one.to_bytes(16, "little", signed=True) for one in removed],
            )
        )
    last = int(calls[-1].timestamp_ms / 1000 // WINDOW_S)
    full = [minutes[number].values() for number in sorted(minutes) if number < last]
    imbalances = tuple(max(minute) * num_tes / sum(minute) for minute in full if sum(minute))
    return Spread(found=found * BLOCK, imbalances=imbalances)


def _work(number: int, call: Call, hashes: Sequence[bytes]) -> Work:
    return Work(
        request=f"request-{number}",
        attempt=1,
        model=_MODEL,
        tenant=call.tenant,
        kind=TaskKind.GENERATE,
        band=Band.DEFAULT,
        num_known=call.input_length,
        hashes=hashes,
        num_choices=1,
        length=Length(low=0, mid=0),
    )
