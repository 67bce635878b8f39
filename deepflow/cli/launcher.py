"""The launcher behind `deepflow up`: the embedded bus and the four services as supervised child processes.

All children start at once, because importing torch alone takes seconds. A dead child is started again with back-off,
the bus on the same port and store; five deaths of one child within a minute end everything with the reason. At the
end the children drain in the order gateway, scheduler, worker, cache, bus. This module must not know any service's
code: it meets them by command line, environment and bus.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

from deepflow.cli import ports
from deepflow.cli.child import Child, cause, last_error
from deepflow.cli.home import Home, Instance
from deepflow.cli.nats_server import PRODUCER, NatsServer
from shared import config
from shared.config import Settings
from shared.errors import DeepFlowError
from shared.messages import TeBeat
from shared.restarts import Restarts
from shared.scaling_messages import PodBeat

SERVICES: Final = ("worker", "gateway", "scheduler", "cache")  # slowest start first
DRAIN_ORDER: Final = ("gateway", "scheduler", "worker", "cache", "nats")
_BUS_START_S: Final = 10.0
_LOG_CHECK_S: Final = 10.0
# A service is killed this long after its own grace has run out: a pod host ends late TEs within that.
MARGIN_S: Final = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is to be run."""

    models: tuple[str, ...]
    workers: str  # TEs of each model that both prefill and decode: 2, or as many of 0..8 as are asked for
    host: str
    port: int
    device: str
    is_asleep: bool = False  # no TE is up before somebody asks for it
    pd: str = ""  # the others, like 1p1d
    tp: int = 1  # executors that share each layer of a model
    pp: int = 1  # stages of layers


class Launcher:
    """One run of the platform in a home that the caller has taken. `say` gets lines for the person who watches."""

    def __init__(
        self, plan: Plan, home: Home, env: Mapping[str, str], say: Callable[[str], None]
    ) -> None:
        self._plan = plan
        self._home = home
        self._env = env
        self._settings = Settings.load(env)
        self._say = say
        self._children: dict[str, Child] = {}
        self._stopping = asyncio.Event()
        self._failure = ""
        self._ready = False
        self._instance: Instance | None = None

    async def run(self, announce: Callable[[Instance], None]) -> int:
        """Start, call `announce` once when a request can be served, and run until a signal. The exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal)
        try:
            async with asyncio.TaskGroup() as tasks:
                await self._start(tasks)
                life = tasks.create_task(self._live(announce))
                await self._stopping.wait()
                life.cancel()
                await self._drain()
        except* (OSError, DeepFlowError) as group:
            self._failure = "; ".join(str(error) for error in group.exceptions)
        finally:
            for child in self._children.values():
                child.kill()
        if self._failure:
            self._say(f"DeepFlow stopped: {self._failure}")
            return 1
        return 0

    # ------------------------------------------------------------------------------------------------------ start

    async def _start(self, tasks: asyncio.TaskGroup) -> None:
        server = NatsServer(self._home.nats, self._settings.bus.realm)
        self._add("nats", server.command, self._env)
        await self._children["nats"].start()
        tasks.create_task(self._supervise(self._children["nats"]))
        nats_url = await self._bus_url(server)
        if nats_url is None:
            return
        port = ports.choose(self._plan.host, self._plan.port)
        if self._plan.port not in (0, port):
            self._say(f"Port {self._plan.port} is taken: using {port} instead.")
        shown = "127.0.0.1" if self._plan.host in ("0.0.0.0", "localhost") else self._plan.host
        credentials = server.credentials
        self._instance = Instance(
            pid=os.getpid(),
            url=f"http://{f'[{shown}]' if ':' in shown else shown}:{port}",
            models=list(self._plan.models),
            ready=False,
            nats_url=nats_url,
            realm=self._settings.bus.realm,
            user="operator",
            password=credentials.services["operator"],
            producer=PRODUCER,
            producer_password=credentials.producer,
        )
        for name in SERVICES:
            own = self._service_env(name, nats_url, credentials.services[name], port)
            self._add(name, partial(_module, f"services.{name}"), own)
            await self._children[name].start()
            tasks.create_task(self._supervise(self._children[name]))
        self._describe()

    async def _bus_url(self, server: NatsServer) -> str | None:
        give_up = time.monotonic() + _BUS_START_S
        while (url := server.url()) is None:
            if self._stopping.is_set():
                return None
            if time.monotonic() > give_up:
                self._stop(f"nats-server did not start: {last_error(self._children['nats'].log)}")
                return None
            await asyncio.sleep(0.01)
        return url

    def _add(self, name: str, command: Callable[[], list[str]], env: Mapping[str, str]) -> None:
        child = Child(name, command, env, self._home.log(name))
        child.begin_log()
        self._children[name] = child

    def _service_env(self, name: str, nats_url: str, password: str, port: int) -> dict[str, str]:
        own = {
            "DEEPFLOW_HOME": str(self._home.path),
            "DEEPFLOW_CACHE": str(self._home.cache),
            "DEEPFLOW_PARENT_PID": str(os.getpid()),
            "DEEPFLOW_METRICS_HOST": "127.0.0.1",
            "DEEPFLOW_METRICS_PORT": "0",  # five processes cannot share a port that somebody set
            "DEEPFLOW_NATS_URL": nats_url,
            "DEEPFLOW_NATS_USER": name,
            "DEEPFLOW_NATS_PASSWORD": password,
        }
        if name == "gateway":
            own |= {"DEEPFLOW_HOST": self._plan.host, "DEEPFLOW_PORT": str(port)}
        if name == "worker":
            own |= {
                "DEEPFLOW_MODELS": ",".join(self._plan.models),
                "DEEPFLOW_WORKERS": self._plan.workers,
                "DEEPFLOW_PD": self._plan.pd,
                "DEEPFLOW_DEVICE": self._plan.device,
                "DEEPFLOW_TP": str(self._plan.tp),
                "DEEPFLOW_PP": str(self._plan.pp),
            }
        inherited = {k: v for k, v in self._env.items() if not k.startswith("DEEPFLOW_NATS_")}
        return inherited | own

    def _describe(self) -> None:
        """Bring the instance file up to date."""
        if self._instance is None:
            return
        pids = {name: child.pid for name, child in self._children.items()}
        self._instance = replace(
            self._instance,
            ready=self._ready,
            services={name: pid for name, pid in pids.items() if pid is not None},
        )
        self._home.describe(self._instance)

    # ------------------------------------------------------------------------------------------------------- life

    async def _live(self, announce: Callable[[Instance], None]) -> None:
        assert self._instance is not None or self._stopping.is_set()
        if self._instance is None:
            return
        await self._wait_ready(self._instance)
        self._ready = True
        self._describe()
        announce(self._instance)
        while True:
            await asyncio.sleep(_LOG_CHECK_S)
            for child in self._children.values():
                child.bound_log()

    async def _wait_ready(self, instance: Instance) -> None:
        """Until every model has a TE that is ready, or a pod host that can start one, and the gateway can serve."""
        from shared.bus import Bus  # a quarter of a second that the children need not wait for

        missing = set(instance.models)
        served = asyncio.Event()

        def on_beat(beat: TeBeat | PodBeat) -> None:
            if isinstance(beat, PodBeat):
                missing.difference_update(model.name for model in beat.models)
            elif beat.state == "ready":
                missing.discard(beat.model)
            if not missing:
                served.set()

        bus = await Bus.connect(instance.bus, name="launcher", inbox=instance.user)
        try:
            await bus.listen(bus.subjects.beat("te", "*"), (TeBeat,), on_beat)
            if self._plan.is_asleep:
                await bus.listen(bus.subjects.beat("pod", "*"), (PodBeat,), on_beat)
            await served.wait()
        finally:
            await bus.close()
        while True:
            if await _answers(instance.url, "/ready"):
                return
            await asyncio.sleep(0.02)

    async def _supervise(self, child: Child) -> None:
        """Start `child` again whenever it dies, until that does not help."""
        restarts = Restarts()
        while True:
            code = await child.wait()
            if self._stopping.is_set():
                return
            reason = f"{child.name} {cause(code)}"
            error = last_error(child.log) if code > 0 else ""
            if error:
                reason += f" ({error})"
            delay_s = restarts.died(time.monotonic())
            if code == config.EXIT_CODE and not self._ready:
                self._stop(reason)
                return
            if delay_s is None:
                self._stop(f"{reason}, for the fifth time within a minute; its log is {child.log}")
                return
            self._say(f"{reason}: starting it again")
            try:
                async with asyncio.timeout(delay_s):
                    await self._stopping.wait()
                return
            except TimeoutError:
                await child.start()
            if self._stopping.is_set():  # the drain passed by while it was being started
                await child.stop(self._settings.grace_s)
                return
            self._describe()

    # -------------------------------------------------------------------------------------------------------- end

    def _on_signal(self) -> None:
        if not self._stopping.is_set():
            self._stop("")
            self._say("Stopping: requests in flight are finished first; Ctrl-C again kills.")
            return
        for child in self._children.values():
            child.kill()

    def _stop(self, failure: str) -> None:
        self._failure = self._failure or failure
        self._stopping.set()

    async def _drain(self) -> None:
        grace_s = self._settings.grace_s + MARGIN_S
        for name in DRAIN_ORDER:
            child = self._children.get(name)
            if child is not None and not await child.stop(grace_s):
                self._say(f"{name} did not stop within {grace_s:g} s and was killed")


def _module(name: str) -> list[str]:
    return [sys.executable, "-m", name]


async def _answers(url: str, path: str) -> bool:
    """Whether GET `url``path` is answered with 200."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    try:
        async with asyncio.timeout(2):
            reader, writer = await asyncio.open_connection(host.strip("[]"), int(port))
            try:
                request = f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n\r\n"
                writer.write(request.encode())
                return b" 200 " in await reader.readline()
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return False
