"""Several hosts on one machine: one bus, gateway and scheduler, and per host a cache service with an arena of its own
and a worker.

To the platform a host is who shares an arena; so two arenas on one machine are two hosts, whose caches exchange blocks
over DistFlow. The processes are children of this one, with the bus users and permissions that `deepflow up` gives them.
This module must not know what is measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import signal
import sys
import tempfile
import time
from asyncio import subprocess
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, Final

import aiohttp
import orjson

from deepflow.cli import ports
from deepflow.cli.nats_server import NatsServer
from shared.bus import Bus
from shared.config import BusSettings
from shared.errors import Unavailable
from shared.messages import StatusQuery, StatusReply, TeBeat

_REALM: Final = "deepflow"
_START_S: Final = 120.0
_STOP_S: Final = 15.0
_POLL_S: Final = 0.05


class Host:
    """One host's two services. `tes` are filled in from the beats of those who work with its arena."""

    def __init__(self, number: int, arena: Path) -> None:
        self.number = number
        self.arena = arena
        self.cache: subprocess.Process | None = None
        self.worker: subprocess.Process | None = None

    @property
    def name(self) -> str:
        """The arena's identity; "" until its cache service has written it."""
        with contextlib.suppress(OSError):
            return (self.arena / "host").read_text().strip()
        return ""


class Cluster:
    """The running platform; make it with `start`. `beats` holds the last beat of each TE."""

    def __init__(self, folder: Path, env: Mapping[str, str], nats: NatsServer) -> None:
        self.folder = folder
        self.url = ""
        self.hosts: list[Host] = []
        self.beats: dict[str, tuple[float, TeBeat]] = {}
        self._env = env
        self._nats = nats
        self._nats_url = ""
        self._processes: list[subprocess.Process] = []
        self._bus: Bus | None = None

    @classmethod
    @contextlib.asynccontextmanager
    async def start(
        cls,
        model: str,
        cache_dir: Path,
        settings: Mapping[str, str],
        *,
        num_hosts: int = 1,
        num_workers: int = 1,
        pd: str = "",
    ) -> AsyncIterator[Cluster]:
        """`num_hosts` hosts with `num_workers` TEs of one model each (or the TEs that `pd` names, such as 1p1d), ready.

        `settings` are `DEEPFLOW_*` variables; none of the caller's own is taken over. Raises Unavailable with the
        reason if it does not start.
        """
        folder = Path(tempfile.mkdtemp(prefix="deepflow-bench-"))
        arenas = [_arena(folder) for _ in range(num_hosts)]
        env = {
            name: value for name, value in os.environ.items() if not name.startswith("DEEPFLOW_")
        }
        env |= {
            "DEEPFLOW_HOME": str(folder),
            "DEEPFLOW_CACHE": str(cache_dir),
            "DEEPFLOW_MODELS": model,
            "DEEPFLOW_WORKERS": str(0 if pd else num_workers),
            "DEEPFLOW_PD": pd,
            "DEEPFLOW_PARENT_PID": str(os.getpid()),
            "DEEPFLOW_GRACE_S": "3",
            **settings,
        }
        (folder / "nats").mkdir()
        cluster = cls(folder, env, NatsServer(folder / "nats", _REALM))
        try:
            await cluster._open(arenas)
            num_tes = num_workers if not pd else sum(int(c) for c in pd if c.isdigit())
            async with cluster.listening():
                await cluster.wait_tes(num_tes * num_hosts)
                await cluster._wait_gateway()
                yield cluster
        finally:
            await asyncio.shield(cluster._close(arenas))

    async def _open(self, arenas: list[Path]) -> None:
        await self._spawn("nats", self._nats.command(), self._env)
        give_up = time.monotonic() + _START_S
        while (url := self._nats.url()) is None:
            _check(give_up, "nats-server")
            await asyncio.sleep(_POLL_S)
        self._nats_url = url
        await self._service("scheduler", {})
        self._gateway = await self._start_gateway()
        for number, arena in enumerate(arenas):
            host = Host(number, arena)
            self.hosts.append(host)
            own = {"DEEPFLOW_ARENA_DIR": str(arena)}
            host.cache = await self._service("cache", own)
            host.worker = await self._service("worker", own)

    async def _start_gateway(self) -> subprocess.Process:
        port = ports.choose("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{port}"
        own = {"DEEPFLOW_HOST": "127.0.0.1", "DEEPFLOW_PORT": str(port)}
        return await self._service("gateway", own)

    async def _service(self, name: str, own: Mapping[str, str]) -> subprocess.Process:
        env = {
            **self._env,
            "DEEPFLOW_NATS_URL": self._nats_url,
            "DEEPFLOW_NATS_USER": name,
            "DEEPFLOW_NATS_PASSWORD": self._nats.credentials.services[name],
            **own,
        }
        return await self._spawn(name, [sys.executable, "-m", f"services.{name}"], env)

    async def _spawn(
        self, name: str, command: list[str], env: Mapping[str, str]
    ) -> subprocess.Process:
        log = self.folder / f"{name}-{len(self._processes)}.log"
        with log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                *command,
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._processes.append(process)
        return process

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[Bus]:
        """Hears the TEs' beats for as long as the block runs."""
        settings = BusSettings(
            url=self._nats_url,
            user="operator",
            password=self._nats.credentials.services["operator"],
            realm=_REALM,
            grace_s=2.0,
        )
        bus = self._bus = await Bus.connect(settings, name="bench", inbox="operator")
        try:
            await bus.listen(bus.subjects.beat("te", "*"), (TeBeat,), self._beat)
            yield bus
        finally:
            await bus.close()

    async def ask(self, te: str, verb: str) -> tuple[int, dict[str, Any]]:
        """A TE's process and what it answers to `status` or `ledger`."""
        assert self._bus is not None
        reply = await self._bus.request(
            self._bus.subjects.status("te", te), StatusQuery(verb=verb), StatusReply, timeout_s=2.0
        )
        return reply.pid, orjson.loads(reply.body)

    def _beat(self, beat: TeBeat) -> None:
        self.beats[beat.id] = (time.monotonic(), beat)

    def tes(self) -> list[TeBeat]:
        """The last beats of the TEs that are alive and ready."""
        now = time.monotonic()
        return [
            beat for at, beat in self.beats.values() if now - at < 1.0 and beat.state == "ready"
        ]

    async def wait_tes(self, num: int, *, without: str = "") -> None:
        """Until `num` TEs are ready, `without` not counted. Raises Unavailable."""
        give_up = time.monotonic() + _START_S
        while sum(beat.id != without for beat in self.tes()) < num:
            _check(give_up, f"{num} TEs")
            await asyncio.sleep(_POLL_S)

    async def _wait_gateway(self) -> None:
        """Until it serves. Raises Unavailable."""
        give_up = time.monotonic() + _START_S
        async with aiohttp.ClientSession() as session:
            while True:
                with contextlib.suppress(aiohttp.ClientError):
                    async with session.get(f"{self.url}/ready") as answer:
                        if answer.status == 200:
                            return
                _check(give_up, "the gateway")
                if self._gateway.returncode is not None:  # somebody was faster to take the port
                    self._gateway = await self._start_gateway()
                await asyncio.sleep(_POLL_S)

    async def kill_server(self) -> None:
        """kill -9 of the TE that holds most pages; where there are several hosts, with its pod host, so that nobody
        takes its place there. Raises Unavailable if nobody holds any, or it does not die."""
        give_up = time.monotonic() + _START_S
        while not (served := max(self.tes(), key=lambda beat: beat.blocks_cached)).blocks_cached:
            _check(give_up, "a TE that holds pages")
            await asyncio.sleep(_POLL_S)
        if len(self.hosts) > 1:
            host = next(host for host in self.hosts if host.name == served.host)
            assert host.worker is not None
            os.killpg(host.worker.pid, signal.SIGKILL)  # the TE dies with it
            await host.worker.wait()
        else:
            pid, _ = await self.ask(served.id, "status")
            os.kill(pid, signal.SIGKILL)
        await self.wait_lost(served.id)

    async def wait_copied(self, num_pages: int) -> None:
        """Until the TEs have copied so many pages to their arenas. Raises Unavailable."""
        give_up = time.monotonic() + _START_S
        while sum(beat.counters.get("copied_pages", 0) for beat in self.tes()) < num_pages:
            _check(give_up, f"{num_pages} pages in the arena")
            await asyncio.sleep(_POLL_S)

    async def ledgers(self) -> list[dict[str, Any]]:
        """Every TE's."""
        return [(await self.ask(beat.id, "ledger"))[1] for beat in self.tes()]

    async def wait_lost(self, te: str) -> None:
        """Until a TE has fallen silent. Raises Unavailable."""
        give_up = time.monotonic() + _START_S
        while any(beat.id == te for beat in self.tes()):
            _check(give_up, f"the end of {te}")
            await asyncio.sleep(_POLL_S)

    def logs(self) -> str:
        """The tails of all logs."""
        return "\n".join(
            f"--- {path.name}\n{path.read_text(errors='replace')[-3000:]}"
            for path in sorted(self.folder.glob("*.log"))
        )

    async def _close(self, arenas: list[Path]) -> None:
        for process in reversed(self._processes):
            if process.returncode is None:
                process.terminate()
        for process in self._processes:
            try:
                async with asyncio.timeout(_STOP_S):
                    await process.wait()
            except TimeoutError:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
        for path in (self.folder, *arenas):
            shutil.rmtree(path, ignore_errors=True)


def _arena(folder: Path) -> Path:
    """A new arena's folder: on a tmpfs where there is one."""
    base = Path("/dev/shm")
    return (base if base.is_dir() else folder) / f"deepflow-bench-{secrets.token_hex(4)}"


def _check(give_up: float, what: str) -> None:
    if time.monotonic() > give_up:
        raise Unavailable(f"{what} did not come up within {_START_S:g} s")
