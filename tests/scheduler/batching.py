"""What goes on around a JE's batches in tests: a gateway that runs lines as told, and files in a store."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from random import Random
from typing import Any

import orjson

from services.scheduler.batches import Batches
from services.scheduler.jobs import Jobs
from services.scheduler.lines import Lines
from shared import log, wire
from shared.bus import Bus, Table
from shared.errors import Unavailable
from shared.job_messages import BatchArguments, BatchResult, FileRow, JobRow, Line, LineDone
from shared.jobs import FINAL
from shared.messages import Beat
from shared.store.base import whole
from shared.store.files import Files
from shared.store.local import LocalStore
from tests.scheduler.players import eventually

TENANT = "alice"
ENDPOINT = "/v1/chat/completions"


def request(custom_id: str, model: str = "tiny", **more: Any) -> dict[str, Any]:
    """A line of an input."""
    body = {"model": model, "messages": [{"role": "user", "content": custom_id}]}
    return {"custom_id": custom_id, "method": "POST", "url": ENDPOINT, "body": body, **more}


def jsonl(lines: list[dict[str, Any]]) -> bytes:
    """An input file."""
    return b"".join(orjson.dumps(line) + b"\n" for line in lines)


def said(line: Line) -> str:
    """What a line's user said, which is its custom_id here."""
    text: str = orjson.loads(line.body)["messages"][0]["content"]
    return text


async def well(line: Line) -> LineDone:
    """A gateway's answer to a line that goes well."""
    body = orjson.dumps({"echo": said(line)}).decode()
    return LineDone(
        request_id=line.key,
        status=200,
        body=body,
        prompt_tokens=3,
        output_tokens=2,
        cached_tokens=1,
    )


def status(code: int) -> LineDone:
    """An answer that is an error."""
    body = orjson.dumps({"error": {"message": "no", "code": str(code)}}).decode()
    return LineDone(request_id="", status=code, body=body)


class Gateway:
    """Plays a gateway that runs lines. Use as a context manager."""

    def __init__(
        self, bus: Bus, name: str, answer: Callable[[Line], Awaitable[LineDone]] = well
    ) -> None:
        self.bus = bus
        self.name = name
        self.answer = answer
        self.seen: Counter[str] = Counter()  # custom ids
        self.lines: list[Line] = []
        self.draining = False
        self._ends: list[Callable[[], Awaitable[None]]] = []
        self._answering: set[asyncio.Task[object]] = set()
        self._beating: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Gateway:
        served = await self.bus.serve(self.bus.subjects.line(self.name), (Line,), self._serve)
        self._ends.append(served.stop)
        self._beating = asyncio.create_task(self._beat())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.die()

    async def die(self) -> None:
        """Beat no more, and answer nobody."""
        if self._beating is not None:
            self._beating.cancel()
        for end in self._ends:
            await end()
        for task in self._answering:
            task.cancel()

    async def _serve(self, line: Line) -> LineDone:
        self.seen[said(line)] += 1
        self.lines.append(line)
        task = asyncio.current_task()
        assert task is not None
        self._answering.add(task)
        try:
            return await self.answer(line)
        finally:
            self._answering.discard(task)

    async def _beat(self) -> None:
        while True:
            beat = Beat(kind="gateway", id=self.name, draining=self.draining)
            with contextlib.suppress(Unavailable):
                await self.bus.publish(self.bus.subjects.beat("gateway", self.name), beat)
            await asyncio.sleep(0.1)


class Desk:
    """A tenant's files and batches, without a gateway's HTTP, and the JEs that run them."""

    def __init__(self, bus: Bus, folder: Path, rows: Table, files: Table) -> None:
        self.bus = bus
        self.rows = rows
        self.store = LocalStore(folder)
        self.statuses: list[int] = []  # of the lines that ended
        self.files = Files(self.store, files)

    @classmethod
    async def open(cls, bus: Bus, folder: Path) -> Desk:
        """On that bus, with the store in that folder."""
        return cls(bus, folder, await bus.table("jobs"), await bus.table("files"))

    @contextlib.asynccontextmanager
    async def je(
        self, name: str = "je-1", *, max_in_flight: int = 64, limit: int = 4
    ) -> AsyncIterator[Jobs]:
        """A JE that runs batches, and leaves in order."""
        async with asyncio.TaskGroup() as tasks:
            lines = Lines(self.bus)
            await lines.start(tasks)
            jobs = Jobs(await self.bus.work_queue(lease_s=0.5), self.rows, name, log.get())
            batches = Batches(
                self.store,
                self.files,
                lines,
                log.get(),
                ended=self.statuses.append,
                max_in_flight=max_in_flight,
                random=Random(1),
            )
            jobs.serve("batch", batches.run, limit=limit)
            jobs.start(tasks)
            try:
                yield jobs
            finally:
                await jobs.leave()
                for task in asyncio.all_tasks():
                    if task.get_name() == "watch-gateways":
                        task.cancel()

    async def submit(
        self, jobs: Jobs, contents: bytes, id_: str = "batch_1", *, expires_s: float = 3600
    ) -> None:
        """A batch of that input."""
        file = f"file-{id_}"
        size = await self.files.store(TENANT, file, whole(contents))
        await self.files.add(
            FileRow(
                id=file,
                tenant=TENANT,
                name="in.jsonl",
                purpose="batch",
                num_bytes=size,
                created=int(time.time()),
            )
        )
        arguments = BatchArguments(input_file=file, endpoint=ENDPOINT, window="24h")
        assert await jobs.create(
            "batch",
            id_,
            tenant=TENANT,
            arguments=wire.to_json(arguments).decode(),
            expires_s=expires_s,
        )

    async def row(self, id_: str = "batch_1") -> JobRow:
        """A batch's row."""
        row = await self.rows.get(id_, JobRow)
        assert row is not None
        return row

    async def over(
        self, id_: str = "batch_1", within_s: float = 20.0
    ) -> tuple[JobRow, BatchResult]:
        """A batch's row and result, once it is over."""

        async def is_over() -> bool:
            return (await self.row(id_)).status in FINAL

        await eventually(is_over, within_s)
        row = await self.row(id_)
        if not row.result:
            return row, BatchResult()
        return row, wire.from_json(row.result.encode(), BatchResult)

    async def read(self, file: str) -> list[dict[str, Any]]:
        """The lines of a file."""
        row = await self.files.get(TENANT, file, time.time())
        data = b"".join([chunk async for chunk in self.files.read(row)])
        assert len(data) == row.num_bytes
        return [orjson.loads(line) for line in data.splitlines()]
