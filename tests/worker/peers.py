"""What stands around a worker in its tests: a pod host process, and one peer that plays gateway and job executor.

Nothing here is a double: the process is `python -m services.worker`, the peer speaks real messages on a real bus.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil

from shared import subjects
from shared.bus import Bus
from shared.config import BusSettings
from shared.messages import (
    Accepted,
    Beat,
    Cancel,
    Delta,
    Down,
    Handover,
    Prefilled,
    Request,
    Sampling,
    StatusQuery,
    StatusReply,
    Task,
    TaskEnded,
    TaskKind,
    TeBeat,
    Tokens,
)
from shared.rtc_messages import BlockEvents
from shared.service import instance_id
from tests.worker.tiny import make_tiny

MODEL = "tiny"
PROMPT = list(range(3, 43))
KV_TOKENS = 32768


def make_model(cache: Path, name: str = MODEL) -> None:
    """Publish a tiny model in the cache folder, as `deepflow pull` would."""
    folder = make_tiny(cache / "models" / subjects.encode(name), context=16384)
    manifest = {"name": name, "weights_digest": "tiny-0", "created": 1}
    (folder / "manifest.json").write_text(json.dumps(manifest))


class Worker:
    """A pod host process with TEs of the tiny model."""

    def __init__(self, url: str, folder: Path, **variables: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "worker.log"
        self._env = {
            **os.environ,
            "DEEPFLOW_NATS_URL": url,
            "DEEPFLOW_HOME": str(folder),
            "DEEPFLOW_CACHE": str(folder / "cache"),
            "DEEPFLOW_MODELS": MODEL,
            "DEEPFLOW_DTYPE": "fp32",
            "DEEPFLOW_KV_TOKENS": str(KV_TOKENS),
            "DEEPFLOW_THREADS": "1",
            "DEEPFLOW_GRACE_S": "5",
            "DEEPFLOW_ZYGOTE": "0",  # its child processes are TEs, and nothing else
            "DEEPFLOW_WARM_TES": "0",
            "DEEPFLOW_PARENT_PID": str(os.getpid()),
            **variables,
        }
        make_model(folder / "cache")
        self.process: subprocess.Popen[bytes] | None = None
        self._seen: dict[int, psutil.Process] = {}

    def start(self) -> None:
        """Start it; it is not ready yet."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "services.worker"],
                env=self._env,
                stdout=log,
                stderr=log,
                process_group=0,
            )

    def tes(self) -> list[psutil.Process]:
        """Its TE processes that are alive at this moment."""
        assert self.process is not None
        found = [
            child
            for child in psutil.Process(self.process.pid).children()
            if child.status() != psutil.STATUS_ZOMBIE
        ]
        self._seen.update((child.pid, child) for child in found)
        return found

    def stop(self) -> None:
        """End it, whatever its state, and prove that no TE is left behind."""
        assert self.process is not None
        if self.process.poll() is None:
            self.tes()
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        _, left = psutil.wait_procs(list(self._seen.values()), timeout=3)
        for process in left:
            process.kill()
        assert not left, f"TEs outlived their pod host: {left}"


class Peer:
    """A gateway (`client`) and a job executor (`je`) in one; remembers everything it hears."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self.client = instance_id("gateway")
        self.je = instance_id("scheduler")
        self.frames: list[Tokens] = []
        self.ended: list[TaskEnded] = []
        self.prefilled: list[Prefilled] = []
        self.beats: dict[str, TeBeat] = {}
        self.downs: list[Down] = []
        self.events: list[BlockEvents] = []
        self.beating = True
        self._news = asyncio.Event()

    @classmethod
    @asynccontextmanager
    async def on(cls, url: str) -> AsyncIterator[Peer]:
        """A peer on the bus at `url`, that beats."""
        bus = await Bus.connect(BusSettings(url=url, grace_s=1), name="peer")
        peer, names = cls(bus), bus.subjects
        try:
            await bus.listen(names.tokens(peer.client), (Tokens,), peer._hear(peer.frames.append))
            told: tuple[type[TaskEnded | Prefilled], ...] = (TaskEnded, Prefilled)
            await bus.listen(names.events(peer.je), told, peer._hear(peer._told))
            await bus.listen(names.beat("te", "*"), (TeBeat,), peer._hear(peer._te_beat))
            await bus.listen(names.down("te", "*"), (Down,), peer._hear(peer.downs.append))
            await bus.listen(names.blocks("*", "*"), (BlockEvents,), peer._hear(peer.events.append))
            async with asyncio.TaskGroup() as tasks:
                beating = tasks.create_task(peer._beat())
                yield peer
                beating.cancel()
        finally:
            await bus.close()

    def _hear(self, take: Callable[[Any], object]) -> Callable[[Any], None]:
        def hear(message: Any) -> None:
            take(message)
            self._news.set()

        return hear

    def _told(self, event: TaskEnded | Prefilled) -> None:
        if isinstance(event, Prefilled):
            assert not any(end.task == event.task for end in self.ended), "told after the end"
            self.prefilled.append(event)
        else:
            self.ended.append(event)

    def _te_beat(self, beat: TeBeat) -> None:
        self.beats[beat.id] = beat

    async def _beat(self) -> None:
        while True:
            if self.beating and self.bus.connected:
                beat = Beat(kind="gateway", id=self.client)
                await self.bus.publish(self.bus.subjects.beat("gateway", self.client), beat)
            await asyncio.sleep(0.2)

    async def until(self, condition: Callable[[], Any], timeout_s: float = 20.0) -> Any:
        """Wait for news that make `condition` true; what it returned."""
        async with asyncio.timeout(timeout_s):
            while not (value := condition()):
                self._news.clear()
                await self._news.wait()
        return value

    async def ready(self, *, but: str = "") -> str:
        """Wait for a TE (another one than `but`) that says it is ready; its name."""
        dead = {down.id for down in self.downs}
        found: str = await self.until(
            lambda: next(
                (
                    te
                    for te, beat in self.beats.items()
                    if beat.state == "ready" and te != but and te not in dead
                ),
                None,
            )
        )
        return found

    # -------------------------------------------------------------------------------------------------- doing things

    def request(
        self, name: str, *, max_tokens: int = 8, attempt: int = 0, n: int = 1, **fields: Any
    ) -> Request:
        """A greedy request that does not stop before `max_tokens`."""
        return Request(
            request=name,
            attempt=attempt,
            client=self.client,
            model=fields.pop("model", MODEL),
            tenant="test",
            prompt=fields.pop("prompt", PROMPT),
            root=b"root",
            hashes=[],
            sampling=Sampling(max_tokens=max_tokens, seed=1, n=n, temperature=0.0, ignore_eos=True),
            deadline_ms=60_000,
            park_ms=0,
            **fields,
        )

    async def send(
        self,
        te: str,
        request: Request,
        kind: TaskKind = TaskKind.GENERATE,
        handover: Handover | None = None,
    ) -> Accepted:
        """Send the request's task to a TE. Raises what the TE refuses it with."""
        job = f"{request.request}.{request.attempt}"
        name = f"{job}.decode" if kind is TaskKind.DECODE else job
        task = Task(task=name, job=job, je=self.je, kind=kind, request=request, handover=handover)
        subject = self.bus.subjects.task(te)
        return await self.bus.request(subject, task, Accepted, timeout_s=5)

    async def cancel(self, te: str, request: Request) -> None:
        """Cancel the request at the TE."""
        cancel = Cancel(request=request.request, attempt=request.attempt)
        await self.bus.publish(self.bus.subjects.cancel(te), cancel)

    async def status(self, te: str, verb: str = "status") -> dict[str, Any]:
        """What a TE says of itself."""
        subject = self.bus.subjects.status("te", te)
        reply = await self.bus.request(subject, StatusQuery(verb=verb), StatusReply, timeout_s=5)
        body: dict[str, Any] = {**json.loads(reply.body), "pid": reply.pid}
        return body

    async def freed(self, te: str, timeout_s: float = 8.0) -> dict[str, Any]:
        """Wait until no block of the TE is in use; its ledger then."""
        give_up = time.monotonic() + timeout_s
        while True:
            ledger = await self.status(te, "ledger")
            states = ("live", "cached", "leased", "moving", "free")
            assert ledger["total"] == sum(ledger.get(state, 0) for state in states)
            if not ledger["live"]:
                return ledger
            assert time.monotonic() < give_up, f"blocks are still held: {ledger}"
            await asyncio.sleep(0.02)

    def deltas(self, name: str, attempt: int = 0, choice: int = 0) -> list[Delta]:
        """What came of one choice so far, in order."""
        return [
            delta
            for frame in self.frames
            for delta in frame.deltas
            if (delta.request, delta.attempt, delta.choice) == (name, attempt, choice)
        ]

    async def end(self, name: str, attempt: int = 0, choice: int = 0) -> list[Delta]:
        """Wait for the terminal delta of a choice; all of its deltas."""
        await self.until(lambda: any(d.finish for d in self.deltas(name, attempt, choice)))
        return self.deltas(name, attempt, choice)


def tokens(deltas: list[Delta]) -> list[int]:
    """The token ids of one choice; proves that there is neither gap nor overlap, and one end."""
    ids: list[int] = []
    for delta in deltas:
        assert delta.index == deltas[0].index + len(ids)
        ids += delta.ids
    assert [delta.finish is not None for delta in deltas].count(True) <= 1
    return ids
