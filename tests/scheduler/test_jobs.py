"""Jobs on a real bus: each is run to its end by one JE at a time, whoever dies or is replaced meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from services.scheduler import jobs as jobs_module
from services.scheduler.jobs import MAX_LOST, Job, Jobs, Later, Runner
from shared import log
from shared.bus import Bus, Table
from shared.errors import InvalidRequest, Unavailable
from shared.job_messages import JobCall, JobRow, JobStatus
from tests.scheduler.players import eventually

LEASE_S = 0.5


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits comes back soon."""
    monkeypatch.setattr(jobs_module, "_AGAIN_S", 0.1)


@pytest.fixture
async def rows(bus: Bus) -> Table:
    """The table of jobs."""
    return await bus.table("jobs")


@contextlib.asynccontextmanager
async def je(bus: Bus, name: str, run: Runner, *, limit: int = 4) -> AsyncIterator[Jobs]:
    """A JE that runs jobs of the kind `batch`, and leaves in order."""
    async with asyncio.TaskGroup() as tasks:
        jobs = Jobs(await bus.work_queue(LEASE_S), await bus.table("jobs"), name, log.get())
        jobs.serve("batch", run, limit=limit)
        jobs.start(tasks)
        yield jobs
        await jobs.leave()


async def make(jobs: Jobs, id_: str = "j1") -> None:
    assert await jobs.create("batch", id_, tenant="t", arguments="{}", expires_s=60)


async def has(rows: Table, status: JobStatus, id_: str = "j1") -> None:
    async def there() -> bool:
        row = await rows.get(id_, JobRow)
        return row is not None and row.status is status

    await eventually(there)


async def complete(job: Job) -> None:
    """A runner with nothing to do."""
    await job.advance(JobStatus.IN_PROGRESS)
    await job.advance(JobStatus.COMPLETED, result="done")


async def test_a_job_runs_to_its_end_once(bus: Bus, rows: Table) -> None:
    """A job is taken, its statuses are stamped in order, and of two JEs one has run it."""
    runs: list[str] = []

    async def run(job: Job) -> None:
        runs.append(job.row.owner)
        await complete(job)

    async with je(bus, "je-1", run) as one, je(bus, "je-2", run):
        await make(one)
        await has(rows, JobStatus.COMPLETED)
        await asyncio.sleep(LEASE_S * 1.5)
    row = await rows.get("j1", JobRow)
    assert row is not None
    assert (row.result, row.attempt, len(runs)) == ("done", 1, 1)
    assert set(row.stamps) == {"in_progress", "completed"}


async def test_the_same_id_is_one_job(bus: Bus, rows: Table) -> None:
    """Making a job of an id that exists changes nothing."""
    async with je(bus, "je-1", complete) as jobs:
        await make(jobs)
        await has(rows, JobStatus.COMPLETED)
        before = await rows.get("j1", JobRow)
        assert not await jobs.create("batch", "j1", tenant="t", arguments="{}", expires_s=60)
        assert await rows.get("j1", JobRow) == before


async def test_a_job_of_a_je_that_leaves_goes_to_another_at_once(bus: Bus, rows: Table) -> None:
    """A JE that leaves gives its job back, which another goes on with before any lease is over."""
    begun = asyncio.Event()

    async def hang(job: Job) -> None:
        begun.set()
        await asyncio.Event().wait()

    async with je(bus, "je-1", hang) as first:
        await make(first)
        await begun.wait()
    row = await rows.get("j1", JobRow)
    assert row is not None
    assert (row.owner, row.attempt) == ("", 1)
    async with je(bus, "je-2", complete):
        await has(rows, JobStatus.COMPLETED)


async def test_a_replaced_owner_writes_nothing_and_stops(bus: Bus, rows: Table) -> None:
    """Once a row has another owner, what the first one writes is refused, and its runner is ended."""
    begun, ended = asyncio.Event(), asyncio.Event()
    held: list[Job] = []

    async def hang(job: Job) -> None:
        held.append(job)
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async with je(bus, "je-1", hang) as jobs:
        await make(jobs)
        await begun.wait()
        await rows.change("j1", JobRow, lambda row: replace(row, owner="other", attempt=2))
        with pytest.raises(jobs_module.Replaced):
            await held[0].record(num_done=7)
        await asyncio.wait_for(ended.wait(), 5)
    row = await rows.get("j1", JobRow)
    assert row is not None
    assert (row.owner, row.attempt, row.num_done) == ("other", 2, 0)


@pytest.mark.parametrize("error", [Later(0.1), Unavailable("the store is away")])
async def test_a_job_that_cannot_go_on_comes_back(bus: Bus, rows: Table, error: Exception) -> None:
    """Later, and what says the same, brings the job back until it is done; its attempts count."""
    tries: list[int] = []

    async def run(job: Job) -> None:
        tries.append(job.row.attempt)
        if len(tries) < 3:
            raise error
        await complete(job)

    async with je(bus, "je-1", run) as jobs:
        await make(jobs)
        await has(rows, JobStatus.COMPLETED)
    assert tries == [1, 2, 3]


@pytest.mark.parametrize(
    ("error", "code"), [(InvalidRequest("no"), "invalid_request"), (KeyError("bug"), "internal")]
)
async def test_a_job_that_fails_says_why(
    bus: Bus, rows: Table, error: Exception, code: str
) -> None:
    """Any other error ends the job, with its code in the row."""

    async def run(job: Job) -> None:
        raise error

    async with je(bus, "je-1", run) as jobs:
        await make(jobs)
        await has(rows, JobStatus.FAILED)
    row = await rows.get("j1", JobRow)
    assert row is not None
    assert [failure.code for failure in row.failures] == [code]


async def test_a_job_is_given_up_after_many_owners(bus: Bus, rows: Table) -> None:
    """A job that loses its owners is not run for ever; one that they gave back, however often, is."""
    queue = await bus.work_queue()
    row = JobRow(
        id="j1",
        kind="batch",
        tenant="t",
        status=JobStatus.IN_PROGRESS,
        created=0,
        expires=0,
        arguments="{}",
    )
    for one in (
        replace(row, owner="je-0", num_lost=MAX_LOST),
        replace(row, id="j2", attempt=1000, num_lost=MAX_LOST),
    ):
        await rows.create(one.id, one)
        await queue.put(one.kind, one.id, JobCall(id=one.id))

    async with je(bus, "je-1", complete):
        await has(rows, JobStatus.FAILED, "j1")
        await has(rows, JobStatus.COMPLETED, "j2")


async def test_what_a_tenant_wants_is_seen_by_the_runner(bus: Bus, rows: Table) -> None:
    """A row set to cancelling is seen within a lease, and stays so until a final status."""

    async def run(job: Job) -> None:
        await job.advance(JobStatus.IN_PROGRESS)
        while not job.is_cancelling:
            await asyncio.sleep(0.02)
        assert (await job.advance(JobStatus.FINALIZING)).status is JobStatus.CANCELLING
        await job.advance(JobStatus.CANCELLED)

    async with je(bus, "je-1", run) as jobs:
        await make(jobs)
        await has(rows, JobStatus.IN_PROGRESS)
        await rows.change("j1", JobRow, lambda row: replace(row, status=JobStatus.CANCELLING))
        await has(rows, JobStatus.CANCELLED)


async def test_no_more_jobs_are_taken_than_may_run(bus: Bus, rows: Table) -> None:
    """What is beyond one JE's limit waits in the queue, where another JE takes it."""
    first: list[str] = []
    second: list[str] = []
    go = asyncio.Event()

    def runner(seen: list[str]) -> Runner:
        async def run(job: Job) -> None:
            seen.append(job.row.id)
            await go.wait()
            await complete(job)

        return run

    async with je(bus, "je-1", runner(first), limit=2) as jobs:
        for number in range(4):
            await make(jobs, f"j{number}")
        await eventually(lambda: len(first) == 2)
        async with je(bus, "je-2", runner(second), limit=2):
            await eventually(lambda: len(second) == 2)
            assert sorted(first + second) == ["j0", "j1", "j2", "j3"]
            go.set()
            for number in range(4):
                await has(rows, JobStatus.COMPLETED, f"j{number}")


@pytest.mark.parametrize("attempt", [0, 3])
async def test_a_job_without_an_entry_gets_one(bus: Bus, rows: Table, attempt: int) -> None:
    """A row whose entry was never written, or was lost with the server's disk, is found by the sweep; one that is long
    over is removed by it."""
    row = JobRow(
        id="j1",
        kind="batch",
        tenant="t",
        status=JobStatus.VALIDATING,
        created=int(time.time()) - 120,
        expires=int(time.time()) + 60,
        arguments="{}",
        attempt=attempt,
        owner="je-0" if attempt else "",
    )
    await rows.create("j1", row)
    await rows.create("old", replace(row, id="old", status=JobStatus.COMPLETED, created=0))
    async with je(bus, "je-1", complete) as jobs:
        await jobs.sweep(time.time())
        await has(rows, JobStatus.COMPLETED)
    assert await rows.get("old", JobRow) is None


async def test_rows_of_one_tenant_are_bounded(
    bus: Bus, rows: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tenant whose jobs end fast does not fill the table: of those that are over the newest are kept."""
    monkeypatch.setattr(jobs_module, "_KEEP_ROWS", 2)
    now = int(time.time())
    for tenant, id_, age in (("a", "a1", 3), ("a", "a2", 2), ("a", "a3", 1), ("b", "b1", 9)):
        row = JobRow(
            id=id_,
            kind="batch",
            tenant=tenant,
            status=JobStatus.FAILED,
            created=now - age,
            expires=now,
            arguments="{}",
        )
        await rows.create(id_, row)
    async with je(bus, "je-1", complete) as jobs:
        await jobs.sweep(now)
    assert set(await rows.all(JobRow)) == {"a2", "a3", "b1"}


async def test_the_sweep_does_not_take_a_job_from_its_owner(bus: Bus, rows: Table) -> None:
    """A job that somebody has in hand has its entry, and gets no other one."""
    attempts: list[int] = []
    go = asyncio.Event()

    async def run(job: Job) -> None:
        attempts.append(job.row.attempt)
        await go.wait()
        await complete(job)

    async with je(bus, "je-1", run) as jobs, je(bus, "je-2", run):
        await make(jobs)
        await eventually(lambda: attempts == [1])
        await jobs.sweep(time.time() + 600)
        await asyncio.sleep(0.2)
        go.set()
        await has(rows, JobStatus.COMPLETED)
    assert attempts == [1]
