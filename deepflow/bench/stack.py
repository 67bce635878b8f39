"""A whole platform of its own for a bench: in a temporary home, on free ports, gone afterwards.

Started and stopped by the very command a person types. It must not know what is measured on it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
from asyncio import subprocess
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import orjson
import psutil

from deepflow.bench.processes import CpuTimes, cpu_times
from deepflow.cli.home import Home, Instance
from shared.bus import Bus
from shared.errors import Unavailable
from shared.messages import StatusQuery, StatusReply, TeBeat

_FRESH_S: Final = 1.0  # a beat older than this says nothing about now
_POLL_S: Final = 0.02
_START_S: Final = 120.0
_ASK_S: Final = 2.0
_GATHER_S: Final = 0.5


class Stack:
    """A running platform; make it with `start`. `bus` is a connection with the operator's rights."""

    def __init__(self, instance: Instance, bus: Bus, up_s: float) -> None:
        self.url = instance.url
        self.pid = instance.pid  # of the launcher: the root of all its processes
        self.bus = bus
        self.up_s = up_s  # from the command until it had returned
        self._beats: dict[str, tuple[float, TeBeat]] = {}

    @classmethod
    @contextlib.asynccontextmanager
    async def start(
        cls,
        model: str,
        cache_dir: Path,
        settings: Mapping[str, str],
        *,
        num_workers: int = 1,
        max_workers: int | None = None,
        more_models: Sequence[str] = (),
    ) -> AsyncIterator[Stack]:
        """The platform with `num_workers` TEs of each model, ready, for as long as the block runs.

        Where there is a `max_workers`, demand may start that many. `settings` are `DEEPFLOW_*` variables; none of the
        caller's own is taken over. Raises Unavailable with the reason if it does not start.
        """
        folder = Path(tempfile.mkdtemp(prefix="deepflow-bench-"))
        home = Home(folder, cache_dir)
        env = {
            name: value for name, value in os.environ.items() if not name.startswith("DEEPFLOW_")
        }
        env |= {"DEEPFLOW_HOME": str(folder), "DEEPFLOW_CACHE": str(cache_dir), **settings}
        try:
            models = (model, *more_models)
            started = time.perf_counter()
            await _command(
                env,
                *("up", "--detach", "--port", "0"),
                *(word for name in models for word in ("--model", name)),
                *("--workers", _range(num_workers, max_workers)),
            )
            up_s = time.perf_counter() - started
            instance = home.running()
            if instance is None:
                raise Unavailable("the platform stopped right after its start")
            bus = await Bus.connect(instance.bus, name="bench", inbox=instance.user)
            try:
                stack = cls(instance, bus, up_s)
                await bus.listen(bus.subjects.beat("te", "*"), (TeBeat,), stack._beat)
                await stack.wait_ready(num_workers * len(models))
                yield stack
            finally:
                await bus.close()
        finally:
            await asyncio.shield(_remove(home, env))

    def _beat(self, beat: TeBeat) -> None:
        self._beats[beat.id] = (time.monotonic(), beat)

    def tes(self) -> list[str]:
        """The TEs that are alive and ready."""
        now = time.monotonic()
        return [
            te
            for te, (at, beat) in self._beats.items()
            if now - at < _FRESH_S and beat.state == "ready"
        ]

    async def wait_ready(self, num_tes: int, *, avoid: frozenset[str] = frozenset()) -> None:
        """Until so many TEs, those in `avoid` not counted, are ready. Raises Unavailable after two minutes."""
        give_up = time.monotonic() + _START_S
        while len(set(self.tes()) - avoid) < num_tes:
            if time.monotonic() > give_up:
                raise Unavailable(f"{num_tes} TEs were not ready within {_START_S:g} s")
            await asyncio.sleep(_POLL_S)

    async def wait_idle(self) -> None:
        """Until no TE has anything left to do, by its own word after now. Raises Unavailable after two minutes."""
        asked = time.monotonic()
        while True:
            heard = [beat for at, beat in self._beats.values() if at > asked]
            if heard and all(beat.running + beat.waiting == 0 for beat in heard):
                return
            if time.monotonic() > asked + _START_S:
                raise Unavailable(f"the TEs were still busy after {_START_S:g} s")
            await asyncio.sleep(_POLL_S)

    async def ledger(self, te: str) -> dict[str, Any]:
        """The block ledger of a TE, as it tells it over the bus."""
        reply = await self._ask(te, "ledger")
        ledger: dict[str, Any] = orjson.loads(reply.body)
        return ledger

    async def running(self, te: str) -> tuple[int, int]:
        """How many sequences are in the batch of a TE, and the process that it is."""
        reply = await self._ask(te, "status")
        return int(orjson.loads(reply.body)["running"]), reply.pid

    async def placed(self, je: str, request: str) -> str | None:
        """The TE to which a JE gave a request last; None if it was not this JE."""
        reply = await self._ask(je, "placement", kind="scheduler", argument=request)
        chosen = [one["chosen"] for one in orjson.loads(reply.body)["decisions"] if one["chosen"]]
        return chosen[-1] if chosen else None

    async def ask_all(self, kind: str, verb: str = "status") -> list[StatusReply]:
        """What every service of a kind says of itself."""
        subject = self.bus.subjects.status(kind, "all")
        return await self.bus.gather(subject, StatusQuery(verb=verb), StatusReply, wait_s=_GATHER_S)

    async def _ask(
        self, instance: str, verb: str, *, kind: str = "te", argument: str = ""
    ) -> StatusReply:
        subject = self.bus.subjects.status(kind, instance)
        query = StatusQuery(verb=verb, argument=argument)
        return await self.bus.request(subject, query, StatusReply, timeout_s=_ASK_S)

    def cpu_times(self) -> CpuTimes:
        """Of every process of the platform."""
        return cpu_times(self.pid)


def _range(num_workers: int, max_workers: int | None) -> str:
    return str(num_workers) if max_workers is None else f"{num_workers}..{max_workers}"


async def _command(env: Mapping[str, str], *arguments: str) -> None:
    """Run `deepflow` with these arguments. Raises Unavailable with what it said if it fails."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "deepflow.cli.main", *arguments),
        env=dict(env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # Ctrl-C is ours alone: we stop it in order
    )
    try:
        said, _ = await process.communicate()
    except asyncio.CancelledError:
        process.send_signal(signal.SIGINT)
        await process.wait()
        raise
    if process.returncode:
        text = said.decode(errors="replace").strip()
        raise Unavailable(f"`deepflow {arguments[0]}` failed: {text[-2000:]}")


async def _remove(home: Home, env: Mapping[str, str]) -> None:
    """Stop whatever runs in `home`, and remove it."""
    instance = home.running()
    if instance is not None:
        try:
            await _command(env, "down")
        except Unavailable:
            _kill(instance.pid)
    shutil.rmtree(home.path, ignore_errors=True)


def _kill(pid: int) -> None:
    """SIGKILL to a process and all its descendants."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        for one in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                one.kill()
