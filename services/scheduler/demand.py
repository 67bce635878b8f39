"""What this JE is asked for, as the cluster manager is told: counters for each model, and who waits for a TE.

The first that comes to wait is told of at once, the others within a few ms, what only counts twice a second. A client
that may not wait is turned away; but it would have, had it been allowed to, so for a moment it counts as one that does:
the model wakes up, and the next try finds it. This module must not know what becomes of the numbers.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final, NoReturn

from services.scheduler.cluster.price import price
from services.scheduler.costs import Costs
from services.scheduler.lengths import Lengths
from services.scheduler.parking import ParkingLot
from shared.bus import Bus
from shared.errors import DeepFlowError, NotReady, Overloaded
from shared.messages import Request, TaskEnded, TeBeat
from shared.scaling_messages import Demand
from shared.table import heed_cancellation

_EVERY_S: Final = 0.5
_BREATH_S: Final = 0.01  # between two words about those who wait
_LOOK_S: Final = 0.1  # while somebody waits, how often it is looked whether others have left
_TURNED_AWAY_S: Final = 1.0
_MAX_TURNED_AWAY: Final = 256  # of one model that count
_MAX_OPEN: Final = 16_384  # requests whose first token may still come; the oldest are given up
_MAX_MODELS: Final = 4096


@dataclass(slots=True)
class _Model:
    """One model's counters. `said` is the last word about it."""

    now: Demand
    said: Demand | None = None
    said_at: float = float("-inf")
    beat: TeBeat | None = None  # the last one that told what work costs
    turned_away: deque[float] = field(default_factory=lambda: deque(maxlen=_MAX_TURNED_AWAY))


class DemandMeter:
    """One JE's. `slo_s`: a first token that takes longer is late."""

    def __init__(
        self,
        je: str,
        lot: ParkingLot,
        lengths: Lengths,
        costs: Costs,
        *,
        slo_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._je = je
        self._lot = lot
        self._lengths = lengths
        self._costs = costs
        self._slo_s = slo_s
        self._clock = clock
        self._models: OrderedDict[str, _Model] = OrderedDict()
        self._open: OrderedDict[str, tuple[str, float]] = OrderedDict()  # request -> model, since
        self._urgent = asyncio.Event()

    # ------------------------------------------------------------------------------------------------ what one hears

    def beat(self, beat: TeBeat) -> None:
        """A TE lives, and tells what its work costs."""
        if beat.prefill_us and beat.decode_us and (model := self._models.get(beat.model)):
            model.beat = beat

    def accepted(self, request: Request, te: str | None) -> None:
        """A request has a TE, or waits for one."""
        now = self._clock()
        self._arrived(request)
        self._open.setdefault(request.request, (request.model, now))
        if len(self._open) > _MAX_OPEN:
            self._open.popitem(last=False)
        if te is None:
            self._urgent.set()

    def refused(self, request: Request, error: DeepFlowError) -> None:
        """A request was turned away."""
        if isinstance(error, Overloaded):  # nothing is later than never
            self._arrived(request)
            self._answered(request.model, is_late=True)
        elif isinstance(error, NotReady):
            self._arrived(request)
            self._of(request.model).turned_away.append(self._clock() + _TURNED_AWAY_S)
            self._urgent.set()

    def ended(self, ended: TaskEnded) -> None:
        """A TE is done with a task: when the first token came can be told now."""
        if ended.first_token_ms < 0 or ended.finish == "handed":
            return
        known = self._open.pop(ended.request, None)
        if known is not None:
            model, since = known
            after_s = (ended.total_ms - ended.first_token_ms) / 1000
            self._answered(model, is_late=self._clock() - since - after_s > self._slo_s)

    def _arrived(self, request: Request) -> None:
        model = self._of(request.model)  # from now on its waiting requests are told of
        if request.attempt > 1:  # it has been counted by whoever had it first
            return
        length = self._lengths.predict(request)
        work_s = price(
            len(request.prompt),
            length.mid * request.sampling.n,
            model.beat,
            self._costs,
        )
        model.now = replace(
            model.now,
            arrivals=model.now.arrivals + 1,
            work_ms=model.now.work_ms + round(work_s * 1000),
        )

    def _answered(self, name: str, *, is_late: bool) -> None:
        model = self._of(name)
        model.now = replace(
            model.now,
            answered=model.now.answered + 1,
            late=model.now.late + is_late,
        )

    def _of(self, name: str) -> _Model:
        model = self._models.get(name)
        if model is None:
            if len(self._models) >= _MAX_MODELS:
                self._models.popitem(last=False)
            model = self._models[name] = _Model(Demand(je=self._je, model=name))
        self._models.move_to_end(name)
        return model

    # ---------------------------------------------------------------------------------------------------- what is told

    def due(self, now: float) -> list[Demand]:
        """What is to be told now."""
        since: dict[str, float] = {}
        for parked in self._lot:  # the oldest first
            since.setdefault(parked.request.model, parked.since)
        told = []
        for name, model in self._models.items():
            while model.turned_away and model.turned_away[0] <= now:
                model.turned_away.popleft()
            demand = replace(
                model.now,
                parked=self._lot.num_waiting(name) + len(model.turned_away),
                waited_ms=round((now - since.get(name, now)) * 1000),
            )
            was_parked = model.said.parked if model.said is not None else 0
            is_news = demand.parked != was_parked
            is_due = now - model.said_at >= _EVERY_S
            if is_news or (is_due and (demand.parked or _counted(demand) != _counted(model.said))):
                model.said, model.said_at = demand, now
                told.append(demand)
        return told

    async def run(self, bus: Bus) -> NoReturn:
        """Tell the cluster manager, for ever."""
        while True:
            is_anybody_waiting = len(self._lot) > 0
            with contextlib.suppress(TimeoutError):  # the usual case: nobody came to wait
                async with asyncio.timeout(_LOOK_S if is_anybody_waiting else _EVERY_S):
                    await self._urgent.wait()
            self._urgent.clear()
            for demand in self.due(self._clock()):
                # A full buffer means the bus is away; who waits is told of again, and counters only grow.
                with contextlib.suppress(DeepFlowError):
                    await bus.publish(bus.subjects.demand(demand.model), demand)
            heed_cancellation()
            await asyncio.sleep(_BREATH_S)


def _counted(demand: Demand | None) -> tuple[int, ...]:
    if demand is None:
        return (0, 0, 0, 0)
    return demand.arrivals, demand.work_ms, demand.answered, demand.late
