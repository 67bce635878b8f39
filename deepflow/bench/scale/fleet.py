"""What a platform's bus tells about its TEs as they come and go, and the word that has more or fewer of them.

It must not know what is measured. Times are `time.perf_counter()`'s.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Set
from typing import Final

from deepflow.bench.stack import Stack
from shared.bus import Bus
from shared.errors import Unavailable
from shared.messages import TeBeat
from shared.scaling_messages import PodBeat, ScalingEntry, SetScaling, Start

_ASK_S: Final = 5.0
_FRESH_S: Final = 1.5  # without a beat for so long a TE is gone


class FleetWatch:
    """The TEs of all models of one platform; make it with `open`."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._heard = asyncio.Event()
        self.beats: dict[str, tuple[float, TeBeat]] = {}
        self.ready_at: dict[str, float] = {}  # the first beat that said so
        self.pods: dict[str, PodBeat] = {}
        self.starts: dict[str, Start] = {}  # by TE
        self.on_pod: Callable[[PodBeat], None] = lambda _: None

    @classmethod
    async def open(cls, stack: Stack) -> FleetWatch:
        """Listens from now on, for as long as the stack's bus is open."""
        bus = stack.bus
        watch = cls(bus)
        await bus.listen(bus.subjects.beat("te", "*"), (TeBeat,), watch._te)
        await bus.listen(bus.subjects.beat("pod", "*"), (PodBeat,), watch._pod)
        await watch.until(lambda: bool(watch.pods), "a pod host")
        return watch

    def _te(self, beat: TeBeat) -> None:
        now = time.perf_counter()
        self.beats[beat.id] = (now, beat)
        if beat.state == "ready":
            self.ready_at.setdefault(beat.id, now)
        self._heard.set()

    def _pod(self, beat: PodBeat) -> None:
        self.pods[beat.id] = beat
        for start in beat.starts:
            self.starts[start.te] = start
        self.on_pod(beat)
        self._heard.set()

    def ready(self) -> list[str]:
        """The TEs that take requests, the oldest first."""
        now = time.perf_counter()
        alive = {
            te
            for te, (at, beat) in self.beats.items()
            if beat.state == "ready" and now - at < _FRESH_S
        }
        return [te for te in self.ready_at if te in alive]

    def num_up(self, model: str) -> int:
        """TEs of a model in whatever state, as their pod hosts say."""
        return sum(te.model == model for pod in self.pods.values() for te in pod.tes)

    def num_warm(self) -> int:
        """Pre-warmed TEs."""
        return sum(pod.num_warm for pod in self.pods.values())

    async def scale(
        self, model: str, low: int, high: int, *, keep_alive_s: float | None = None
    ) -> ScalingEntry:
        """Have from `low` to `high` TEs of a model from now on. Raises DeepFlowError."""
        order = SetScaling(
            model=model, by="bench", min_tes=low, max_tes=high, keep_alive_s=keep_alive_s
        )
        subject = self._bus.subjects.scaling(model)
        return await self._bus.request(subject, order, ScalingEntry, timeout_s=_ASK_S)

    async def new_starts(self, known: Set[str], num: int) -> list[Start]:
        """The records of at least `num` TEs that are not in `known`. Raises Unavailable."""
        await self.until(lambda: len(self.starts.keys() - known) >= num, f"records of {num} starts")
        return [start for te, start in self.starts.items() if te not in known]

    async def until(self, holds: Callable[[], bool], what: str, timeout_s: float = 120.0) -> float:
        """Wait for something that beats tell; when it was so. Raises Unavailable, naming `what` did not come."""
        try:
            async with asyncio.timeout(timeout_s):
                while not holds():
                    self._heard.clear()
                    await self._heard.wait()
        except TimeoutError:
            raise Unavailable(f"not within {timeout_s:g} s: {what}") from None
        return time.perf_counter()

    async def pause(self, timeout_s: float) -> None:
        """Until the next beat of anybody, at most so long."""
        self._heard.clear()
        try:
            async with asyncio.timeout(timeout_s):
                await self._heard.wait()
        except TimeoutError:
            return
