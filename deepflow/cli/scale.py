"""`deepflow scale`: how many TEs a model may have, and the way there as it happens.

Over the bus: a scheduler takes the bounds, the cluster manager tells what it is about, and pod hosts tell how each TE
came up. This module must not know how any of them decides.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import Final

from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from deepflow.cli.home import Home, Instance
from deepflow.cli.screen import console, fail, say, show_table
from shared.bus import Bus
from shared.errors import Unavailable
from shared.scaling_messages import Fleet, PodBeat, ScalingEntry, SetScaling, Start, Step

_CONNECT_S: Final = 5.0
_ASK_S: Final = 5.0
_SILENCE_S: Final = 10.0  # a cluster manager that tells nothing for so long is not there
_SHORT_S: Final = 3.0  # for so long it wants more than there is room for, and nothing moves
_BEAT_S: Final = 0.7  # a pod host at rest beats twice a second
_SHOWN: Final = 8
_TAKE_BACK: Final = -1
COLOCATED: Final = "colocated"  # the one role that is scaled


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What is to be set; None: as it is, or what was learned where all is taken back first (`is_reset`)."""

    least: int | None = None
    most: int | None = None
    keep_alive_s: float | None = None
    is_reset: bool = False

    @property
    def is_empty(self) -> bool:
        """Whether nothing is to be changed."""
        return self == Wish()

    def order(self, model: str, by: str) -> SetScaling:
        """As a message."""
        unset = _TAKE_BACK if self.is_reset else None
        return SetScaling(
            model=model,
            by=by,
            min_tes=unset if self.least is None else self.least,
            max_tes=unset if self.most is None else self.most,
            keep_alive_s=unset if self.keep_alive_s is None else self.keep_alive_s,
        )


@dataclass(slots=True)
class Watch:
    """What was heard since the wish was granted. `clock` readings are passed in."""

    entry: ScalingEntry
    known: frozenset[str] = frozenset()  # TEs that were up before
    fleet: Fleet | None = None
    starts: dict[str, Start] = field(default_factory=dict)
    fixed: dict[str, int] = field(default_factory=dict)  # pod -> TEs that stand beside the bounds
    waits_for: set[str] = field(default_factory=set)  # pods that are to tell once more
    told: asyncio.Event = field(default_factory=asyncio.Event)  # they have
    moved: float = 0.0  # when the fleet last changed
    heard: float = 0.0

    def on_fleet(self, fleet: Fleet, now: float) -> None:
        """The cluster manager speaks."""
        before = self.fleet
        self.heard = now
        if before is None or (before.ready, before.starting) != (fleet.ready, fleet.starting):
            self.moved = now
        if before is None or fleet.term >= before.term:
            self.fleet = fleet

    def on_pod(self, beat: PodBeat) -> None:
        """A pod host tells what it has, and what came up lately."""
        model = self.entry.model
        self.waits_for.discard(beat.id)
        if not self.waits_for:
            self.told.set()
        self.fixed[beat.id] = sum(te.model == model and te.role != COLOCATED for te in beat.tes)
        for start in beat.starts:
            if start.model == model and start.te not in self.known:
                self.starts[start.te] = start

    @property
    def is_done(self) -> bool:
        """Whether the fleet heeds the bounds, and is as it is to be."""
        fleet, entry = self.fleet, self.entry
        if fleet is None:
            return False
        num_fixed = sum(self.fixed.values())
        low, high = fleet.min_tes - num_fixed, fleet.max_tes - num_fixed
        heeds = entry.min_tes in (None, low) and entry.max_tes in (None, high)
        inside = fleet.min_tes <= fleet.target <= fleet.max_tes
        return heeds and inside and fleet.ready == fleet.target and not fleet.starting

    def is_stuck(self, now: float) -> bool:
        """Whether there is no room for all that is wanted, and nothing happens any more."""
        fleet = self.fleet
        return (
            fleet is not None and fleet.short and not fleet.starting and now - self.moved > _SHORT_S
        )


def scale(home: Home, model: str, wish: Wish, timeout_s: float) -> None:
    """Grant the wish and show what becomes of it; exit code 1 if that is not what was wished for."""
    instance = home.running()
    if instance is None:
        fail(f"Nothing runs in {home.path}: `deepflow up` starts it.")
    if model not in instance.models:
        fail(f"model {model!r} is not served here; {', '.join(instance.models)} is.")
    try:
        asyncio.run(_scale(instance, model, wish, timeout_s))
    except TimeoutError:
        fail(f"the bus at {instance.nats_url} does not answer")


async def _scale(instance: Instance, model: str, wish: Wish, timeout_s: float) -> None:
    async with asyncio.timeout(_CONNECT_S):
        bus = await Bus.connect(instance.bus, name="scale", inbox=instance.user)
    try:
        subjects = bus.subjects
        watch = Watch(ScalingEntry(model=model), await _known(bus))
        order = wish.order(model, instance.user)
        subject = subjects.scaling(model)
        watch.entry = await bus.request(subject, order, ScalingEntry, timeout_s=_ASK_S)
        watch.moved = watch.heard = time.monotonic()
        await bus.listen(
            subjects.fleet(model), (Fleet,), lambda fleet: watch.on_fleet(fleet, time.monotonic())
        )
        await bus.listen(subjects.beat("pod", "*"), (PodBeat,), watch.on_pod)
        await _follow(watch, wish, timeout_s)
    finally:
        await bus.close()
    _report(watch, wish)


async def _known(bus: Bus) -> frozenset[str]:
    """TEs that are up already: how they came up is not ours to show."""
    known: set[str] = set()
    heard = asyncio.Event()

    def on_pod(beat: PodBeat) -> None:
        known.update(start.te for start in beat.starts)
        known.update(te.te for te in beat.tes if te.state == "ready")
        heard.set()

    listening = await bus.listen(bus.subjects.beat("pod", "*"), (PodBeat,), on_pod)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_BEAT_S):
            await heard.wait()
    await listening.stop()
    return frozenset(known)


async def _follow(watch: Watch, wish: Wish, timeout_s: float) -> None:
    """Until all is as wished for. Raises Unavailable where it will not be."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f} of {task.total:.0f} TEs"),
        TimeElapsedColumn(),
    )
    give_up = time.monotonic() + timeout_s
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        task: TaskID | None = None
        while True:
            now, fleet = time.monotonic(), watch.fleet
            if fleet is not None:
                if task is None:
                    task = bars.add_task(fleet.model, total=max(1, fleet.target))
                bars.update(task, total=max(1, fleet.target), completed=fleet.ready)
                if wish.is_empty:
                    return
                if watch.is_done:
                    await _last_words(watch)
                    return
            if now - watch.heard > _SILENCE_S:
                raise Unavailable("no cluster manager says what it is about")
            if watch.is_stuck(now):
                assert fleet is not None
                raise Unavailable(f"there is no room for more than {fleet.ready} TEs")
            if now > give_up:
                raise Unavailable(
                    f"it is not done after {timeout_s:g} s; `deepflow status` shows how far it is"
                )
            await asyncio.sleep(0.05)


async def _last_words(watch: Watch) -> None:
    """The manager may have heard of the last start before we do."""
    watch.waits_for = set(watch.fixed)
    watch.told.clear()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_BEAT_S):
            await watch.told.wait()


def _report(watch: Watch, wish: Wish) -> None:
    fleet = watch.fleet
    assert fleet is not None
    bounds = f"{fleet.min_tes}..{fleet.max_tes}"
    if fleet.min_tes == fleet.max_tes:
        bounds = str(fleet.min_tes)
    why = f" ({fleet.reason})" if fleet.reason else ""
    say(f"{fleet.model}: {fleet.ready} of {fleet.target} TEs up, bounds {bounds}{why}")
    if not wish.is_empty and watch.starts:
        show_table(steps_table(watch.starts.values()))


def steps_table(starts: Iterable[Start]) -> Table:
    """How TEs came up, step by step in milliseconds: the slowest of them, and all together."""
    slowest = sorted(starts, key=lambda start: -start.total_s)
    table = Table("TE", "process", "weights", *Step, "total", box=None)
    for start in slowest[:_SHOWN]:
        steps = (_ms(start.steps.get(step, 0.0)) for step in Step)
        table.add_row(start.te, start.process, start.weights, *steps, _ms(start.total_s))
    if len(slowest) > _SHOWN:
        steps = (_ms(median(start.steps.get(step, 0.0) for start in slowest)) for step in Step)
        total = _ms(median(start.total_s for start in slowest))
        table.add_row(f"median of {len(slowest)}", "", "", *steps, total)
    return table


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms"
