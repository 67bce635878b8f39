"""What the four services (and each TE) have in common: start, readiness, beats, status, signals, and the drain order.

`run` is the one place with signals and the root TaskGroup. A service's `main` sets up on the `Service` it is handed
and returns; the service then lives until a signal, a failed task, or a bus that closed for good. Drain order:
readiness off and beats say draining; the service's own drain steps, in the order they were registered (intake first,
then work in flight); the remaining tasks are cancelled; the bus sends what is buffered and closes. This module must
not know what any service does.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, Generic, TypeVar

import orjson
import uvloop

from shared import errors, log
from shared.bus import Bus
from shared.config import EXIT_CODE, ConfigError, Settings
from shared.messages import Beat, StatusQuery, StatusReply, TeBeat
from shared.metrics import Metrics
from shared.scaling_messages import PodBeat

S = TypeVar("S", bound=Settings)
BEAT_S: Final = 0.2  # while there is work: others place requests by it
REST_BEAT_S: Final = (
    0.5  # without: three beats may still be lost before 1.5 s of silence mean death
)
_PR_SET_PDEATHSIG: Final = 1


class Service(Generic[S]):
    """One running service: what `main` gets to build on."""

    def __init__(
        self, kind: str, settings: S, bus: Bus, tasks: asyncio.TaskGroup, id_: str
    ) -> None:
        self.kind = kind
        self.id = id_  # contains the boot id: a restarted service is another instance
        self.settings = settings
        self.bus = bus
        self.tasks = tasks
        self.metrics = Metrics()
        self.log = log.get(service=kind, id=id_)
        self.stopping = asyncio.Event()
        self.failure: str | None = None
        self._started = time.monotonic()
        self._ready = False
        self._make_beat: Callable[[], Beat | TeBeat | PodBeat] | None = None
        self._make_status: Callable[[], dict[str, Any]] = dict
        self._ledger: Callable[[], dict[str, Any]] | None = None
        self._verbs: dict[str, Callable[[str], dict[str, Any]]] = {}
        self._drain_steps: list[Callable[[], Awaitable[None]]] = []
        self.metrics.ready = lambda: self.is_ready
        for name, text, read in (
            ("dropped", "Messages lost to a slow handler.", lambda: bus.num_dropped),
            ("undecodable", "Messages that were not understood.", lambda: bus.num_undecodable),
            ("refused", "Subjects that the bus does not let us use.", lambda: bus.num_refused),
        ):
            self.metrics.count(f"deepflow_bus_{name}", text, read)

    @property
    def is_ready(self) -> bool:
        """Whether new work is welcome: `ready()` was called, the bus is there, and nobody is stopping us."""
        return self._ready and self.bus.connected and not self.stopping.is_set()

    def ready(self, ok: bool = True) -> None:
        """Say whether the service can do its work."""
        self._ready = ok

    def beat(self, make: Callable[[], Beat | TeBeat | PodBeat] | None = None) -> None:
        """Beat from now on with what `make` returns: five times a second, twice while there is no work."""
        self._make_beat = make or (
            lambda: Beat(kind=self.kind, id=self.id, draining=self.stopping.is_set())
        )
        self.tasks.create_task(self._beat_loop(), name="beat")

    async def beat_now(self) -> Beat | TeBeat | PodBeat:
        """Beat out of turn: something has changed that others act on. Returns the beat; only after `beat`."""
        assert self._make_beat is not None
        beat = self._make_beat()
        kind = "te" if isinstance(beat, TeBeat) else beat.kind
        # A full buffer means the bus is away: the next beat will do.
        with contextlib.suppress(errors.DeepFlowError):
            await self.bus.publish(self.bus.subjects.beat(kind, self.id), beat)
        return beat

    def status(
        self,
        make: Callable[[], dict[str, Any]],
        ledger: Callable[[], dict[str, Any]] | None = None,
    ) -> None:
        """What the service tells about itself (verb `status`) and about the memory it holds (`ledger`)."""
        self._make_status = make
        self._ledger = ledger

    def verb(self, name: str, answer: Callable[[str], dict[str, Any]]) -> None:
        """Another verb that a status query may ask with, beside those of every service; `answer` gets its argument."""
        self._verbs[name] = answer

    def on_drain(self, step: Callable[[], Awaitable[None]]) -> None:
        """Await `step` while draining, after the steps registered before it."""
        self._drain_steps.append(step)

    def stop(self, failure: str | None = None) -> None:
        """Drain and end; with a `failure` the exit code is 1."""
        self.failure = self.failure or failure
        self.stopping.set()

    # ------------------------------------------------------------------------------------------- run's own business

    async def _beat_loop(self) -> None:
        while True:
            beat = await self.beat_now()
            await asyncio.sleep(BEAT_S if _has_work(beat) else REST_BEAT_S)

    async def _answer(self, query: StatusQuery) -> StatusReply:
        if query.verb == "log_level":
            if query.argument not in ("debug", "info", "warning", "error"):
                raise errors.InvalidRequest("no such log level", param="argument")
            log.configure(query.argument)
            body: dict[str, Any] = {"log_level": query.argument}
        elif query.verb == "ledger":
            body = self._ledger() if self._ledger is not None else {}
        elif query.verb == "status":
            body = {
                "ready": self.is_ready,
                "draining": self.stopping.is_set(),
                "uptime_s": round(time.monotonic() - self._started, 1),
                "bus_dropped": self.bus.num_dropped,
                "bus_refused": self.bus.num_refused,
                **self._make_status(),
            }
        elif query.verb in self._verbs:
            body = self._verbs[query.verb](query.argument)
        else:
            raise errors.InvalidRequest("no such verb", param="verb")
        return StatusReply(
            kind=self.kind, id=self.id, pid=os.getpid(), body=orjson.dumps(body).decode()
        )

    async def _open(self) -> None:
        subjects = self.bus.subjects
        for kind, instance in ((self.kind, self.id), (self.kind, "all"), ("all", "all")):
            subject = subjects.status(kind, instance)
            await self.bus.serve(subject, (StatusQuery,), self._answer)
        self.tasks.create_task(self._watch_bus(), name="watch-bus")

    async def _watch_bus(self) -> None:
        await self.bus.closed.wait()
        if not self.stopping.is_set():
            self.stop("the bus closed for good")

    async def _drain(self) -> None:
        self.log.info("drain_started")
        for step in self._drain_steps:
            try:
                await step()
            except errors.DeepFlowError as error:
                self.log.warning("drain_step_failed", error=error.message)
            except Exception:
                self.log.exception("drain_step_failed")


def _has_work(beat: Beat | TeBeat | PodBeat) -> bool:
    if isinstance(beat, TeBeat):
        return bool(beat.running or beat.waiting or beat.state != "ready")
    return beat.in_flight > 0


def instance_id(name: str) -> str:
    """A new instance name: `name` and a fresh boot id of eight hex characters."""
    return f"{name}-{secrets.token_hex(4)}"


def main(
    kind: str,
    load: Callable[[Mapping[str, str]], S],
    open_service: Callable[[Service[S]], Awaitable[None]],
    *,
    metrics: bool = True,
) -> int:
    """All that a service's `__main__` does: read the settings with `load`, and run with `open_service` as its main.

    Without `metrics` it has no port for them, and no thread. The exit code: 0 after a drain, 1 with a reason in the
    log, 2 with a line that names the variable that is wrong.
    """
    try:
        settings = load(os.environ)
    except ConfigError as error:
        sys.stderr.write(f"deepflow {kind}: {error}\n")
        return EXIT_CODE
    return run(kind, settings, open_service, metrics=metrics)


def run(
    kind: str,
    settings: S,
    main: Callable[[Service[S]], Awaitable[None]],
    *,
    metrics: bool = True,
) -> int:
    """Run a service until it is told to stop. Returns the process's exit code."""
    log.configure(settings.log_level)
    _die_with_parent(settings.parent_pid)
    # Long-lived objects of the imports are not worth a visit at each collection.
    gc.freeze()
    return uvloop.run(_run(kind, settings, main, metrics=metrics))


async def _run(
    kind: str,
    settings: S,
    main: Callable[[Service[S]], Awaitable[None]],
    *,
    metrics: bool,
) -> int:
    id_ = instance_id(settings.instance or kind)
    logger = log.get(service=kind, id=id_)
    starting = asyncio.current_task()
    assert starting is not None
    _on_signal(starting.cancel)  # also as PID 1 of a container, which no signal ends by itself
    try:
        bus = await Bus.connect(settings.bus, name=id_, inbox=kind)
    except errors.DeepFlowError as error:
        logger.error("start_failed", error=error.message)
        return 1
    except asyncio.CancelledError:
        logger.info("service_ended")
        return 0
    service: Service[S] | None = None
    endpoint = None
    failed = False
    try:
        async with asyncio.TaskGroup() as tasks:
            service = Service(kind, settings, bus, tasks, id_)
            _on_signal(service.stop)
            if metrics:
                endpoint = service.metrics.serve(settings.metrics_host, settings.metrics_port)
            port = endpoint.port if endpoint is not None else None
            logger.info("service_started", metrics_port=port, pid=os.getpid())
            await service._open()
            await main(service)
            await service.stopping.wait()
            await service._drain()
            # The group waits for its tasks; ours end only when they are told to.
            raise _Stopped
    except* _Stopped:
        pass
    except* Exception as group:
        failed = True
        if all(isinstance(error, errors.DeepFlowError) for error in group.exceptions):
            logger.error("service_failed", error="; ".join(map(str, group.exceptions)))
        else:
            logger.exception("service_failed")
    finally:
        await bus.close()
        if endpoint is not None:
            await asyncio.to_thread(endpoint.close)
    if service is not None and service.failure:
        failed = True
        logger.error("service_stopped_itself", failure=service.failure)
    logger.info("service_ended")
    return 1 if failed else 0


def _on_signal(callback: Callable[[], object]) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, callback)


class _Stopped(Exception):
    """Ends the TaskGroup from inside: a TaskGroup has no cancel-all of its own."""


def _die_with_parent(parent_pid: int) -> None:
    """Ask the kernel for SIGTERM when the parent dies, so that even its kill -9 leaves nobody behind."""
    if not parent_pid:
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent_pid:  # it died before we asked
        os.kill(os.getpid(), signal.SIGTERM)


def host_name() -> str:
    """This host, as registrations name it."""
    return socket.gethostname()
