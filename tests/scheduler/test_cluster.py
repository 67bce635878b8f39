"""Cluster managers on a real bus: who leads, what pod hosts are told, and what no blow must bring about. The test plays
pod hosts and JEs."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from services.scheduler.cluster.manager import ClusterManager
from services.scheduler.settings import SchedulerSettings
from shared.bus import Bus
from shared.config import BusSettings
from shared.errors import Forbidden, InvalidRequest, Unavailable
from shared.messages import TeBeat
from shared.scaling_messages import (
    Demand,
    Fleet,
    PodBeat,
    PodModel,
    PodTe,
    Scaled,
    ScaleOrder,
    ScalingEntry,
    SetScaling,
    Target,
)
from shared.service import Service
from tests.nats_server import NatsServer
from tests.scheduler.players import MODEL, eventually

TTL_S = 0.6


class Pod:
    """Plays a pod host: has what it is told to have, up to `room` TEs, and beats. `says` refuses orders."""

    def __init__(self, bus: Bus, name: str, *, num: int = 0, room: int = 8, most: int = 8) -> None:
        self.bus = bus
        self.name = name
        self.room = room
        self.most = most  # its settings
        self.num = num
        self.load = 0  # requests in each TE
        self.term = 0
        self.orders: list[ScaleOrder] = []
        self.says: Exception | None = None
        self.silent = False

    @asynccontextmanager
    async def up(self) -> AsyncIterator[Pod]:
        """Serves and beats."""
        served = await self.bus.serve(
            self.bus.subjects.scale(self.name), (ScaleOrder,), self._order
        )
        beating = asyncio.create_task(self._beat_loop())
        try:
            yield self
        finally:
            beating.cancel()
            await served.stop()

    async def _order(self, order: ScaleOrder) -> Scaled:
        self.orders.append(order)
        if self.says is not None:
            raise self.says
        if order.term < self.term:
            raise Forbidden("an earlier term")
        self.term = order.term
        self.num = min(told(order), self.room)
        await self.beat()
        return Scaled(pod=self.name, term=order.term)

    async def _beat_loop(self) -> None:
        while True:
            if not self.silent:
                await self.beat()
            await asyncio.sleep(0.1)

    async def beat(self) -> None:
        """One."""
        model = PodModel(
            name=MODEL, min_tes=0, max_tes=self.most, te_bytes=1, weights_bytes=1, num_slots=8
        )
        beat = PodBeat(
            kind="pod",
            id=self.name,
            host=self.name,
            term=self.term,
            models=[model],
            tes=[
                PodTe(te=te.id, model=MODEL, role="colocated", state="ready") for te in self.tes()
            ],
            max_tes=64,
            num_bytes=1000,
            cores=4,
        )
        await self.bus.publish(self.bus.subjects.beat("pod", self.name), beat)

    def tes(self) -> list[TeBeat]:
        """Its TEs' last beats."""
        return [
            TeBeat(
                id=f"{self.name}-te-{number}",
                model=MODEL,
                pod=self.name,
                state="ready",
                running=self.load,
            )
            for number in range(self.num)
        ]

    @property
    def told(self) -> int:
        """How many TEs it is to have; -1: nobody said."""
        return told(self.orders[-1]) if self.orders else -1


def told(order: ScaleOrder) -> int:
    """How many TEs an order is about."""
    return sum(target.num for target in order.targets)


async def knows(model: str) -> bool:
    """What the catalogue has."""
    return model == MODEL


class World:
    """A bus with pod hosts, and whoever manages them."""

    def __init__(self, nats: NatsServer, bus: Bus) -> None:
        self.nats = nats
        self.bus = bus
        self.pods: list[Pod] = []

    def tes(self) -> list[TeBeat]:
        """Those that every manager hears."""
        return [te for pod in self.pods for te in pod.tes()]

    @asynccontextmanager
    async def pod(self, name: str, **having: int) -> AsyncIterator[Pod]:
        """One more."""
        async with Pod(self.bus, name, **having).up() as pod:
            self.pods.append(pod)
            yield pod

    @asynccontextmanager
    async def manager(self, name: str) -> AsyncIterator[ClusterManager]:
        """One more, on a connection of its own, which ends without a word."""
        bus = await Bus.connect(BusSettings(url=self.nats.url, grace_s=1), name=name)
        settings = SchedulerSettings.load({"DEEPFLOW_CLUSTER_LEASE_S": str(TTL_S)})
        running = asyncio.Event()
        made: list[ClusterManager] = []

        async def run() -> None:
            async with asyncio.TaskGroup() as tasks:
                service = Service("scheduler", settings, bus, tasks, name)
                manager = ClusterManager(service, tes=self.tes, knows=knows)
                await manager.start()
                await bus.flush()  # it can be asked from now on
                made.append(manager)
                running.set()
                await asyncio.Event().wait()

        life = asyncio.create_task(run())
        try:
            await running.wait()
            yield made[0]
        finally:
            life.cancel()
            await asyncio.wait([life])
            await bus.close()
            assert life.cancelled(), life.exception()

    async def demand(self, **counted: int) -> None:
        """A JE's word."""
        demand = Demand(je="scheduler-je", model=MODEL, **counted)
        await self.bus.publish(self.bus.subjects.demand(MODEL), demand)

    async def scale(self, **bounds: Any) -> ScalingEntry:
        """An operator's word."""
        order = SetScaling(model=MODEL, by="operator", **bounds)
        return await self.bus.request(
            self.bus.subjects.scaling(MODEL), order, ScalingEntry, timeout_s=5
        )


@pytest.fixture
async def world(nats: NatsServer, bus: Bus) -> World:
    """With nothing in it yet."""
    return World(nats, bus)


def leads(manager: ClusterManager) -> Callable[[], bool]:
    """Whether it does."""
    return lambda: bool(manager.status()["leading"])


async def test_the_first_who_waits_is_heard_at_once_and_the_order_is_repeated(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not take a tick of the clock; the same order again and again is the same order, and everybody hears what
    there is to be."""
    fleets: list[Fleet] = []
    await world.bus.listen(world.bus.subjects.fleet("*"), (Fleet,), fleets.append)
    async with world.pod("p") as pod, world.manager("scheduler-a"):
        await eventually(lambda: pod.told == 0)
        with monkeypatch.context() as patch:
            patch.setattr("services.scheduler.cluster.manager._TICK_S", 3600.0)
            await asyncio.sleep(0.3)  # from now on nothing happens by itself
            await world.demand(parked=1, arrivals=1)
            await eventually(lambda: pod.told == 1)
        pod.orders.clear()
        await world.demand(arrivals=2)
        await eventually(lambda: len(pod.orders) >= 2)
        assert pod.orders[0] == pod.orders[1]
        await eventually(lambda: fleets[-1].ready == 1)
        assert (fleets[-1].target, fleets[-1].starting, fleets[-1].max_tes) == (1, 0, 8)


async def test_another_takes_over_and_leaves_a_busy_fleet_alone(world: World) -> None:
    """Under a higher term, once the lease has run out; what it finds is what there is to be, although it has never
    heard of any demand. The one before it is refused."""
    async with world.pod("p", num=5) as pod, AsyncExitStack() as lives:
        pod.load = 1
        first = await lives.enter_async_context(world.manager("scheduler-b"))
        await eventually(leads(first))
        await eventually(lambda: pod.told == 5)
        term = pod.term
        async with world.manager("scheduler-c") as second:
            await eventually(lambda: second.status()["leader"] == "scheduler-b")
            await lives.aclose()  # kill -9
            await eventually(lambda: pod.term > term)
            assert leads(second)()
            await asyncio.sleep(2.6)  # longer than a surplus is borne
            assert {told(order) for order in pod.orders} == {5}
            late = ScaleOrder(
                by="scheduler-b", term=term, targets=[Target(model=MODEL, role="colocated", num=0)]
            )
            with pytest.raises(Forbidden):
                await world.bus.request(world.bus.subjects.scale("p"), late, Scaled, timeout_s=5)
            assert pod.num == 5


async def test_a_leader_that_is_refused_orders_no_more(world: World) -> None:
    """A pod host has heard of a later one: it leads again only under a higher term than that."""
    async with world.pod("p") as pod, world.manager("scheduler-a"):
        await eventually(lambda: pod.told == 0)
        later = pod.term + 1_000_000
        pod.term = later
        pod.orders.clear()
        await eventually(lambda: pod.term > later)
        assert sum(order.term < later for order in pod.orders) <= 1


async def test_one_that_leaves_is_followed_at_once(world: World) -> None:
    """Nobody waits for the lease to run out; and where the store was lost too, terms grow on."""
    async with world.pod("p") as pod, world.manager("scheduler-a") as first:
        await eventually(lambda: pod.term > 0)
        async with world.manager("scheduler-b") as second:
            await first.leave()
            await eventually(leads(second))
            await eventually(lambda: pod.term == second.status()["term"])
            before = pod.term
            await world.scale(min_tes=2)
            await eventually(lambda: pod.num == 2)
            world.nats.kill()
            shutil.rmtree(Path(world.nats._folder) / "js")
            world.nats.start()
            await eventually(lambda: pod.term > before)
            assert pod.num == 2


async def test_a_pod_host_that_cannot_is_not_asked_over_and_over(world: World) -> None:
    """What it has no room for goes elsewhere, and its orders settle at what it has."""
    async with (
        world.pod("p", room=1) as small,
        world.pod("q", room=1) as other,
        world.manager("scheduler-a"),
    ):
        await eventually(lambda: len(small.orders) > 0)
        await world.scale(min_tes=4)
        await eventually(lambda: small.num == other.num == 1)
        await eventually(lambda: small.told == other.told == 1)
        large = Pod(world.bus, "r")
        async with large.up():
            world.pods.append(large)
            await eventually(lambda: large.num == 2)
            assert [small.told, other.told] == [1, 1]


async def test_a_pod_host_that_takes_no_order_is_asked_less_and_less(world: World) -> None:
    """It is not stormed, its share goes to another, and it is not taken for dead."""
    async with (
        world.pod("p") as deaf,
        world.pod("q") as other,
        world.manager("scheduler-a") as manager,
    ):
        deaf.says = Unavailable("not now")
        await eventually(lambda: deaf.told == 0)
        deaf.orders.clear()
        await world.scale(min_tes=2)
        await eventually(lambda: other.num == 2)
        deaf.orders.clear()
        await asyncio.sleep(1.6)
        assert len(deaf.orders) <= 3
        assert set(manager.status()["pods"]) == {"p", "q"}


async def test_a_restarted_pod_host_gets_what_the_old_one_had(world: World) -> None:
    """It has another name; once the old one is silent for long enough, its share is the new one's, and no more."""
    async with world.manager("scheduler-a"):
        async with world.pod("p-1", most=3) as old:
            await world.bus.flush()
            await eventually(lambda: old.told >= 0)
            await world.scale(min_tes=3)
            await eventually(lambda: old.num == 3)
        world.pods.remove(old)
        async with world.pod("p-2", most=3) as new:
            await eventually(lambda: new.num == 3)
            await asyncio.sleep(0.3)
            assert {told(order) for order in new.orders} <= {0, 3}


async def test_bounds_are_not_judged_by_pod_hosts_that_are_away(world: World) -> None:
    """While no pod host is up an operator may set a minimum, and nobody is told that there may be no TE; who waits is
    seen to as soon as one comes, which bounds it then."""
    fleets: list[Fleet] = []
    await world.bus.listen(world.bus.subjects.fleet("*"), (Fleet,), fleets.append)
    async with world.manager("scheduler-a"):
        assert (await world.scale(min_tes=9)).min_tes == 9
        assert (await world.scale(min_tes=-1)).min_tes is None
        await world.demand(parked=1, arrivals=1)
        await eventually(lambda: bool(fleets))
        assert (fleets[-1].max_tes, fleets[-1].target) == (-1, 0)
        async with world.pod("p") as pod:
            await eventually(lambda: pod.num == 1)
            await eventually(lambda: fleets[-1].max_tes == 8)
            with pytest.raises(InvalidRequest, match="min"):
                await world.scale(min_tes=9)
