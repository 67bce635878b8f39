"""Batch jobs: a file of requests in, a file of answers out, done when there is room for it.

Life of a batch: its input is checked as a whole; then each line is run by a gateway like any request, in the band that
yields to all others; each outcome is written down as it comes; at the end, or when the time is over or its tenant has
had enough, the outcomes become two files, in the order of the input. Whoever takes a batch over goes on from what is
written down. A line that is refused for want of room waits and comes again; one that fails by a fault of ours is tried
`TRIES` times. This module must not know how files are stored or jobs owned.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from hashlib import blake2b
from random import Random
from typing import Final

import orjson

from services.scheduler.batch_input import InputLine, LineFault, check, parse, split
from services.scheduler.jobs import Job, Later
from services.scheduler.lines import Lines, refused
from services.scheduler.outcomes import Outcomes, forget
from services.scheduler.pace import Pace, Turns
from shared import wire
from shared.errors import DeadlineExceeded, DeepFlowError, NotFound, Unavailable
from shared.job_messages import (
    BatchArguments,
    BatchResult,
    FileRow,
    JobRow,
    JobStatus,
    Line,
    LineDone,
)
from shared.log import Logger
from shared.messages import Failure
from shared.store.base import Store, gathered
from shared.store.files import Files
from shared.table import heed_cancellation

TRIES: Final = 3
RECORD_S: Final = 1.0  # what a crash may cost of what was not yet written down
_WINDOW_LINES: Final = 512  # of one batch in hand, in flight or waiting for it
_WINDOW_BYTES: Final = 16 * 1024 * 1024
_PENDING_BYTES: Final = 64 * 1024 * 1024  # of outcomes that are not yet written down
_MAX_MODELS: Final = 256
_NO_ROOM: Final = (429, 503)
_AGAIN_S: Final = 1.0
_STUCK_S: Final = (
    120.0  # without an outcome, as where the model sleeps: then another batch may have the place
)
_STUCK_AGAIN_S: Final = 10.0  # sooner than a gateway forgets a line


class _Stopped(Exception):
    """The batch's time is over, or its tenant has had enough."""


class _Window:
    """Bounds the lines of one batch in hand, by number and bytes."""

    def __init__(self) -> None:
        self._num_lines = 0
        self._num_bytes = 0
        self._changed = asyncio.Condition()

    async def enter(self, num_bytes: int) -> None:
        async with self._changed:
            await self._changed.wait_for(
                lambda: (
                    not self._num_lines
                    or (
                        self._num_lines < _WINDOW_LINES
                        and self._num_bytes + num_bytes <= _WINDOW_BYTES
                    )
                )
            )
            self._num_lines += 1
            self._num_bytes += num_bytes

    async def leave(self, num_bytes: int) -> None:
        async with self._changed:
            self._num_lines -= 1
            self._num_bytes -= num_bytes
            self._changed.notify()


class Batches:
    """Runs batches: `run` is the runner of the kind `batch`. All of them share each model's idle capacity. `ended` is
    told the HTTP status of each line's answer."""

    def __init__(
        self,
        store: Store,
        files: Files,
        lines: Lines,
        log: Logger,
        *,
        ended: Callable[[int], None],
        max_in_flight: int,
        random: Random,
    ) -> None:
        self._store = store
        self._files = files
        self._lines = lines
        self._log = log
        self._ended = ended
        self._max_in_flight = max_in_flight
        self._random = random
        self._turns: dict[str, Turns] = {}

    @property
    def num_in_flight(self) -> int:
        """Lines at the gateways."""
        return sum(turns.num_in_flight for turns in self._turns.values())

    async def run(self, job: Job) -> None:
        """See `Jobs.serve`."""
        arguments = wire.from_json(job.row.arguments.encode(), BatchArguments)
        if job.row.status is JobStatus.VALIDATING:
            await self._validate(job, arguments)
        if job.row.num_total == 0:  # refused, or cancelled before anybody had looked at it
            if job.is_cancelling:
                await job.advance(JobStatus.CANCELLED)
            return
        outcomes = Outcomes(self._store, job.row.id, job.row.attempt)
        await outcomes.load()
        if job.row.status is JobStatus.IN_PROGRESS and job.time_left_s() > 0:
            await self._run_lines(job, arguments, outcomes)
        await self._finish(job, arguments, outcomes)

    # -------------------------------------------------------------------------------------------------------- input

    async def _input(self, row: JobRow, arguments: BatchArguments) -> AsyncIterator[bytes]:
        """The input file's contents. Raises NotFound once it has been deleted."""
        file = await self._files.get(row.tenant, arguments.input_file, time.time())
        async for chunk in self._files.read(file):
            yield chunk

    async def _validate(self, job: Job, arguments: BatchArguments) -> None:
        checked = await check(split(self._input(job.row, arguments)), arguments.endpoint)
        result = BatchResult(model=checked.model, errors=checked.errors)
        fields = {"result": wire.to_json(result).decode()}
        if checked.errors:
            await job.advance(JobStatus.FAILED, **fields)
        else:
            await job.advance(JobStatus.IN_PROGRESS, num_total=checked.num_lines, **fields)

    # -------------------------------------------------------------------------------------------------------- lines

    async def _run_lines(self, job: Job, arguments: BatchArguments, outcomes: Outcomes) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                recorder = group.create_task(self._keep_recording(job, outcomes))
                await self._feed(job, arguments, outcomes)
                recorder.cancel()
        except* _Stopped:
            pass
        except* NotFound:  # of the input, which its tenant has deleted: what is done by now is kept
            self._log.warning("batch_input_lost", id=job.row.id)
        finally:  # what is done is done, also where this JE leaves
            await self._record(job, outcomes)

    async def _feed(self, job: Job, arguments: BatchArguments, outcomes: Outcomes) -> None:
        window = _Window()
        async with asyncio.TaskGroup() as group:
            async for number, raw in split(self._input(job.row, arguments)):
                if number in outcomes:
                    continue
                await outcomes.room(_PENDING_BYTES)
                await window.enter(len(raw))
                group.create_task(self._line(job, arguments, outcomes, window, number, raw))

    async def _line(
        self,
        job: Job,
        arguments: BatchArguments,
        outcomes: Outcomes,
        window: _Window,
        number: int,
        raw: bytes,
    ) -> None:
        try:
            line = parse(raw, arguments.endpoint)
            done = await self._done(job, arguments.endpoint, line, f"{job.row.id}-{number}")
            self._ended(done.status)
            ok = done.status == 200
            tokens = (done.prompt_tokens, done.cached_tokens, done.output_tokens)
            outcomes.add(number, ok, tokens, _answered(job.row.id, number, line.custom_id, done))
        finally:
            await window.leave(len(raw))

    async def _done(self, job: Job, endpoint: str, line: InputLine, key: str) -> LineDone:
        """The answer to a line, whatever it takes."""
        turns = self._turns_of(line.model)
        num_tries = 0
        while True:
            heed_cancellation()
            async with turns.turn(job.row.tenant):
                started = time.monotonic()
                done, retry_after_s = await self._try(job, endpoint, line, key)
                if done.status not in _NO_ROOM:
                    turns.pace.succeeded(turns.num_in_flight)
                else:
                    turns.pace.refused(started, time.monotonic(), retry_after_s)
            if done.status in _NO_ROOM:
                await asyncio.sleep(_AGAIN_S * self._random.random())
                continue
            num_tries += 1
            if done.status < 500 or num_tries == TRIES:
                return done
            await asyncio.sleep(_AGAIN_S * num_tries)

    async def _try(
        self, job: Job, endpoint: str, line: InputLine, key: str
    ) -> tuple[LineDone, float | None]:
        try:
            asked = Line(
                key=key,
                tenant=job.row.tenant,
                endpoint=endpoint,
                body=line.body.decode(),
                deadline_ms=max(1, round(job.time_left_s() * 1000)),
            )
            return await self._lines.ask(asked), None
        except DeadlineExceeded:  # the batch's own time is over, which ends this
            await asyncio.Event().wait()
            raise
        except DeepFlowError as error:
            return refused(error), error.retry_after_s

    def _turns_of(self, model: str) -> Turns:
        turns = self._turns.get(model)
        if turns is None:
            if len(self._turns) >= _MAX_MODELS:
                for name in [name for name, turns in self._turns.items() if turns.is_idle]:
                    del self._turns[name]
            turns = self._turns[model] = Turns(Pace(self._max_in_flight, self._random))
        return turns

    # ---------------------------------------------------------------------------------------------------- recording

    async def _keep_recording(self, job: Job, outcomes: Outcomes) -> None:
        """Raises _Stopped when no more lines shall be run, Later when nothing has come of them for long."""
        num_known, since = len(outcomes), time.monotonic()
        while True:
            await asyncio.sleep(RECORD_S)
            if len(outcomes) > num_known:
                num_known, since = len(outcomes), time.monotonic()
            try:
                await self._record(job, outcomes)
            except Unavailable as error:
                self._log.warning("outcomes_unrecorded", id=job.row.id, error=error.message)
            if job.is_cancelling or job.time_left_s() <= 0:
                raise _Stopped
            if time.monotonic() - since > _STUCK_S:
                raise Later(_STUCK_AGAIN_S)

    async def _record(self, job: Job, outcomes: Outcomes) -> None:
        if await outcomes.flush():
            await job.record(num_done=outcomes.num_done, num_failed=outcomes.num_failed)

    # ------------------------------------------------------------------------------------------------------- the end

    async def _finish(self, job: Job, arguments: BatchArguments, outcomes: Outcomes) -> None:
        row = await job.advance(JobStatus.FINALIZING)
        left_out = row.num_total > outcomes.num_done + outcomes.num_failed
        cancelled = row.status is JobStatus.CANCELLING
        if cancelled:
            status = JobStatus.CANCELLED
        elif not left_out:
            status = JobStatus.COMPLETED
        else:
            status = JobStatus.EXPIRED if job.time_left_s() <= 0 else JobStatus.FAILED
        result = wire.from_json(row.result.encode(), BatchResult)
        output = error = ""
        if outcomes.num_done:
            output = await self._write(row, arguments, "output", outcomes.all(ok=True))
        if left_out or outcomes.num_failed:
            failures = (
                self._failures(row, arguments, outcomes, cancelled)
                if left_out
                else outcomes.all(ok=False)
            )
            error = await self._write(row, arguments, "error", failures)
        prompt_tokens, cached_tokens, output_tokens = outcomes.tokens
        result = BatchResult(
            output_file=output,
            error_file=error,
            model=result.model,
            prompt_tokens=prompt_tokens,
            cached_tokens=cached_tokens,
            output_tokens=output_tokens,
        )
        lost = Failure(code=NotFound.code, message="the input file was deleted before its end")
        await job.advance(
            status,
            failures=[lost] if status is JobStatus.FAILED else [],
            num_done=outcomes.num_done,
            num_failed=outcomes.num_failed,
            result=wire.to_json(result).decode(),
        )
        await forget(self._store, row.id)

    async def _failures(
        self, row: JobRow, arguments: BatchArguments, outcomes: Outcomes, cancelled: bool
    ) -> AsyncIterator[bytes]:
        """The lines for the errors file where some were not run: those that failed, and those."""
        code, why = (
            ("batch_cancelled", "This request was not executed: the batch was cancelled.")
            if cancelled
            else (
                "batch_expired",
                "This request could not be executed before the completion window expired.",
            )
        )
        try:
            async for number, raw in split(self._input(row, arguments)):
                if outcomes.has(number, ok=False):
                    yield await outcomes.text(number)
                elif number not in outcomes:
                    line = parse(raw, arguments.endpoint)
                    failure = {"code": code, "message": why}
                    yield _output(row.id, number, line.custom_id, None, failure) + b"\n"
        except (NotFound, LineFault):  # the input was deleted: what was not run cannot be named
            self._log.warning("batch_input_lost", id=row.id)

    async def _write(
        self, row: JobRow, arguments: BatchArguments, what: str, lines: AsyncIterator[bytes]
    ) -> str:
        """Store one of the two files; the same one, if another owner has done so. Its id."""
        id_ = f"file-{blake2b(f'{row.id}:{what}'.encode(), digest_size=12).hexdigest()}"
        num_bytes = await self._files.store(row.tenant, id_, gathered(lines))
        now = int(time.time())
        file = FileRow(
            id=id_,
            tenant=row.tenant,
            name=f"{row.id}_{what}.jsonl",
            purpose="batch_output",
            num_bytes=num_bytes,
            created=now,
            expires=now + arguments.output_ttl_s if arguments.output_ttl_s else 0,
        )
        await self._files.add(file)
        return id_


def _answered(batch: str, number: int, custom_id: str, done: LineDone) -> bytes:
    response = {
        "status_code": done.status,
        "request_id": done.request_id,
        "body": orjson.Fragment(done.body or "null"),
    }
    return _output(batch, number, custom_id, response, None)


def _output(
    batch: str,
    number: int,
    custom_id: str,
    response: dict[str, object] | None,
    error: dict[str, str] | None,
) -> bytes:
    """A line of the output or errors file, as OpenAI writes it."""
    return orjson.dumps(
        {
            "id": f"batch_req_{blake2b(f'{batch}:{number}'.encode(), digest_size=12).hexdigest()}",
            "custom_id": custom_id,
            "response": response,
            "error": error,
        }
    )
