"""The decode-length predictor's life in one JE: traffic to records, records to a job, the job to a table that all load.

Where traffic is recorded (`traffic`), a job of kind `predictor` is made for a model each time enough new answers came.
A JE that records takes it: it hands the newest records to a pod host that serves the model, waits for what a child
process there learns of them, and puts the table into the bucket `predictors`, from where every JE loads it. This module
must not know what a table says, nor how it is learned.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final, NoReturn

import orjson

from services.scheduler.jobs import Job, Jobs, Later
from services.scheduler.lengths import Lengths
from services.scheduler.settings import SchedulerSettings
from services.scheduler.traffic import Records, Traffic
from shared.bus import Table
from shared.errors import (
    DeadlineExceeded,
    DeepFlowError,
    NotFound,
    Overloaded,
    Unavailable,
    from_code,
)
from shared.job_messages import JobStatus, PredictorEntry, Training, TrainingEnded
from shared.length_table import LengthTable
from shared.messages import Accepted, Request, TaskEnded
from shared.service import Service
from shared.table import heed_cancellation, keep_read

KIND: Final = "predictor"
_WRITE_S: Final = 1.0
_READ_S: Final = 60.0  # tables are large, and change a few times a day
_ASK_S: Final = 5.0
_LATER_S: Final = 30.0
_PAUSE_S: Final = 600.0  # between two trainings for a model, however many answers came
_EXPIRES_S: Final = 3600.0
_TRAINING_BYTES: Final = 3 << 20  # of one message, which the smallest bus allowed still carries


class Predictors:
    """All that a JE does about lengths of answers. Where it does not record, it trains nothing either."""

    def __init__(
        self,
        service: Service[SchedulerSettings],
        lengths: Lengths,
        jobs: Jobs,
        tables: Table,
        *,
        pods: Callable[[str], list[str]],
    ) -> None:
        """`tables` is the bucket `predictors`, `pods` names the pod hosts of a model, the idlest first."""
        settings = service.settings
        self._bus = service.bus
        self._log = service.log
        self._je = service.id
        self._lengths = lengths
        self._jobs = jobs
        self._tables = tables
        self._pods = pods
        self._every = settings.predictor_every
        self._records: Records | None = None
        if settings.record == "lengths":
            folder = settings.home_dir / "traffic"
            self._records = Records(folder, service.id, max_bytes=settings.record_bytes)
            jobs.serve(KIND, self.train, limit=1)
        self._traffic = Traffic(lengths, records=self._records is not None)
        # By model: how many answers had been recorded at the last job, and when that was.
        self._asked_for: dict[str, tuple[int, float]] = {}
        self._reports: dict[str, dict[str, Any]] = {}  # on the tables in use
        self._num_jobs = 0
        self._waits: dict[str, asyncio.Future[TrainingEnded]] = {}
        self._read_now = asyncio.Event()
        self._writing = asyncio.Lock()  # the last write comes while the former may be under way
        self._predicted = service.metrics.counter(
            "deepflow_scheduler_lengths_predicted_total",
            "Answers by how many buckets of 128 tokens their predicted length was off.",
            ["off"],
        )
        service.metrics.count(
            "deepflow_scheduler_lengths_recorded",
            "Answers whose length was recorded.",
            self._traffic.num_recorded.total,
        )

    async def start(self, tasks: asyncio.TaskGroup) -> None:
        """Load the tables there are, and follow them. Before `Jobs.start`."""
        await self._read()
        tasks.create_task(keep_read(self._read, self._read_now, _READ_S), name="predictors")
        if self._records is not None:
            tasks.create_task(self._keep_writing(self._records), name="traffic")

    # ------------------------------------------------------------------------------------------------ what one hears

    def on_accepted(self, request: Request) -> None:
        """This JE answers for the request."""
        self._traffic.asked(request)

    def on_ended(self, ended: TaskEnded) -> None:
        """`events.<je>`: a TE is done with a task."""
        off = self._traffic.ended(ended)
        if off is not None:
            self._predicted.labels(str(off) if off < 2 else "more").inc()

    def on_trained(self, ended: TrainingEnded) -> None:
        """`events.<je>`: a pod host is done with a training."""
        wait = self._waits.get(ended.task)
        if wait is not None and not wait.done():
            wait.set_result(ended)

    def status(self) -> dict[str, Any]:
        """The tables in use: when they were made, and how good they were on answers they were not learned from."""
        return {
            model: {"created": created, **report}
            for model, report in self._reports.items()
            if (created := self._lengths.created(model)) is not None
        }

    async def leave(self) -> None:
        """Write what is left."""
        if self._records is not None:
            await self._write(self._records)

    # ----------------------------------------------------------------------------------------------------------- files

    async def _keep_writing(self, records: Records) -> NoReturn:
        while True:
            await asyncio.sleep(_WRITE_S)
            heed_cancellation()
            await self._write(records)
            for model, num in list(self._traffic.num_recorded.items()):
                if self._is_due(model, num):
                    await self._order(model, num)

    def _is_due(self, model: str, num: int) -> bool:
        """Whether enough answers came, and the latest table, whoever ordered it, is not too new."""
        num_before, when = self._asked_for.get(model, (0, -_PAUSE_S))
        paused = time.monotonic() - when >= _PAUSE_S
        return (
            num - num_before >= self._every
            and paused
            and time.time() - (self._lengths.created(model) or 0) >= _PAUSE_S
        )

    async def _write(self, records: Records) -> None:
        async with self._writing:
            lines = self._traffic.take_lines()
            if not lines:
                return
            try:
                await asyncio.to_thread(records.write, lines)
            except OSError as error:  # a full disk must not end the serving
                self._log.warning("traffic_unwritten", error=str(error), num_lines=len(lines))

    async def _order(self, model: str, num: int) -> None:
        self._num_jobs += 1
        try:
            await self._jobs.create(
                KIND,
                f"{KIND}-{self._je}-{self._num_jobs}",
                tenant="",
                arguments=orjson.dumps({"model": model}).decode(),
                expires_s=_EXPIRES_S,
            )
        except DeepFlowError as error:
            self._log.warning("training_not_ordered", model=model, error=error.message)
        else:
            self._asked_for[model] = num, time.monotonic()

    # -------------------------------------------------------------------------------------------------------- training

    async def train(self, job: Job) -> None:
        """Runs a job of kind `predictor`; leaves its row final. Raises Later, Replaced, DeepFlowError."""
        assert self._records is not None
        if job.time_left_s() <= 0:
            await job.advance(JobStatus.EXPIRED)
            return
        model = str(orjson.loads(job.row.arguments)["model"])
        await job.advance(JobStatus.IN_PROGRESS)
        await self._read()
        if (self._lengths.created(model) or 0) >= job.row.created:  # another JE was faster
            report = orjson.dumps(self._reports[model]).decode()
            await job.advance(JobStatus.COMPLETED, result=report)
            return
        data = await asyncio.to_thread(self._records.latest, model, _TRAINING_BYTES)
        training = Training(
            task=f"{job.row.id}.{job.row.attempt}",
            job=job.row.id,
            je=self._je,
            kind=KIND,
            model=model,
            data=data,
        )
        ended = await self._trained(training, job)
        if ended.failure is not None:
            why = ended.failure
            raise from_code(why.code, why.message, param=why.param)
        if ended.result:
            LengthTable.from_bytes(ended.result)  # before all others load it
            entry = PredictorEntry(
                model=model, created=int(time.time()), table=ended.result, report=ended.report
            )
            await self._tables.put(model, entry)
            self._read_now.set()
        self._log.info(
            "predictor_trained", model=model, used=bool(ended.result), report=ended.report
        )
        await job.advance(JobStatus.COMPLETED, result=ended.report)

    async def _trained(self, training: Training, job: Job) -> TrainingEnded:
        """What a pod makes of it. Raises Later if none can now, or the one that could is gone."""
        wait = self._waits[training.task] = asyncio.get_running_loop().create_future()
        try:
            pod = await self._place(training)
            known = replace(training, data=b"")
            while job.time_left_s() > 0:
                with contextlib.suppress(TimeoutError):
                    return await asyncio.wait_for(asyncio.shield(wait), _ASK_S)
                heed_cancellation()
                # Whether it still works on it; an end that was lost on the way is told again.
                if not await self._ask(pod, known):
                    break
            raise Later(_LATER_S)
        finally:
            del self._waits[training.task]

    async def _place(self, training: Training) -> str:
        for pod in self._pods(training.model):
            if await self._ask(pod, training):
                return pod
        raise Later(_LATER_S)

    async def _ask(self, pod: str, training: Training) -> bool:
        """Whether the pod host has the training in hand, or done."""
        try:
            await self._bus.request(
                self._bus.subjects.task(pod), training, Accepted, timeout_s=_ASK_S
            )
        except (Overloaded, Unavailable, NotFound, DeadlineExceeded) as error:
            self._log.info("training_not_taken", pod=pod, error=error.message)
            return False
        return True

    # ---------------------------------------------------------------------------------------------------------- tables

    async def _read(self) -> None:
        try:
            entries = await self._tables.all(PredictorEntry)
        except DeepFlowError as error:  # those in use stand
            self._log.warning("predictors_unread", error=error.message)
            return
        self._lengths.keep_only([entry.model for entry in entries.values()])
        for entry in entries.values():
            try:
                if self._lengths.load(entry):
                    self._reports[entry.model] = _read_report(entry.report)
                    self._log.info("predictor_loaded", model=entry.model, report=entry.report)
            except DeepFlowError as error:
                self._log.warning("predictor_unusable", model=entry.model, error=error.message)


def _read_report(text: str) -> dict[str, Any]:
    """What is told of a table. It is for people: one that cannot be read is none."""
    try:
        report = orjson.loads(text)
    except orjson.JSONDecodeError:
        return {}
    return report if isinstance(report, dict) else {}
