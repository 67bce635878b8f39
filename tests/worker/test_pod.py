"""The pod host on a real bus, with real TE processes that are killed, stopped, drained and orphaned."""

from __future__ import annotations

import asyncio
import signal
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import psutil
import pytest

from shared.errors import DeepFlowError, Unavailable
from shared.job_messages import Training, TrainingEnded
from shared.length_table import LengthTable
from shared.messages import Accepted, Registration, Replay, Replayed, TeBeat
from tests.nats_server import NatsServer
from tests.scheduler.prompts import records
from tests.worker.peers import MODEL, Peer, Worker, tokens
from tests.worker.test_training import packed

pytestmark = pytest.mark.service
LONG = 12_000


@pytest.fixture
def start(nats: NatsServer, tmp_path: Path) -> Iterator[Callable[..., Worker]]:
    """Starts pod hosts, and ends them after the test."""
    started: list[Worker] = []

    def start(**variables: str) -> Worker:
        worker = Worker(nats.url, tmp_path / f"worker-{len(started)}", **variables)
        worker.start()
        started.append(worker)
        return worker

    yield start
    for worker in started:
        worker.stop()


async def until(condition: Callable[[], Any], timeout_s: float = 15.0) -> Any:
    """Look every few milliseconds until something is true; its value."""
    give_up = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < give_up, "it did not come true"
        await asyncio.sleep(0.01)
    return value


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def fetch(port: int, path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
        text: str = answer.read().decode()
        return text


async def test_a_dead_or_hung_te_is_told_of_and_replaced(
    nats: NatsServer, start: Callable[..., Worker]
) -> None:
    """kill -9 of a TE is told at once, SIGSTOP of one within seconds; another serves, and the totals never fall."""
    port = free_port()
    worker = start(DEEPFLOW_METRICS_PORT=str(port))

    def metrics() -> str:
        return fetch(port, "/metrics")

    async with Peer.on(nats.url) as peer:
        first = await peer.ready()
        await peer.send(first, peer.request("a", max_tokens=20))
        whole = tokens(await peer.end("a"))
        await until(lambda: 'generation_tokens_total{model_name="tiny",te="0"} 20.0' in metrics())
        await peer.send(first, peer.request("b", max_tokens=LONG))
        await peer.until(lambda: peer.deltas("b"))
        (process,) = worker.tes()
        process.send_signal(signal.SIGKILL)
        killed = time.monotonic()
        await peer.until(lambda: peer.downs)
        assert time.monotonic() - killed < 1.0  # not by silence, which takes longer
        assert (peer.downs[0].kind, peer.downs[0].id) == ("te", first)
        assert "SIGKILL" in peer.downs[0].reason
        with pytest.raises(urllib.error.HTTPError, match="503"):
            fetch(port, "/ready")

        second = await peer.ready(but=first)
        (process,) = worker.tes()
        process.send_signal(signal.SIGSTOP)
        await peer.until(lambda: len(peer.downs) == 2, timeout_s=15)
        assert peer.downs[1].id == second
        assert "no beat" in peer.downs[1].reason
        await until(lambda: not process.is_running(), timeout_s=3)

        third = await peer.ready(but=second)
        await peer.send(third, peer.request("c", max_tokens=20))
        assert tokens(await peer.end("c")) == whole
        registered = await (await peer.bus.table("registrations")).all(Registration)
        assert {key for key, entry in registered.items() if entry.kind == "te"} == {third}
        text = metrics()
        assert 'deepflow_te_restarts_total{model_name="tiny",te="0"} 2.0' in text
        total = next(line for line in text.splitlines() if line.startswith("vllm:generation"))
        assert float(total.split()[1]) >= 20
        assert fetch(port, "/ready") == "ok\n"


async def test_a_te_that_stands_still_for_a_moment_lives_on(
    nats: NatsServer, start: Callable[..., Worker]
) -> None:
    """A TE that is silent for longer than gateways wait, but not for long, is not killed, and goes on."""
    worker = start()
    async with Peer.on(nats.url) as peer:
        te = await peer.ready()
        await peer.send(te, peer.request("a", max_tokens=1000))
        await peer.until(lambda: peer.deltas("a"))
        (process,) = worker.tes()
        process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(2.5)
        process.send_signal(signal.SIGCONT)
        assert len(tokens(await peer.end("a"))) == 1000
        assert not peer.downs


async def test_a_signal_drains_what_is_in_flight(
    nats: NatsServer, start: Callable[..., Worker]
) -> None:
    """After SIGTERM the TE takes nothing new, finishes what it has, takes its entries back, and all exit with 0."""
    worker = start()
    async with Peer.on(nats.url) as peer:
        te = await peer.ready()
        await peer.send(te, peer.request("a", max_tokens=600))
        await peer.until(lambda: peer.deltas("a"))
        assert worker.process is not None
        worker.tes()
        worker.process.send_signal(signal.SIGTERM)
        await peer.until(lambda: peer.beats[te].state == "draining")
        with pytest.raises(Unavailable):
            await peer.send(te, peer.request("late"))
        deltas = await peer.end("a")
        assert (len(tokens(deltas)), deltas[-1].finish) == (600, "length")
        await peer.until(lambda: peer.ended)
        assert await asyncio.to_thread(worker.process.wait, 15) == 0
        assert await (await peer.bus.table("registrations")).all(Registration) == {}
        assert [down.id for down in peer.downs] == [te]


async def test_what_the_grace_does_not_suffice_for_fails_in_a_way_worth_a_retry(
    nats: NatsServer, start: Callable[..., Worker]
) -> None:
    """When the grace is over, what is left ends as failed with `unavailable`, retry at once, and the exit is clean."""
    worker = start(DEEPFLOW_GRACE_S="0.3")
    async with Peer.on(nats.url) as peer:
        te = await peer.ready()
        await peer.send(te, peer.request("a", max_tokens=LONG, n=2))
        await peer.until(lambda: peer.deltas("a", choice=1))
        assert worker.process is not None
        worker.tes()
        worker.process.send_signal(signal.SIGTERM)
        for choice in range(2):
            deltas = await peer.end("a", choice=choice)
            tokens(deltas)
            assert deltas[-1].finish == "failed"
            assert deltas[-1].failure is not None
            assert (deltas[-1].failure.code, deltas[-1].failure.retry_after_s) == ("unavailable", 0)
        await peer.until(lambda: peer.ended)
        assert await asyncio.to_thread(worker.process.wait, 15) == 0


async def test_no_te_outlives_its_pod_host(nats: NatsServer, start: Callable[..., Worker]) -> None:
    """kill -9 of the pod host takes its TEs with it, a running one and one that is stopped."""
    worker = start(DEEPFLOW_WORKERS="2")
    async with Peer.on(nats.url) as peer:
        await peer.until(lambda: len([b for b in peer.beats.values() if b.state == "ready"]) == 2)
        tes = worker.tes()
        assert len(tes) == 2
        tes[0].send_signal(signal.SIGSTOP)
        assert worker.process is not None
        worker.process.kill()
        _, alive = await asyncio.to_thread(psutil.wait_procs, tes, 5)
        assert not alive


async def test_a_te_that_dies_again_and_again_ends_the_pod_host(
    nats: NatsServer, start: Callable[..., Worker]
) -> None:
    """After five deaths in a minute the pod host exits with 1 and says why, so that whoever runs it may decide."""
    worker = start()
    process = worker.process
    assert process is not None
    killed: set[int] = set()
    give_up = time.monotonic() + 20
    while process.poll() is None:
        assert time.monotonic() < give_up, "the pod host does not give up"
        try:
            tes = worker.tes()
        except psutil.Error:  # it has just ended
            break
        for te in tes:
            if te.pid not in killed:
                killed.add(te.pid)
                te.kill()
        await asyncio.sleep(0.02)
    assert await asyncio.to_thread(process.wait, 10) == 1
    assert len(killed) == 5
    assert f"a TE of {MODEL} died five times in a minute" in worker.log.read_text()


async def test_an_unknown_model_is_named_with_the_remedy(
    nats: NatsServer, start: Callable[..., Worker]
) -> None:
    """A pod host that is told to serve a model that was never pulled exits with 1 and says how to pull it."""
    worker = start(DEEPFLOW_MODELS="nobody/knows")
    assert worker.process is not None
    assert await asyncio.to_thread(worker.process.wait, 15) == 1
    assert "deepflow pull nobody/knows" in worker.log.read_text()


async def test_streams_survive_a_restart_of_the_bus(
    nats: NatsServer, start: Callable[..., Worker]
) -> None:
    """kill -9 of nats-server mid-stream: nobody is declared dead, and after it is back a replay closes every gap."""
    start()
    async with Peer.on(nats.url) as peer:
        te = await peer.ready()
        await peer.send(te, peer.request("a", max_tokens=2000))
        await peer.until(lambda: len(peer.deltas("a")) > 20)
        await asyncio.to_thread(nats.kill)
        await asyncio.sleep(1.0)
        await asyncio.to_thread(nats.start)
        have: list[int] = []
        subject = peer.bus.subjects.task(te)
        finish = None
        while finish is None:  # as a gateway does: it trusts a replay, not what was on the wire
            ask = Replay(request="a", attempt=0, have=[len(have)])
            try:
                replayed = await peer.bus.request(subject, ask, Replayed, timeout_s=2)
            except DeepFlowError:
                await asyncio.sleep(0.1)
                continue
            for delta in replayed.deltas:
                assert delta.index == len(have)
                have += delta.ids
                finish = delta.finish
            await asyncio.sleep(0.05)
        assert (len(have), finish) == (2000, "length")
        heard = {
            delta.index: delta.ids[0]
            for frame in peer.frames
            for delta in frame.deltas
            if delta.ids
        }
        assert all(have[index] == token for index, token in heard.items())
        assert not peer.downs
        beats: list[TeBeat] = [peer.beats[te]]
        await peer.until(lambda: peer.beats[te].state == "ready" and peer.beats[te] is not beats[0])
        registered = await (await peer.bus.table("registrations")).all(Registration)
        assert te in registered


async def test_a_pod_host_trains_beside_its_tes(
    nats: NatsServer, start: Callable[..., Worker]
) -> None:
    """A training goes to the pod host by its name and ends in a table, while its TE serves on."""
    start()
    ends: list[TrainingEnded] = []
    async with Peer.on(nats.url) as peer:
        te = await peer.ready()
        bus, pod = peer.bus, peer.beats[te].pod
        await bus.listen(bus.subjects.events("je-1"), (TrainingEnded,), ends.append)
        data = packed(records(Random(1), 250))
        order = Training(task="j.1", job="j", je="je-1", kind="predictor", model=MODEL, data=data)
        accepted = await bus.request(bus.subjects.task(pod), order, Accepted, timeout_s=5)
        assert (accepted.request, accepted.by) == ("j.1", pod)
        await peer.send(te, peer.request("a", max_tokens=20))
        assert len(tokens(await peer.end("a"))) == 20
        await until(lambda: ends, timeout_s=30)
        assert ends[0].failure is None
        assert LengthTable.from_bytes(ends[0].result).num_buckets > 1
