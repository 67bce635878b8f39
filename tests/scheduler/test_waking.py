"""Requests for a model without a TE, at a real Job Executor: who waits for what, who is refused, and who gets the TEs
that come up one after another. The test plays the cluster manager, the TEs and the gateway."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from shared.bus import Bus
from shared.errors import NotReady
from shared.messages import Accepted, Progress, StatusQuery, StatusReply, Task
from shared.scaling_messages import Demand, Fleet
from tests.nats_server import NatsServer
from tests.scheduler.players import (
    MODEL,
    Client,
    Te,
    eventually,
    process,
    publish_model,
    wait_ready,
)

# The JE has a cluster manager of its own, which is not listened to beside one of a later term.
ASLEEP = Fleet(model=MODEL, term=1 << 60, target=0, ready=0, starting=0, max_tes=8)


class Manager:
    """Says what it is about, again and again."""

    def __init__(self, bus: Bus) -> None:
        self.fleet = ASLEEP
        self._bus = bus

    async def talk(self) -> None:
        """Until cancelled."""
        while True:
            await self.say()
            await asyncio.sleep(0.2)

    async def say(self, **changes: object) -> None:
        """Changes what it is about, at once."""
        self.fleet = replace(self.fleet, **changes)  # type: ignore[arg-type]
        await self._bus.publish(self._bus.subjects.fleet(MODEL), self.fleet)
        await self._bus.flush()


class Slots(Te):
    """A TE with so many slots, of which each task takes one."""

    async def _answer(self, task: Task) -> Accepted:
        accepted = await super()._answer(task)
        self.load["free_slots"] -= 1
        return accepted


@pytest.fixture
async def je(nats: NatsServer, bus: Bus) -> AsyncIterator[str]:
    """A running JE with one model in the catalogue; its id."""
    await publish_model(bus)
    async with process("scheduler", nats, DEEPFLOW_TASK_TIMEOUT_S="1.5") as (_, name):
        await wait_ready(bus, "scheduler", name)
        yield name


@pytest.fixture
async def client(bus: Bus, je: str) -> AsyncIterator[Client]:
    """A gateway."""
    async with Client(bus) as client:
        yield client


@pytest.fixture
async def manager(bus: Bus, je: str) -> AsyncIterator[Manager]:
    """A cluster manager, which has a model asleep."""
    made = Manager(bus)
    talking = asyncio.create_task(made.talk())
    yield made
    talking.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await talking


def stages(client: Client, name: str) -> list[tuple[str, str, int]]:
    """What a request was said to be waiting for, without repetitions."""
    said = [
        (f.state, f.stage, f.percent)
        for f in client.frames
        if isinstance(f, Progress) and f.request == name
    ]
    return [one for one, before in zip(said, [None, *said], strict=False) if one != before]


async def test_who_waits_hears_how_far_the_te_is(
    bus: Bus, client: Client, manager: Manager
) -> None:
    """Queued, loading with its percentage as the manager and then the TE itself tell it, and warm when it is there."""
    await client.submit("r1")
    await eventually(lambda: stages(client, "r1") == [("parked", "queued", 0)])
    await manager.say(target=1, starting=1, progress=10, eta_ms=500)
    await eventually(lambda: stages(client, "r1")[-1] == ("parked", "loading", 10))
    async with Te(bus, "te-a", state="loading", loading=60) as te:
        await eventually(lambda: stages(client, "r1")[-1] == ("parked", "loading", 60))
        te.load |= {"state": "ready", "free_slots": 4}
        await eventually(lambda: stages(client, "r1")[-1] == ("dispatched", "warm", 0))
        assert [task.request.request for task in te.tasks] == ["r1"]
        assert len(stages(client, "r1")) == 4


async def test_a_herd_wakes_one_te_and_spreads_over_those_that_follow(
    bus: Bus, client: Client, manager: Manager
) -> None:
    """While more come each TE gets as many as it can run at once, and who comes later overtakes nobody; when no more
    come, who still waits goes into the queues of those that are up."""
    await manager.say(target=3, starting=3)
    for number in range(6):
        assert (await client.submit(f"r{number}")).te is None
    async with Slots(bus, "te-a", free_slots=2) as a:
        await eventually(lambda: stages(client, "r5")[-1] == ("parked", "warm", 0))
        assert [task.request.request for task in a.tasks] == ["r0", "r1"]
        assert (await client.submit("late")).te is None
        async with Slots(bus, "te-b", free_slots=2) as b:
            await eventually(lambda: len(b.tasks) == 2)
            assert [task.request.request for task in b.tasks] == ["r2", "r3"]
            await asyncio.sleep(0.5)  # more than two beats
            assert (len(a.tasks), len(b.tasks)) == (2, 2)
            await a.ended(a.tasks[0], "stop")  # its slot is free before its beat says so
            await eventually(lambda: [t.request.request for t in a.tasks[2:]] == ["r4"])
            await manager.say(ready=2, starting=0)
            await eventually(lambda: len(a.tasks) + len(b.tasks) == 7)
            assert {t.request.request for t in (*a.tasks, *b.tasks)} >= {"r5", "late"}


async def test_who_comes_for_another_attempt_is_told_of(bus: Bus, client: Client) -> None:
    """A JE that is new, as the one before was killed, tells the cluster manager of what comes to wait here."""
    heard: list[Demand] = []
    await bus.listen(bus.subjects.demand(MODEL), (Demand,), heard.append)
    await bus.flush()
    await client.submit("r1", attempt=3)
    await eventually(lambda: [demand.parked for demand in heard[-1:]] == [1])
    assert heard[-1].arrivals == 0  # whoever had the first attempt has counted it


async def test_nobody_waits_for_what_cannot_come_in_time(
    bus: Bus, client: Client, manager: Manager
) -> None:
    """A start that takes longer than the request may wait is told at once, with the time that it takes."""
    await manager.say(target=1, starting=1, eta_ms=20_000)
    with pytest.raises(NotReady) as refused:
        await client.submit("r1", park_ms=5_000)
    assert refused.value.retry_after_s == 20.0
    assert (await client.submit("r2", park_ms=30_000)).te is None


async def test_a_model_that_is_switched_off_fails_at_once(
    bus: Bus, client: Client, manager: Manager
) -> None:
    """Who waits when its operator allows a model no TE is let go, and who comes then does not begin to wait."""
    await client.submit("r1")
    await manager.say(max_tes=0)
    await eventually(lambda: bool(client.ends("r1")))
    [end] = client.ends("r1")
    assert end.failure is not None
    assert (end.finish, end.failure.code) == ("failed", "model_not_ready")
    with pytest.raises(NotReady) as refused:
        await client.submit("r2")
    assert refused.value.retry_after_s == 60.0
    async with Te(bus, "te-a"):  # one that is up nevertheless
        await eventually(lambda: _accepted(client))


async def test_a_pod_host_that_is_gone_switches_nothing_off(
    nats: NatsServer, bus: Bus, client: Client
) -> None:
    """Where nobody can run a model, and no operator said that there be none, requests wait for somebody who can."""
    await eventually(lambda: _leads(bus))
    await client.submit("r1")
    heard: list[Fleet] = []
    listening = await bus.listen(bus.subjects.fleet(MODEL), (Fleet,), heard.append)
    await eventually(lambda: bool(heard))
    await asyncio.sleep(0.6)  # more than two ticks
    await listening.stop()
    assert client.ends("r1") == []
    assert {fleet.max_tes for fleet in heard} == {-1}


async def _leads(bus: Bus) -> bool:
    [body] = [
        json.loads(reply.body)
        for reply in await bus.gather(
            bus.subjects.status("scheduler", "all"), StatusQuery(), StatusReply, wait_s=0.1
        )
    ]
    leading: bool = body["cluster"]["leading"]
    return leading


async def _accepted(client: Client) -> bool:
    with contextlib.suppress(NotReady):
        return (await client.submit("r3")).te == "te-a"
    return False
