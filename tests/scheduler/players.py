"""What the scheduler's and the cache's peers do in tests: TEs and a gateway that speak with real messages."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from shared.bus import Bus
from shared.errors import DeepFlowError
from shared.messages import (
    Accepted,
    Beat,
    Cancel,
    Delta,
    Handover,
    ModelEntry,
    Prefilled,
    Progress,
    Request,
    Sampling,
    StatusQuery,
    StatusReply,
    Task,
    TaskEnded,
    TeBeat,
    Tokens,
)
from shared.rtc_messages import BlockEvents, BlocksDump, BlocksQuery
from tests.nats_server import NatsServer

MODEL = "tiny"


@contextlib.asynccontextmanager
async def process(
    kind: str, nats: NatsServer, **env: str
) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """`python -m services.<kind>` as a child process, and its id, once it has started; killed at the end."""
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", f"services.{kind}"),
        env={**os.environ, "DEEPFLOW_NATS_URL": nats.url, "DEEPFLOW_GRACE_S": "5", **env},
        stderr=asyncio.subprocess.PIPE,
    )
    assert child.stderr is not None
    first = await child.stderr.readline()
    assert b"service_started" in first, first
    log = asyncio.create_task(child.stderr.read())  # somebody must, or a full pipe stops the child
    try:
        yield child, json.loads(first)["id"]
    finally:
        if child.returncode is None:
            child.kill()
        await child.wait()
        lines = (await log).splitlines()
    faults = (b"Traceback", b"handler_failed", b"listener_failed", b"service_failed")
    assert not [line for line in lines if any(fault in line for fault in faults)], lines


async def eventually(holds: Callable[[], bool | Awaitable[bool]], within_s: float = 10.0) -> None:
    """Waits until `holds`; fails when it does not come true."""
    async with asyncio.timeout(within_s):
        while True:
            answer = holds()
            if answer if isinstance(answer, bool) else await answer:
                return
            await asyncio.sleep(0.02)


async def status(bus: Bus, kind: str, instance: str) -> dict[str, Any]:
    """The status answer of one service."""
    reply = await bus.request(
        bus.subjects.status(kind, instance), StatusQuery(), StatusReply, timeout_s=5
    )
    body: dict[str, Any] = json.loads(reply.body)
    return body


async def wait_ready(bus: Bus, kind: str, instance: str) -> None:
    """Waits until a service says that it is ready."""

    async def ready() -> bool:
        with contextlib.suppress(DeepFlowError):
            return bool((await status(bus, kind, instance))["ready"])
        return False

    await eventually(ready)


async def publish_model(bus: Bus, name: str = MODEL) -> None:
    """Puts a model into the catalogue."""
    entry = ModelEntry(
        name=name,
        folder=name,
        context=256,
        vocab=64,
        page=16,
        eos_ids=[0],
        tokenizer_digest="t",
        template_digest="c",
        recipe_digest="r",
    )
    await (await bus.table("models")).put(name, entry)


class Te:
    """Plays a TE: beats, answers tasks as told, and holds an index of pages. Use as a context manager."""

    def __init__(self, bus: Bus, name: str, **beat: Any) -> None:
        self.bus = bus
        self.name = name
        self.load: dict[str, Any] = {"model": MODEL, "pod": "pod-1", "state": "ready", **beat}
        self.says: DeepFlowError | str = "accepted"  # or silence, or an error
        self.hold: asyncio.Event | None = None  # set: tasks are answered when it is
        self.tasks: list[Task] = []
        self.cancels: list[Cancel] = []
        self.pages: dict[bytes, None] = {}
        self.seq = 0
        self.num_dumps = 0
        self.dump_hold: asyncio.Event | None = None  # set: dumps are sent when it is
        self.serves = True
        self._over = asyncio.Event()
        self._ends: list[Callable[[], Awaitable[None]]] = []
        self._beating: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Te:
        subjects = self.bus.subjects
        if self.serves:
            served = await self.bus.serve(subjects.task(self.name), (Task,), self._answer)
            dumps = await self.bus.serve(
                subjects.blocks_dump(self.name), (BlocksQuery,), self._dump
            )
            self._ends += [served.stop, dumps.stop]
        heard = await self.bus.listen(subjects.cancel(self.name), (Cancel,), self.cancels.append)
        self._ends.append(heard.stop)
        self._beating = asyncio.create_task(self._beat())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._beating is not None
        self._over.set()
        self._beating.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._beating
        for end in self._ends:
            await end()

    async def _beat(self) -> None:
        while True:
            beat = TeBeat(id=self.name, **self.load)
            await self.bus.publish(self.bus.subjects.beat("te", self.name), beat)
            await asyncio.sleep(0.1)

    async def _answer(self, task: Task) -> Accepted:
        self.tasks.append(task)
        if self.says == "silence":
            await self._over.wait()
        if self.hold is not None:
            await self.hold.wait()
        if isinstance(self.says, DeepFlowError):
            raise self.says
        request = task.request
        return Accepted(
            request=request.request, attempt=request.attempt, by=self.name, te=self.name
        )

    async def handed(self, task: Task, ids: list[int] | None = None) -> None:
        """Says that a prefill task is done: what it leaves behind."""
        request = task.request
        handover = Handover(te=self.name, lease="lease-1", num_pages=2, ids=ids or [7])
        message = Prefilled(
            task=task.task, request=request.request, attempt=request.attempt, handover=handover
        )
        await self.bus.publish(self.bus.subjects.events(task.je), message)

    async def ended(self, task: Task, finish: str) -> None:
        """Says that a task is over."""
        request = task.request
        message = TaskEnded(
            task=task.task,
            request=request.request,
            attempt=request.attempt,
            te=self.name,
            finish=finish,
            prompt_tokens=len(request.prompt),
            cached_tokens=0,
            output_tokens=1,
        )
        await self.bus.publish(self.bus.subjects.events(task.je), message)

    async def _dump(self, query: BlocksQuery) -> BlocksDump:
        self.num_dumps += 1
        dump = BlocksDump(
            te=self.name, model=self.load["model"], seq=self.seq, hashes=list(self.pages)
        )
        if self.dump_hold is not None:
            await self.dump_hold.wait()
        return dump

    async def change(
        self, stored: list[bytes], removed: list[bytes] | None = None, *, lost: bool = False
    ) -> None:
        """Changes the index and says so, unless the message is `lost`."""
        self.seq += 1
        for page in removed or []:
            del self.pages[page]
        self.pages.update(dict.fromkeys(stored))
        model = self.load["model"]
        events = BlockEvents(
            te=self.name, model=model, seq=self.seq, stored=stored, removed=removed or []
        )
        if not lost:
            await self.bus.publish(self.bus.subjects.blocks(model, self.name), events)


class Client:
    """Plays a gateway: beats (unless told not to), submits requests, and keeps the frames it gets."""

    def __init__(self, bus: Bus, name: str = "gateway-00000001") -> None:
        self.bus = bus
        self.name = name
        self.frames: list[Tokens | Progress] = []
        self._listening: Any = None

    async def __aenter__(self) -> Client:
        self._listening = await self.bus.listen(
            self.bus.subjects.tokens(self.name), (Tokens, Progress), self.frames.append
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._listening.stop()

    async def beat(self) -> None:
        """One sign of life."""
        beat = Beat(kind="gateway", id=self.name)
        await self.bus.publish(self.bus.subjects.beat("gateway", self.name), beat)

    def request(self, name: str, **fields: Any) -> Request:
        """A small request of this client."""
        values: dict[str, Any] = {
            "request": name,
            "attempt": 1,
            "client": self.name,
            "model": MODEL,
            "tenant": "local",
            "prompt": [1, 2, 3],
            "root": b"r" * 16,
            "hashes": [],
            "sampling": Sampling(max_tokens=10, seed=1),
            "deadline_ms": 60_000,
            "park_ms": 30_000,
        }
        return Request(**{**values, **fields})

    async def submit(self, name: str, **fields: Any) -> Accepted:
        """Asks whichever JE takes it. Raises its failure."""
        request = self.request(name, **fields)
        subject = self.bus.subjects.request(request.model)
        return await self.bus.request(subject, request, Accepted, timeout_s=5)

    def ends(self, name: str) -> list[Delta]:
        """The terminal deltas of a request."""
        return [
            delta
            for frame in self.frames
            if isinstance(frame, Tokens)
            for delta in frame.deltas
            if delta.request == name and delta.finish is not None
        ]

    def progress(self, name: str) -> list[str]:
        """The states a request was said to be in."""
        return [f.state for f in self.frames if isinstance(f, Progress) and f.request == name]
