"""The tokenizer pool: prompts to token ids and page hashes in processes of their own, never in the event loop.

A few long-lived processes (`tokenizing.py`), each with one job at a time. One that passes the time limit is killed and
replaced, and only the job it had fails. So is one that dies; its job is tried once more, since it may have died before
it read it. A full queue is refused. This module must not know HTTP or the bus.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from services.gateway import tokenizing
from shared import wire
from shared.blockhash import DIGEST_BYTES
from shared.errors import DeadlineExceeded, Internal, Overloaded, from_code
from shared.log import Logger

MAX_WAITING: Final = 1024
WARM_S: Final = 10.0  # a start is not held up longer; the first jobs wait instead
_LENGTH_BYTES: Final = tokenizing.LENGTH_BYTES
_RESPAWN_S: Final = 0.5
# How a process is lost: too slow, not even started, died, or talks nonsense.
_LOST: Final = (TimeoutError, OSError, asyncio.IncompleteReadError, wire.WireError)


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt, ready for the engine: token ids, and the chained hashes of its full pages. `chunks` are the ranges
    of those texts that were named as such."""

    ids: list[int]
    hashes: list[bytes]
    chunks: list[list[int]] = field(default_factory=list)


@dataclass(slots=True)
class _Job:
    body: bytes
    answer: asyncio.Future[dict[str, Any]]
    retried: bool = False


class Prompts:
    """The pool. `num_processes` at least 1; `limit_s` bounds one job."""

    def __init__(self, num_processes: int, limit_s: float, log: Logger) -> None:
        self.num_processes = num_processes
        self._limit_s = limit_s
        self._log = log
        self._waiting: deque[_Job] = deque()
        self._wanted = asyncio.Semaphore(0)
        self._processes: dict[int, Process] = {}
        self._warm = asyncio.Event()
        self._num_warm = 0
        self._models: dict[tuple[str, str], bytes] = {}  # what a fresh process loads first

    async def start(self, tasks: asyncio.TaskGroup) -> None:
        """Start the processes, which live as long as the TaskGroup, and wait until they have loaded what is known."""
        for index in range(self.num_processes):
            tasks.create_task(self._keep(index), name=f"tokenizing-{index}")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(WARM_S):
                await self._warm.wait()

    def announce(self, folder: str, version: str) -> None:
        """A model is about to be used: processes load it before they take a job."""
        job = wire.pack({"op": "load", "folder": folder, "version": version})
        self._models = {key: body for key, body in self._models.items() if key[0] != folder}
        self._models[folder, version] = job
        for _ in range(self.num_processes):  # wake the idle ones
            self._wanted.release()

    async def chat(
        self,
        folder: str,
        version: str,
        messages: list[dict[str, Any]],
        options: dict[str, Any],
        *,
        special: bool,
        root: bytes,
        page: int,
        chunks: Sequence[str] = (),
    ) -> Prompt:
        """Render and tokenize a chat; those of the texts `chunks` that it holds, in this order, get tokens of their
        own. Raises InvalidRequest if the template refuses it."""
        answer = await self._run(
            op="chat", folder=folder, version=version, messages=messages, options=options,
            special=special, root=root, page=page, chunks=list(chunks),
        )  # fmt: skip
        return _prompts(answer)[0]

    async def texts(
        self,
        folder: str,
        version: str,
        prompts: list[str | list[int]],
        *,
        special: bool,
        root: bytes,
        page: int,
    ) -> list[Prompt]:
        """Tokenize prompts; those that are token ids already only get their hashes."""
        plain = [p if isinstance(p, str) else tokenizing.packed(p) for p in prompts]
        answer = await self._run(
            op="text", folder=folder, version=version, prompts=plain,
            special=special, root=root, page=page,
        )  # fmt: skip
        return _prompts(answer)

    async def context(
        self,
        folder: str,
        version: str,
        context: list[dict[str, Any]] | str,
        options: dict[str, Any],
    ) -> tuple[list[int], int]:
        """Tokenize what others are going to continue: messages or text. Its tokens, and with how many of them every
        continuation begins. Raises InvalidRequest if the template refuses it, or whatever could follow."""
        kind = "text" if isinstance(context, str) else "messages"
        job = {kind: context, "options": options}
        answer = await self._run(op="context", folder=folder, version=version, **job)
        return tokenizing.unpacked(answer["ids"]), int(answer["num_common"])

    async def decode(self, folder: str, version: str, ids: list[int]) -> str:
        """The text of token ids."""
        answer = await self._run(
            op="decode", folder=folder, version=version, ids=tokenizing.packed(ids)
        )
        return str(answer["text"])

    async def _run(self, **job: Any) -> dict[str, Any]:
        if len(self._waiting) >= MAX_WAITING:
            raise Overloaded("too many prompts wait to be tokenized", retry_after_s=1.0)
        answer = await self._put(wire.pack(job))
        if "error" in answer:
            code, message, param = answer["error"]
            raise from_code(code, message, param=param)
        return answer

    def _put(self, body: bytes) -> asyncio.Future[dict[str, Any]]:
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Job(body, future))
        self._wanted.release()
        return future

    # ----------------------------------------------------------------------------------------------------- processes

    async def _keep(self, index: int) -> None:
        """One seat of the pool: there is always a process in it."""
        try:
            while True:
                try:
                    process = await self._spawn(index)
                    try:
                        await self._feed(process)
                    finally:
                        await _end(process)
                except _LOST as error:
                    self._log.error("tokenizing_process_lost", error=repr(error))
                await asyncio.sleep(_RESPAWN_S)
        finally:
            self._processes.pop(index, None)
            if not self._processes:
                self._refuse_waiting()

    async def _spawn(self, index: int) -> Process:
        # A tokenizer's own thread pool would fight the engine for cores; one prompt needs one.
        environment = {key: v for key, v in os.environ.items() if not key.startswith("DEEPFLOW_")}
        environment |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "services.gateway.tokenizing",
            stdin=PIPE, stdout=PIPE, env=environment, start_new_session=True,
        )  # fmt: skip
        self._processes[index] = process
        return process

    async def _feed(self, process: Process) -> None:
        """Hand jobs to one process until it fails one."""
        loaded: set[bytes] = set()
        while True:
            for key, body in list(self._models.items()):
                if body not in loaded:
                    loaded.add(body)
                    await self._load(process, key, body)
            self._count_warm()
            await self._wanted.acquire()
            if not self._waiting:  # woken to load
                continue
            job = self._waiting.popleft()
            if job.answer.done():  # the client left
                continue
            try:
                answer = await self._exchange(process, job.body)
            except TimeoutError:
                _fail(job, DeadlineExceeded("tokenizing the prompt took too long"))
                raise
            except (OSError, asyncio.IncompleteReadError):
                self._retry(job)
                raise
            except BaseException:
                _fail(job, Internal("tokenizing the prompt failed"))
                raise
            if not job.answer.done():
                job.answer.set_result(answer)

    async def _load(self, process: Process, key: tuple[str, str], body: bytes) -> None:
        """Load a model ahead of its first job. One that costs a process its life is left to the jobs that name it."""
        try:
            await self._exchange(process, body)
        except _LOST:
            self._models.pop(key, None)
            raise

    def _retry(self, job: _Job) -> None:
        """The process died with this job: first in the queue again, once."""
        if job.retried:
            _fail(job, Internal("tokenizing the prompt failed"))
            return
        job.retried = True
        self._waiting.appendleft(job)
        self._wanted.release()

    def _count_warm(self) -> None:
        if not self._warm.is_set():
            self._num_warm += 1
            if self._num_warm >= self.num_processes:
                self._warm.set()

    async def _exchange(self, process: Process, body: bytes) -> dict[str, Any]:
        assert process.stdin is not None
        assert process.stdout is not None
        async with asyncio.timeout(self._limit_s):
            process.stdin.write(len(body).to_bytes(_LENGTH_BYTES, "little") + body)
            await process.stdin.drain()
            head = await process.stdout.readexactly(_LENGTH_BYTES)
            data = await process.stdout.readexactly(int.from_bytes(head, "little"))
        answer: dict[str, Any] = wire.unpack(data)
        return answer

    def _refuse_waiting(self) -> None:
        for job in self._waiting:
            _fail(job, Internal("the gateway is stopping"))
        self._waiting.clear()

    def pids(self) -> list[int]:
        """The processes, for status and tests."""
        return [process.pid for process in self._processes.values()]


def _fail(job: _Job, error: Exception) -> None:
    if not job.answer.done():
        job.answer.set_exception(error)


async def _end(process: Process) -> None:
    """No process stays behind: killed, and waited for."""
    if process.returncode is None:
        process.kill()
    await process.wait()


def _prompts(answer: dict[str, Any]) -> list[Prompt]:
    prompts = []
    for index, raw in enumerate(answer["ids"]):
        joined: bytes = answer["hashes"][index] if "hashes" in answer else b""
        hashes = [joined[i : i + DIGEST_BYTES] for i in range(0, len(joined), DIGEST_BYTES)]
        prompts.append(Prompt(tokenizing.unpacked(raw), hashes, answer.get("chunks", [])))
    return prompts
