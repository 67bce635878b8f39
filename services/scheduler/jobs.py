"""The jobs that this JE runs: it takes an entry of the work queue, owns the job's row, and keeps both until the end.

Life of a job: whoever takes its entry becomes the row's owner with the next attempt, by compare and set; holds the
entry while the kind's runner works; and leaves a final row and no entry. A JE that dies stops holding, and the entry
comes to another, whose attempt shuts out what the dead one might still write. A runner that cannot go on now raises
`Later` (or an error that says the same), and the job comes back. This module must not know what a kind of job does.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

from shared.bus import Table, WorkQueue
from shared.errors import DeepFlowError, Internal, Overloaded, Unavailable
from shared.job_messages import JobCall, JobRow, JobStatus
from shared.jobs import FINAL, moved, submit
from shared.log import Logger
from shared.messages import Failure
from shared.queue import Entry
from shared.table import heed_cancellation

MAX_LOST: Final = 20  # owners that a job may lose: one that kills its JE must not go round for ever
KEEP_S: Final = 30 * 86_400.0  # how long the row of a job that is over can be looked at
_TAKE_S: Final = 5.0
_AGAIN_S: Final = 5.0
_SWEEP_S: Final = 60.0
_KEEP_ROWS: Final = 1000  # of one tenant's jobs that are over

Runner = Callable[["Job"], Awaitable[None]]


class Replaced(Exception):
    """The job has another owner by now, or none, or is gone: stop, and leave its row alone."""


class Later(Exception):
    """The job cannot go on now; it comes back after `after_s`, maybe to another JE."""

    def __init__(self, after_s: float) -> None:
        super().__init__(after_s)
        self.after_s = after_s


class Job:
    """A job that this JE owns. `row` is as of the last look, which is never older than a few seconds."""

    def __init__(self, table: Table, row: JobRow) -> None:
        self.row = row
        self._table = table
        self._mine = (row.owner, row.attempt)
        self._looking = asyncio.Lock()  # or an answer that was slow would bring an older row back

    @property
    def is_cancelling(self) -> bool:
        """Whether its tenant wants it to end."""
        return self.row.status is JobStatus.CANCELLING

    def time_left_s(self) -> float:
        """Until it expires; not positive afterwards."""
        return self.row.expires - time.time()

    async def refresh(self) -> None:
        """Look at the row again. Raises Replaced, Unavailable."""
        async with self._looking:
            row = await self._table.get(self.row.id, JobRow)
            if row is None:
                raise Replaced
            self.row = self._own(row)

    async def change(self, step: Callable[[JobRow], JobRow]) -> JobRow:
        """Replace the row by `step(row)`, for which it must still be ours. Raises Replaced, Unavailable."""
        async with self._looking:
            row = await self._table.change(self.row.id, JobRow, lambda row: step(self._own(row)))
            if row is None:
                raise Replaced
            self.row = row
            return row

    async def record(self, **fields: Any) -> JobRow:
        """Set some fields of the row: progress, results. Raises as `change` does."""
        return await self.change(lambda row: replace(row, **fields))

    async def advance(self, status: JobStatus, **fields: Any) -> JobRow:
        """On to the next status; a job that is being cancelled stays so until a final one. Raises as `change` does."""

        def step(row: JobRow) -> JobRow:
            if row.status is JobStatus.CANCELLING and status not in FINAL:
                return replace(row, **fields)
            return moved(row, status, time.time(), **fields)

        return await self.change(step)

    async def fail(self, error: DeepFlowError) -> JobRow:
        """End it with an error. Raises as `change` does."""
        failed = Failure(code=error.code, message=error.message, param=error.param)
        return await self.advance(JobStatus.FAILED, failures=[*self.row.failures, failed])

    def _own(self, row: JobRow) -> JobRow:
        if (row.owner, row.attempt) != self._mine:
            raise Replaced
        return row


@dataclass(frozen=True, slots=True)
class _Kind:
    run: Runner
    limit: int


class Jobs:
    """All jobs of one JE. Name the kinds with `serve`, then `start`; `leave` hands back what still runs."""

    def __init__(self, queue: WorkQueue, table: Table, je: str, log: Logger) -> None:
        self._queue = queue
        self._table = table
        self._je = je
        self._log = log
        self._kinds: dict[str, _Kind] = {}
        self._takers: list[asyncio.Task[None]] = []
        self._running: dict[str, asyncio.Task[None]] = {}

    def __len__(self) -> int:
        return len(self._running)

    def serve(self, kind: str, run: Runner, *, limit: int) -> None:
        """Run jobs of a kind, at most `limit` at once. `run` leaves the row final, or raises: `Later`, Unavailable and
        Overloaded bring the job back, any other error fails it."""
        self._kinds[kind] = _Kind(run, limit)

    def start(self, tasks: asyncio.TaskGroup) -> None:
        """Take jobs from now on."""
        for kind in self._kinds:
            self._takers.append(tasks.create_task(self._take(kind, tasks), name=f"take-{kind}"))
        self._takers.append(tasks.create_task(self._sweep(), name="sweep-jobs"))

    async def create(
        self, kind: str, id_: str, *, tenant: str, arguments: str, expires_s: float
    ) -> bool:
        """Make a job; False if there is one of that id. Raises Overloaded, Unavailable."""
        made = await submit(
            self._queue,
            self._table,
            kind,
            id_,
            tenant=tenant,
            arguments=arguments,
            expires_s=expires_s,
        )
        return made is not None

    async def leave(self) -> None:
        """Take nothing more, and give what runs back to the queue, where others find it at once."""
        await _end(self._takers)
        await self._queue.close()  # or what is given back would come here again
        await _end(list(self._running.values()))

    # -------------------------------------------------------------------------------------------------------- taking

    async def _take(self, kind: str, tasks: asyncio.TaskGroup) -> None:
        slots = asyncio.Semaphore(self._kinds[kind].limit)
        while True:
            async with slots:  # not taken before there is room: another JE may have it
                entry = await self._next(kind)
            heed_cancellation()
            if entry is None or (job := await self._own(entry)) is None:
                continue
            await slots.acquire()
            task = tasks.create_task(self._run(job, entry), name=f"job-{job.row.id}")
            self._running[job.row.id] = task
            task.add_done_callback(partial(self._ended, job.row.id, slots))

    def _ended(self, id_: str, slots: asyncio.Semaphore, task: asyncio.Task[None]) -> None:
        slots.release()
        if self._running.get(id_) is task:
            del self._running[id_]

    async def _next(self, kind: str) -> Entry[JobCall] | None:
        try:
            return await self._queue.take(kind, JobCall, _TAKE_S)
        except Unavailable as error:
            self._log.warning("queue_unread", kind=kind, error=error.message)
            await asyncio.sleep(1.0)
            return None

    async def _own(self, entry: Entry[JobCall]) -> Job | None:
        """The job of an entry, which is ours from here on; None if nothing is to be done, or not now."""

        def step(row: JobRow) -> JobRow:
            if row.status in FINAL:
                raise Replaced
            lost = row.num_lost + bool(row.owner)  # who gives a job back leaves no owner
            return replace(row, owner=self._je, attempt=row.attempt + 1, num_lost=lost)

        try:
            try:
                row = await self._table.change(entry.message.id, JobRow, step)
            except Replaced:
                row = None
            if row is None:
                await entry.done()
                return None
        except Unavailable as error:
            self._log.warning("job_not_taken", id=entry.message.id, error=error.message)
            return None
        return Job(self._table, row)

    # ------------------------------------------------------------------------------------------------------- running

    async def _run(self, job: Job, entry: Entry[JobCall]) -> None:
        row = job.row
        self._log.info("job_taken", id=row.id, kind=row.kind, attempt=row.attempt)
        later_s: float | None = None
        failure: DeepFlowError | None = None
        lost = False
        try:
            try:
                async with asyncio.TaskGroup() as group:
                    keeper = group.create_task(self._keep(job, entry))
                    if row.num_lost > MAX_LOST:
                        raise Internal(f"given up: it has lost {MAX_LOST} owners")
                    await self._kinds[row.kind].run(job)
                    keeper.cancel()
            except* Replaced:
                lost = True
            except* Later as group_:
                later_s = min(
                    error.after_s for error in _leaves(group_) if isinstance(error, Later)
                )
            except* (Unavailable, Overloaded) as group_:
                later_s = _AGAIN_S
                self._log.warning("job_postponed", id=row.id, error=str(_leaves(group_)[0]))
            except* DeepFlowError as group_:
                failure = next(e for e in _leaves(group_) if isinstance(e, DeepFlowError))
            except* Exception:
                self._log.exception("job_broken", id=row.id)
                failure = Internal("something went wrong here; see the server's log")
        except asyncio.CancelledError:
            await self._settle(job, entry, 0.0, None)
            raise
        if lost:
            self._log.warning("job_lost", id=row.id)  # its entry is the other one's to settle
        else:
            await self._settle(job, entry, later_s, failure)

    async def _settle(
        self, job: Job, entry: Entry[JobCall], later_s: float | None, failure: DeepFlowError | None
    ) -> None:
        """Leave row and entry as the next owner, or nobody, shall find them."""
        try:
            if failure is not None:
                await job.fail(failure)
            if later_s is None and job.row.status in FINAL:
                await entry.done()
                self._log.info("job_ended", id=job.row.id, status=str(job.row.status))
            else:
                await job.record(owner="")
                await entry.release(_AGAIN_S if later_s is None else later_s)
        except Replaced:
            self._log.warning("job_lost", id=job.row.id)
        except Unavailable as error:  # the lease ends by itself, and the next owner settles it
            self._log.warning("job_unsettled", id=job.row.id, error=error.message)

    async def _keep(self, job: Job, entry: Entry[JobCall]) -> None:
        """Hold entry and row as long as the runner runs; what the tenant wants meanwhile is seen here."""
        while True:
            await asyncio.sleep(self._queue.lease_s / 4)
            heed_cancellation()
            try:
                await entry.hold()
                await job.refresh()
            except Unavailable as error:
                self._log.warning("job_unheld", id=job.row.id, error=error.message)

    # ------------------------------------------------------------------------------------------------------ sweeping

    async def _sweep(self) -> None:
        """Give a new entry to jobs that have lost theirs, and drop rows that are long over, or too many."""
        while True:
            await asyncio.sleep(_SWEEP_S)
            heed_cancellation()
            try:
                await self.sweep(time.time())
            except DeepFlowError as error:
                self._log.warning("jobs_unswept", error=error.message)

    async def sweep(self, now: float) -> None:
        """One round of it. Raises Overloaded, Unavailable."""
        num_over: Counter[str] = Counter()
        rows = await self._table.all(JobRow)
        for id_, row in sorted(rows.items(), key=lambda item: item[1].created, reverse=True):
            if row.status not in FINAL:
                await self._queue.put(row.kind, id_, JobCall(id=id_))
                continue
            num_over[row.tenant] += 1
            age = now - max(row.stamps.values(), default=row.created)
            if age > KEEP_S or num_over[row.tenant] > _KEEP_ROWS:
                await self._table.delete(id_)


async def _end(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    found: list[BaseException] = []
    for error in group.exceptions:
        found += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return found
