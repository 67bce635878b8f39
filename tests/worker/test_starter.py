"""How TEs come to be: from a zygote, kept warm, or by a new interpreter; on a real bus, with real processes."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from services.worker import zygote
from services.worker.child import Child
from services.worker.settings import TeSettings, WorkerSettings
from services.worker.starter import Starter
from services.worker.te import shared_devices
from services.worker.tie import Assignment, Named, Ready, StepTook, TeEvent
from shared.bus import Bus
from shared.scaling_messages import Step
from shared.service import Service
from tests.nats_server import NatsServer
from tests.worker.peers import MODEL, Worker, make_model


class _Done(Exception):
    pass


@asynccontextmanager
async def starter(
    bus: Bus, nats: NatsServer, folder: Path, **variables: str
) -> AsyncIterator[Starter]:
    """An open starter of TEs of the tiny model; nothing of it is left behind."""
    env = {
        **os.environ,
        "DEEPFLOW_NATS_URL": nats.url,
        "DEEPFLOW_HOME": str(folder),
        "DEEPFLOW_CACHE": str(folder / "cache"),
        "DEEPFLOW_MODELS": MODEL,
        "DEEPFLOW_KV_TOKENS": "1024",
        "DEEPFLOW_WARM_TES": "0",
        **variables,
    }
    make_model(folder / "cache")
    with pytest.RaisesGroup(_Done):
        async with asyncio.TaskGroup() as tasks:
            service = Service("pod", WorkerSettings.load(env), bus, tasks, "pod-1")
            one = Starter(service, env)
            await one.open()
            try:
                yield one
            finally:
                service.stop()
                await one.close()
                assert not zygotes()
                for te in family("services.worker.te"):
                    te.kill()
                await until(lambda: not (family("services.worker") or dead()))
            raise _Done


def title(process: psutil.Process) -> str:
    """A command line; empty once it has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def family(name: str) -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if name in title(child)]


def dead() -> list[psutil.Process]:
    """Children that nobody has waited for."""
    return [child for child in psutil.Process().children() if not title(child)]


def zygotes() -> list[psutil.Process]:
    return family("services.worker.zygote")


async def until(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)


async def ready(child: Child) -> list[TeEvent]:
    """What a TE says until it is ready."""
    events: list[TeEvent] = []
    async with asyncio.timeout(30):
        async for event in child.events():
            events.append(event)
            if isinstance(event, Ready):
                return events
    raise AssertionError(f"it ended: {await child.wait()}, after {events}")


def pre_load_s(events: list[TeEvent]) -> float:
    (took,) = [e.seconds for e in events if isinstance(e, StepTook) and e.step is Step.TE_PRE_LOAD]
    return took


def sockets(pid: int) -> set[str]:
    """The sockets that a process has open, by their kernel names."""
    links = [os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir()]
    return {link for link in links if link.startswith("socket:")}


def status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def ignored(pid: int) -> int:
    """The signals that a process ignores, but for those that threads use among themselves."""
    return int(status(pid)["SigIgn"], 16) & 0x7FFFFFFF


async def test_a_zygote_may_be_forked_and_its_child_has_nothing_of_it(
    bus: Bus, nats: NatsServer, tmp_path: Path
) -> None:
    """One thread, no connection, no torch; the TE is our own child, in a session of its own, and dies with us."""
    async with starter(bus, nats, tmp_path) as one:
        child = await one.start(Assignment(model=MODEL))
        events = await ready(child)

        (mother,) = zygotes()
        assert mother.num_threads() == 1
        assert mother.net_connections() == []
        assert "libtorch" not in Path(f"/proc/{mother.pid}/maps").read_text()
        assert "libtorch" not in Path(f"/proc/{child.pid}/maps").read_text()

        te = psutil.Process(child.pid)
        assert child.process == "fork"
        assert te.ppid() == os.getpid()
        assert os.getsid(child.pid) == child.pid
        assert title(te).split()[1:3] == ["-m", "services.worker.te"]
        assert not sockets(child.pid) & sockets(mother.pid)
        # Signals as a new interpreter has them: none blocked, and those ignored that Python ignores.
        assert int(status(child.pid)["SigBlk"], 16) == 0
        assert ignored(child.pid) == ignored(mother.pid)
        assert isinstance(events[0], Named)
        assert {e.step for e in events if isinstance(e, StepTook)} == {
            Step.TE_PRE_LOAD,
            Step.TE_LOAD,
            Step.TE_POST_LOAD,
        }
        child.terminate()
        assert await child.wait() == "exited with 0"


@pytest.mark.parametrize(
    ("cards", "tp", "shown"), [("3", 1, "3"), ("1,0", 2, "0,1"), ("0,1", 1, None), ("", 1, None)]
)
def test_an_accelerator_is_opened_ahead_where_there_is_no_choice(
    cards: str, tp: int, shown: str | None
) -> None:
    """A warm TE opens the device that every TE of the host sees; where each has its own, it waits to be told."""
    env = {"CUDA_VISIBLE_DEVICES": cards, "DEEPFLOW_DEVICE": "cuda", "DEEPFLOW_TP": str(tp)}
    settings = TeSettings.load({**env, "DEEPFLOW_TE_POD": "pod-1"})
    expected = None if shown is None else {"CUDA_VISIBLE_DEVICES": shown}
    assert shared_devices(settings, env) == expected


def test_a_process_with_threads_is_not_forked() -> None:
    """A lock that another thread holds would stay locked in the child: the zygote refuses, and says why."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    over = threading.Event()
    other = threading.Thread(target=over.wait)
    other.start()
    with ours, theirs:
        request = {"module": "services.worker.te", "arguments": [], "env": {}, "fds": [0]}
        socket.send_fds(ours, [json.dumps(request).encode()], [theirs.fileno()])
        ours.shutdown(socket.SHUT_WR)
        zygote.serve(theirs)
        assert "threads" in json.loads(ours.recv(4096))["error"]
    over.set()
    other.join()


async def test_a_warm_te_becomes_what_it_is_told_and_another_takes_its_place(
    bus: Bus, nats: NatsServer, tmp_path: Path
) -> None:
    """It is on the bus before anybody wants it, so that nothing is left of the step before the model is loaded."""
    async with starter(bus, nats, tmp_path, DEEPFLOW_WARM_TES="1") as one:
        await until(lambda: one.num_warm == 1)
        child = await one.start(Assignment(model=MODEL, role="decode"))
        assert (child.process, one.num_warm) == ("warm", 0)
        events = await ready(child)
        assert pre_load_s(events) == 0
        assert events[0] == Named(await child.name())
        await until(lambda: one.num_warm == 1)
        child.terminate(migrate_after_s=0.0)
        assert await child.wait() == "exited with 0"


async def test_tes_outlive_their_zygote_and_another_is_made(
    bus: Bus, nats: NatsServer, tmp_path: Path
) -> None:
    """While there is none, a TE is started by a new interpreter."""
    async with starter(bus, nats, tmp_path) as one:
        first = await one.start(Assignment(model=MODEL))
        await ready(first)
        (mother,) = zygotes()
        mother.kill()
        await until(lambda: not psutil.pid_exists(mother.pid))
        second = await one.start(Assignment(model=MODEL))
        await ready(second)
        assert (first.running, second.process) == (True, "exec")
        await until(lambda: zygotes())
        third = await one.start(Assignment(model=MODEL))
        await ready(third)
        assert third.process == "fork"
        assert first.running


async def test_without_a_zygote_a_te_is_a_new_interpreter(
    bus: Bus, nats: NatsServer, tmp_path: Path
) -> None:
    """The switch leaves no process but the TE, which ends for the reason that it has, in words."""
    async with starter(bus, nats, tmp_path, DEEPFLOW_ZYGOTE="0", DEEPFLOW_WARM_TES="1") as one:
        child, unknown = await asyncio.gather(
            one.start(Assignment(model=MODEL)), one.start(Assignment(model="nobody"))
        )
        assert [child.process, unknown.process] == ["exec", "exec"]
        assert await unknown.wait() == "exited with 1"
        assert pre_load_s(await ready(child)) > 0
        assert (zygotes(), one.num_warm) == ([], 0)
        child.kill()
        assert await child.wait() == "killed by SIGKILL"
        assert [event async for event in child.events()][:1] == [Named(await child.name())]


async def test_whoever_loses_its_parent_is_buried_here(
    bus: Bus, nats: NatsServer, tmp_path: Path
) -> None:
    """A pod host takes in orphans for the sake of the zygote's; those of others do not stay dead for ever."""
    async with starter(bus, nats, tmp_path):
        orphan = os.fork()
        if not orphan:
            if not os.fork():
                os._exit(0)
            os._exit(0)
        os.waitpid(orphan, 0)
        await until(lambda: not dead(), 5)


async def test_the_ranks_of_a_model_are_forked_with_torch_imported(
    bus: Bus, nats: NatsServer, tmp_path: Path
) -> None:
    """A TE of two ranks has both from a zygote, as children of its own; the second dies with the first."""
    variables = {"DEEPFLOW_TP": "2", "DEEPFLOW_DTYPE": "fp32"}
    async with starter(bus, nats, tmp_path, **variables) as one:
        child = await one.start(Assignment(model=MODEL))
        await ready(child)
        (mother,) = zygotes()
        assert mother.num_threads() == 1
        assert "libtorch" in Path(f"/proc/{mother.pid}/maps").read_text()
        ranks = psutil.Process(child.pid).children()
        assert sorted(title(rank).split()[2] for rank in ranks) == [
            "services.worker.flowserve.spmd.executor",
            "services.worker.zygote",
        ]
        child.kill()
        await until(lambda: not any(title(rank) for rank in ranks))


async def test_nobody_outlives_a_pod_host_that_is_killed(nats: NatsServer, tmp_path: Path) -> None:
    """kill -9 of the pod host: its zygote, the warm TE and the TE that serves are gone at once."""
    worker = Worker(
        nats.url, tmp_path, DEEPFLOW_ZYGOTE="1", DEEPFLOW_WARM_TES="1", DEEPFLOW_DTYPE="auto"
    )
    worker.start()
    assert worker.process is not None
    host = psutil.Process(worker.process.pid)
    names = ["services.worker.te", "services.worker.te", "services.worker.zygote"]
    try:
        await until(lambda: sorted(title(c).split()[2] for c in host.children()) == names)
        family = host.children(recursive=True)
        worker.process.kill()
        await until(lambda: not any(title(member) for member in family), 5)
    finally:
        worker.stop()
