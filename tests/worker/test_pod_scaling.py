"""The pod host under orders, on a real bus: TEs come and go as it is told, by whoever has the highest term."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from shared.errors import Forbidden, ModelNotFound
from shared.messages import Registration, StatusQuery, StatusReply
from shared.scaling_messages import PodBeat, Scaled, ScaleOrder, Step, Target
from tests.nats_server import NatsServer
from tests.worker.peers import MODEL, Peer, Worker, make_model, tokens

pytestmark = pytest.mark.service
OTHER = "other"
SETTINGS = {
    "DEEPFLOW_DTYPE": "w8a8",
    "DEEPFLOW_KV_TOKENS": "8192",
    "DEEPFLOW_WORKERS": "0..4",
    "DEEPFLOW_ZYGOTE": "1",
    "DEEPFLOW_WARM_TES": "1",
}


@pytest.fixture
def start(nats: NatsServer, tmp_path: Path) -> Iterator[Callable[..., Worker]]:
    """Starts a pod host, and ends it after the test."""
    started: list[Worker] = []

    def start(**variables: str) -> Worker:
        worker = Worker(nats.url, tmp_path / "worker", **{**SETTINGS, **variables})
        make_model(tmp_path / "worker" / "cache", OTHER)
        worker.start()
        started.append(worker)
        return worker

    yield start
    for worker in started:
        worker.stop()


class Manager:
    """A cluster manager that says what it is told to say, and hears what the pod host has."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self.pod = ""
        self.beats: list[PodBeat] = []

    @classmethod
    @asynccontextmanager
    async def on(cls, url: str) -> AsyncIterator[tuple[Peer, Manager]]:
        """A manager that has heard of its pod host, and a gateway beside it."""
        async with Peer.on(url) as peer:
            manager = cls(peer)
            subject = peer.bus.subjects.beat("pod", "*")
            await peer.bus.listen(subject, (PodBeat,), peer._hear(manager.beats.append))
            manager.pod = (await peer.until(lambda: manager.beats and manager.beats[-1])).id
            yield peer, manager

    async def order(self, *, term: int = 1, **targets: int) -> Scaled:
        """So many colocated TEs of each model, and no others."""
        order = ScaleOrder(
            by="scheduler-1",
            term=term,
            targets=[
                Target(model=model, role="colocated", num=num) for model, num in targets.items()
            ],
        )
        bus = self._peer.bus
        return await bus.request(bus.subjects.scale(self.pod), order, Scaled, timeout_s=5)

    async def has(self, *, but: str = "", **numbers: int) -> PodBeat:
        """Wait until the pod host has so many ready TEs of each model, `but` not among them, and none in another
        state."""

        def settled() -> PodBeat | None:
            beat = self.beats[-1]
            ready = Counter(te.model for te in beat.tes if te.state == "ready")
            right = ready == Counter(numbers) and len(beat.tes) == ready.total()
            right = right and but not in {te.te for te in beat.tes}
            return beat if right else None

        beat: PodBeat = await self._peer.until(settled)
        return beat

    async def status(self) -> list[dict[str, Any]]:
        """What the pod host tells people of its TEs."""
        bus = self._peer.bus
        subject = bus.subjects.status("pod", self.pod)
        reply = await bus.request(subject, StatusQuery(), StatusReply, timeout_s=5)
        tes: list[dict[str, Any]] = json.loads(reply.body)["tes"]
        return tes

    def most(self, model: str) -> int:
        """The most TEs of a model that it ever had or started, but for those that left."""
        return max(
            sum(te.model == model and te.state != "draining" for te in beat.tes)
            for beat in self.beats
        )


async def test_tes_come_and_go_as_ordered(nats: NatsServer, start: Callable[..., Worker]) -> None:
    """From none to three and back to none: repeated orders start nothing twice, those with work leave last and finish
    it, each start is recorded in its five steps, and an order of an earlier term changes nothing."""
    start()
    async with Manager.on(nats.url) as (peer, manager):
        (model,) = manager.beats[0].models
        assert (model.name, model.min_tes, model.max_tes) == (MODEL, 0, 4)
        assert model.te_bytes > 0
        assert not manager.beats[0].tes
        assert (await manager.order(**{MODEL: 1})).pod == manager.pod
        await manager.has(**{MODEL: 1})
        first = await peer.ready()
        for _ in range(3):
            await manager.order(term=7, **{MODEL: 3})
        beat = await manager.has(**{MODEL: 3})
        names = {te.te for te in beat.tes}
        assert beat.term == 7
        await manager.order(term=7, **{MODEL: 3})
        assert manager.most(MODEL) == 3

        starts = {s.te: s for beat in manager.beats for s in beat.starts}
        assert set(starts) == names
        for one in starts.values():
            assert set(one.steps) == set(Step)
            assert sum(one.steps.values()) <= one.total_s * 1.2 + 0.05
            assert (one.model, one.role) == (MODEL, "colocated")

        with pytest.raises(Forbidden, match="term 6"):
            await manager.order(term=6, **{MODEL: 0})
        with pytest.raises(ModelNotFound, match="nobody"):
            await manager.order(term=7, nobody=1)

        busy = next(
            te.te for te in beat.tes if te.te != first
        )  # not the oldest, which stays among equals
        await peer.send(busy, peer.request("a", max_tokens=4000))
        await peer.until(lambda: peer.beats[busy].running)
        await manager.order(term=7, **{MODEL: 1})
        beat = await manager.has(**{MODEL: 1})
        assert [te.te for te in beat.tes] == [busy]
        assert set(starts) - {busy} == {down.id for down in peer.downs}
        await manager.order(term=7)
        assert len(tokens(await peer.end("a"))) == 4000
        await manager.has()
        await manager.order(term=7, **{MODEL: 20})
        await manager.order(term=8)  # most of these never get a process
        await peer.until(lambda: manager.beats[-1].term == 8)
        await manager.has()
        table = await peer.bus.table("registrations")
        assert {entry.kind for entry in (await table.all(Registration)).values()} == {"pod"}


async def test_a_fleet_is_made_whole_after_deaths_and_kept_within_its_room(
    nats: NatsServer, start: Callable[..., Worker]
) -> None:
    """TEs that are killed are replaced while they are wanted, never by more than were there; what there is no room for
    waits until there is; one group that dies again and again rests, and the other model's goes on."""
    worker = start(DEEPFLOW_MODELS=f"{MODEL},{OTHER}", DEEPFLOW_POD_TES="3", DEEPFLOW_WARM_TES="0")
    async with Manager.on(nats.url) as (peer, manager):
        await manager.order(**{MODEL: 2, OTHER: 4})
        beat = await manager.has(**{MODEL: 2, OTHER: 1})
        assert beat.max_tes == 3
        await manager.order(**{MODEL: 1, OTHER: 2})
        beat = await manager.has(**{MODEL: 1, OTHER: 2})

        dead = next(te.te for te in beat.tes if te.model == OTHER)
        seen = len(manager.beats)
        await manager.order(**{MODEL: 1, OTHER: 2})
        (process,) = [one["pid"] for one in await manager.status() if one["id"] == dead]
        os.kill(process, signal.SIGKILL)
        await manager.has(but=dead, **{MODEL: 1, OTHER: 2})
        assert dead in {down.id for down in peer.downs}
        assert all(len(beat.tes) <= 3 for beat in manager.beats[seen:])

        await manager.order(**{MODEL: 1, OTHER: 1})
        beat = await manager.has(**{MODEL: 1, OTHER: 1})
        while "te_rests" not in worker.log.read_text():
            for one in await manager.status():
                if one["model"] == OTHER and one["pid"]:
                    os.kill(one["pid"], signal.SIGKILL)
            await asyncio.sleep(0.05)
        beat = manager.beats[-1]
        assert [te.state for te in beat.tes if te.model == MODEL] == ["ready"]


async def test_a_bus_that_dies_during_a_scale_up_starts_nothing_twice(
    nats: NatsServer, start: Callable[..., Worker]
) -> None:
    """Prefill and decode TEs are up without an order, and stay whatever is ordered of colocated ones. kill -9 of
    nats-server while these come up: once it is back there are as many as were ordered, and none died. And kill -9 of
    the pod host while more come up leaves no process behind."""
    worker = start(DEEPFLOW_PD="1p1d", DEEPFLOW_WORKERS="0..2")
    async with Manager.on(nats.url) as (peer, manager):
        pair = await manager.has(**{MODEL: 2})
        assert sorted(te.role for te in pair.tes) == ["decode", "prefill"]
        await manager.order(**{MODEL: 4})
        await peer.until(lambda: len(manager.beats[-1].tes) == 6)
        await asyncio.to_thread(nats.kill)
        heard = len(manager.beats)
        await asyncio.sleep(0.5)
        await asyncio.to_thread(nats.start)
        await peer.until(lambda: len(manager.beats) > heard)
        await manager.order(**{MODEL: 4})
        await manager.has(**{MODEL: 6})
        assert manager.most(MODEL) == 6
        assert not peer.downs
        await manager.order()
        beat = await manager.has(**{MODEL: 2})
        assert {te.te for te in beat.tes} == {te.te for te in pair.tes}
        await manager.order(**{MODEL: 8})
        await peer.until(lambda: len(manager.beats[-1].tes) > 2)
        assert worker.process is not None
        processes = psutil.Process(worker.process.pid).children(recursive=True)
        worker.process.kill()
        _, alive = await asyncio.to_thread(psutil.wait_procs, processes, 5)
        assert not alive
