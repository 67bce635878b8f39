"""All that a JE does for jobs nobody waits on, put together: the kinds it runs, the lines of batches, the sweeping.

This module must not hold any logic of a job.
"""

from __future__ import annotations

import asyncio
import time
from random import Random
from typing import Final

from services.scheduler.batches import Batches
from services.scheduler.jobs import Jobs
from services.scheduler.lines import Lines
from services.scheduler.outcomes import forget, unfinished
from services.scheduler.settings import SchedulerSettings
from shared.bus import Table
from shared.errors import DeepFlowError
from shared.job_messages import JobRow
from shared.jobs import FINAL
from shared.service import Service
from shared.store.base import Store
from shared.store.files import Files
from shared.table import heed_cancellation

_SWEEP_S: Final = 600.0


class Background:
    """Make it with `open`. Other kinds of jobs are added to `jobs` before `start`."""

    def __init__(
        self,
        service: Service[SchedulerSettings],
        jobs: Jobs,
        rows: Table,
        store: Store,
        files: Files,
    ) -> None:
        settings = service.settings
        self.jobs = jobs
        self._service = service
        self._rows = rows
        self._store = store
        self._files = files
        self._lines = Lines(service.bus)
        metrics = service.metrics
        answers = metrics.counter(
            "deepflow_scheduler_batch_lines_total",
            "Lines of batches by how they ended.",
            ["status"],
        )
        self._batches = Batches(
            store,
            files,
            self._lines,
            service.log,
            ended=lambda status: answers.labels(f"{status // 100}xx").inc(),
            max_in_flight=settings.batch_max_in_flight,
            random=Random(settings.seed),
        )
        jobs.serve("batch", self._batches.run, limit=settings.num_batches)
        metrics.gauge("deepflow_scheduler_jobs", "Jobs that run here.").set_function(
            lambda: len(jobs)
        )
        metrics.gauge(
            "deepflow_scheduler_batch_lines_in_flight", "Lines of batches in flight from here."
        ).set_function(lambda: self._batches.num_in_flight)

    @classmethod
    async def open(cls, service: Service[SchedulerSettings]) -> Background:
        """Opens tables, queue and store. Raises Unavailable; ConfigError if the store's library is missing."""
        bus = service.bus
        rows = await bus.table("jobs")
        store = service.settings.store.open()
        queue = await bus.work_queue(service.settings.job_lease_s)
        jobs = Jobs(queue, rows, service.id, service.log)
        return cls(service, jobs, rows, store, Files(store, await bus.table("files")))

    async def start(self) -> None:
        """Take jobs from now on."""
        tasks = self._service.tasks
        await self._lines.start(tasks)
        self.jobs.start(tasks)
        tasks.create_task(self._sweep_loop(), name="sweep-files")

    async def leave(self) -> None:
        """Give back what runs."""
        await self.jobs.leave()

    async def _sweep_loop(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_S)
            heed_cancellation()
            try:
                await self.sweep(time.time())
            except DeepFlowError as error:
                self._service.log.warning("files_unswept", error=error.message)

    async def sweep(self, now: float) -> None:
        """Remove expired files, and outcomes of batches that are over. Raises Unavailable."""
        await self._files.sweep(now)
        for batch in await unfinished(self._store):
            row = await self._rows.get(batch, JobRow)
            if row is None or row.status in FINAL:
                await forget(self._store, batch)
