"""The skeleton of a service, as a real process: readiness, beats, status, drain order, exit codes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from typing import Any

import pytest

from shared import errors
from shared.bus import Bus
from shared.config import EXIT_CODE, Settings
from shared.messages import Accepted, Beat, Cancel, StatusQuery, StatusReply
from shared.service import Service
from tests.nats_server import NatsServer


@contextlib.asynccontextmanager
async def probe(nats: NatsServer, **env: str) -> AsyncIterator[tuple[Any, int]]:
    """The probe service as a child process, and its metrics port."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "tests.shared.probe_service"),
        env={**os.environ, "DEEPFLOW_NATS_URL": nats.url, "DEEPFLOW_GRACE_S": "5", **env},
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stderr is not None
        started = json.loads(await process.stderr.readline())
        assert started["event"] == "service_started", started
        yield process, started["metrics_port"]
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def http(port: int, path: str) -> tuple[int, str]:
    """GET from the metrics port."""

    def get() -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    return await asyncio.to_thread(get)


async def first_beat(bus: Bus) -> Beat:
    """The next beat of a probe."""
    beats: asyncio.Queue[Beat] = asyncio.Queue()
    listening = await bus.listen(bus.subjects.beat("probe", "*"), (Beat,), beats.put_nowait)
    async with asyncio.timeout(10):
        beat = await beats.get()
    await listening.stop()
    return beat


async def test_a_service_shows_its_health_and_its_status(bus: Bus, nats: NatsServer) -> None:
    """Probes, scrapes, beats and status queries are answered; a wrong verb is a typed failure."""
    async with probe(nats) as (process, port):
        beat = await first_beat(bus)
        assert await http(port, "/health") == (200, "ok\n")
        assert await http(port, "/ready") == (200, "ok\n")
        status, page = await http(port, "/metrics")
        assert status == 200
        for name in ("dropped", "undecodable", "refused"):
            assert f"deepflow_bus_{name}_total 0.0" in page
        assert (await http(port, "/nothing"))[0] == 404
        subject = bus.subjects.status("probe", beat.id)
        reply = await bus.request(subject, StatusQuery(), StatusReply, timeout_s=5)
        assert (reply.pid, json.loads(reply.body)["answer"]) == (process.pid, 42)
        ledger = await bus.request(subject, StatusQuery(verb="ledger"), StatusReply, timeout_s=5)
        assert json.loads(ledger.body) == {"live": 0}
        everybody = await bus.gather(
            bus.subjects.status("all", "all"), StatusQuery(), StatusReply, wait_s=0.3
        )
        assert [answer.id for answer in everybody] == [beat.id]
        with pytest.raises(errors.InvalidRequest):
            await bus.request(subject, StatusQuery(verb="dance"), StatusReply, timeout_s=5)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_drains_what_is_in_flight(
    bus: Bus, nats: NatsServer, number: signal.Signals
) -> None:
    """Requests being served when the signal comes are answered, and the exit code is 0."""
    async with probe(nats) as (process, _):
        await first_beat(bus)
        async with asyncio.TaskGroup() as group:
            answers = [
                group.create_task(
                    bus.request("probe", Cancel(request=str(i), attempt=0), Accepted, timeout_s=5)
                )
                for i in range(3)
            ]
            await asyncio.sleep(0.1)
            process.send_signal(number)
        assert [answer.result().request for answer in answers] == ["0", "1", "2"]
        assert await process.wait() == 0


async def test_readiness_ends_with_the_bus_and_returns(bus: Bus, nats: NatsServer) -> None:
    """While nats-server is away the service is alive but not ready; afterwards it is ready again."""
    async with probe(nats) as (_, port):
        await first_beat(bus)
        nats.kill()
        async with asyncio.timeout(10):
            while (await http(port, "/ready"))[0] != 503:
                await asyncio.sleep(0.02)
            assert (await http(port, "/health"))[0] == 200
            nats.start()
            while (await http(port, "/ready"))[0] != 200:
                await asyncio.sleep(0.02)


async def test_a_crashed_task_ends_the_service_with_a_failure(bus: Bus, nats: NatsServer) -> None:
    """A bug in a background task ends the process with exit code 1, so that a supervisor restarts it."""
    async with probe(nats) as (process, _):
        await first_beat(bus)
        with contextlib.suppress(errors.DeepFlowError):
            await bus.request("probe", Cancel(request="crash", attempt=0), Accepted, timeout_s=1)
        assert await process.wait() == 1


async def test_a_failing_start_is_a_failure(nats: NatsServer, bus: Bus) -> None:
    """A main that raises ends the process with exit code 1."""
    async with probe(nats, PROBE="fail") as (process, _):
        assert await process.wait() == 1


async def test_a_service_follows_its_parent(nats: NatsServer) -> None:
    """When the named parent is not there (any more), the service stops by itself."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "tests.shared.probe_service"),
        env={**os.environ, "DEEPFLOW_NATS_URL": nats.url, "DEEPFLOW_PARENT_PID": "1"},
    )

    assert await process.wait() in (0, -signal.SIGTERM)


async def run_probe(**env: str) -> Any:
    """The probe service, without waiting for it to start."""
    return await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "tests.shared.probe_service"),
        env={**os.environ, **env},
        stderr=asyncio.subprocess.PIPE,
    )


@pytest.mark.service
async def test_a_wrong_setting_is_one_line() -> None:
    """The line names the service and the variable, and the exit code is one that no supervisor tries again."""
    process = await run_probe(DEEPFLOW_GRACE_S="soon")
    _, said = await process.communicate()

    assert said.decode() == "deepflow probe: DEEPFLOW_GRACE_S='soon' is not a number\n"
    assert process.returncode == EXIT_CODE


@pytest.mark.service
async def test_a_signal_ends_the_wait_for_the_bus() -> None:
    """A service that never got as far as the bus stops like any other."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        nobody.listen()  # somebody who says nothing
        nobody.settimeout(20)
        process = await run_probe(DEEPFLOW_NATS_URL=f"nats://127.0.0.1:{nobody.getsockname()[1]}")
        connection, _ = await asyncio.to_thread(nobody.accept)
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(10):
            await process.communicate()
        connection.close()

    assert process.returncode == 0


def test_the_log_level_changes_for_loggers_in_use() -> None:
    """What `status` is asked to do with the verb `log_level` reaches those who log already."""
    script = (
        "from shared import log\n"
        "log.configure('error'); mine = log.get(); mine.info('first_seen'); mine.error('second_seen')\n"
        "log.configure('info'); mine.info('third_seen')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert [json.loads(line)["event"] for line in done.stderr.splitlines()] == [
        "second_seen",
        "third_seen",
    ]


async def test_a_beat_tells_at_once_what_has_changed(bus: Bus) -> None:
    """Out of turn, each state is told that lasts no longer than the telling of it."""
    heard: list[int] = []
    states = iter(range(1000))

    def state() -> Beat:
        return Beat(kind="probe", id="probe-1", in_flight=next(states))

    subject = bus.subjects.beat("probe", "*")
    await bus.listen(subject, (Beat,), lambda beat: heard.append(beat.in_flight))
    async with asyncio.TaskGroup() as tasks:
        service = Service("probe", Settings.load({}), bus, tasks, "probe-1")
        service.beat(state)
        for _ in range(5):
            await service.beat_now()
        async with asyncio.timeout(10):
            while len(heard) < 5:
                await asyncio.sleep(0.01)
        (*_, loop) = [task for task in asyncio.all_tasks() if task.get_name() == "beat"]
        loop.cancel()
    assert heard[:5] == [0, 1, 2, 3, 4]
