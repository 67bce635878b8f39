"""The predictor's way through a real bus: recorded, trained in a pod host's child process, loaded by every executor."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random

import psutil
import pytest

from services.scheduler import predictor
from services.scheduler.jobs import Jobs
from services.scheduler.lengths import PRIOR, Lengths
from services.scheduler.predictor import KIND, Predictors
from services.scheduler.settings import SchedulerSettings
from services.worker import trainer as trainer_module
from services.worker.trainer import Trainer
from services.worker.training import learn
from shared.bus import Bus
from shared.config import Settings
from shared.errors import NotFound, Overloaded, Unavailable
from shared.job_messages import JobRow, JobStatus, PredictorEntry, Training, TrainingEnded
from shared.messages import Accepted, Sampling, TaskEnded
from shared.service import Service
from tests.nats_server import NatsServer
from tests.scheduler.players import (
    Client,
    Te,
    eventually,
    process,
    publish_model,
    status,
    wait_ready,
)
from tests.scheduler.prompts import ended, orders, records
from tests.worker.test_training import packed


class Over(Exception):
    """Ends the group of tasks of a test."""


@pytest.fixture
async def tasks() -> AsyncIterator[asyncio.TaskGroup]:
    """A group for what runs for ever, cancelled at the end."""
    try:
        async with asyncio.TaskGroup() as group:
            yield group
            raise Over
    except* Over:
        pass


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits of seconds take a tenth of one."""
    for name in ("_ASK_S", "_LATER_S", "_WRITE_S"):
        monkeypatch.setattr(predictor, name, 0.1)


class Executor:
    """The part of a JE that is about lengths."""

    def __init__(
        self, bus: Bus, name: str, folder: Path, pods: list[str], *, records: bool = True
    ) -> None:
        self.bus = bus
        self.name = name
        self.folder = folder
        self.pods = pods
        self.records = records
        self.lengths = Lengths()

    async def start(self, tasks: asyncio.TaskGroup) -> None:
        """Listens, and takes jobs if it records."""
        env = {"DEEPFLOW_HOME": str(self.folder), "DEEPFLOW_PREDICTOR_EVERY": "400"}
        if self.records:
            env["DEEPFLOW_RECORD"] = "lengths"
        service = Service("scheduler", SchedulerSettings.load(env), self.bus, tasks, self.name)
        queue, rows = await self.bus.work_queue(), await self.bus.table("jobs")
        self.jobs = Jobs(queue, rows, self.name, service.log)
        tables = await self.bus.table("predictors")
        self.predictors = Predictors(
            service, self.lengths, self.jobs, tables, pods=lambda model: self.pods
        )
        await self.bus.listen(
            self.bus.subjects.events(self.name), (TaskEnded, TrainingEnded), self._on_event
        )
        await self.predictors.start(tasks)
        self.jobs.start(tasks)

    def _on_event(self, event: object) -> None:
        if isinstance(event, TrainingEnded):
            self.predictors.on_trained(event)

    def serve(self, num: int) -> None:
        """So many requests, from admission to their end."""
        for one, length in orders(Random(1), num):
            self.predictors.on_accepted(one)
            self.predictors.on_ended(ended(one.request, length))


async def pod(bus: Bus, tasks: asyncio.TaskGroup, name: str) -> Trainer:
    """A pod host's trainer, at work."""
    trainer = Trainer(Service("pod", Settings.load({}), bus, tasks, name), os.environ)  # type: ignore[arg-type]
    await trainer.open()
    return trainer


async def test_recorded_traffic_becomes_a_table_that_every_executor_loads(
    bus: Bus, tasks: asyncio.TaskGroup, tmp_path: Path
) -> None:
    """After enough answers a job is made, trained and done; another JE that only reads predicts with the table."""
    await pod(bus, tasks, "pod-1")
    recording = Executor(bus, "je-1", tmp_path, ["pod-1"])
    await recording.start(tasks)
    recording.serve(399)
    await eventually(lambda: bool(list(tmp_path.glob("traffic/m/*.jsonl"))))
    assert await recording.jobs._table.all(JobRow) == {}
    recording.serve(1)
    await eventually(lambda: recording.lengths.created("m") is not None, within_s=30)

    async def done() -> bool:
        [row] = (await recording.jobs._table.all(JobRow)).values()
        return row.status is JobStatus.COMPLETED

    await eventually(done)
    [row] = (await recording.jobs._table.all(JobRow)).values()
    report = json.loads(row.result)
    assert row.kind == KIND
    assert report["num_records"] == 400
    assert report["accuracy"] > report["majority_accuracy"]
    reading = Executor(bus, "je-2", tmp_path, [], records=False)
    await reading.start(tasks)
    assert reading.lengths.created("m") == recording.lengths.created("m")
    assert reading.predictors.status()["m"]["accuracy"] == report["accuracy"]
    near = [
        abs(reading.lengths.predict(one).mid - length) <= 192
        for one, length in orders(Random(9), 100)
    ]
    assert sum(near) > 70


async def test_a_pod_that_vanishes_costs_a_while(
    bus: Bus, tasks: asyncio.TaskGroup, tmp_path: Path
) -> None:
    """A training whose pod host is gone is given to another, and its job is done once."""
    taken: list[Training] = []

    async def take(training: Training) -> Accepted:
        taken.append(training)
        return Accepted(request=training.task, attempt=0, by="pod-0")

    gone = await bus.serve(bus.subjects.task("pod-0"), (Training,), take)
    executor = Executor(bus, "je-1", tmp_path, ["pod-0", "pod-1"])
    await executor.start(tasks)
    executor.serve(400)
    await eventually(lambda: len(taken) > 1)
    assert taken[0].data
    assert not taken[1].data  # it only asks whether the pod is still at it
    await pod(bus, tasks, "pod-1")
    await gone.stop()
    await eventually(lambda: executor.lengths.created("m") is not None, within_s=30)


async def test_a_damaged_table_is_not_put_where_others_load_it(
    bus: Bus, tasks: asyncio.TaskGroup, tmp_path: Path
) -> None:
    """What a pod host sends must be a table, or the job fails and the former predictor stays."""

    async def take(training: Training) -> Accepted:
        rubbish = TrainingEnded(task=training.task, job=training.job, result=b"rubbish")
        await bus.publish(bus.subjects.events(training.je), rubbish)
        return Accepted(request=training.task, attempt=0, by="pod-1")

    await bus.serve(bus.subjects.task("pod-1"), (Training,), take)
    executor = Executor(bus, "je-1", tmp_path, ["pod-1"])
    await executor.start(tasks)
    executor.serve(400)

    async def failed() -> bool:
        rows = (await executor.jobs._table.all(JobRow)).values()
        return [row.status for row in rows] == [JobStatus.FAILED]

    await eventually(failed)
    assert await (await bus.table("predictors")).all(PredictorEntry) == {}
    assert executor.lengths.created("m") is None


async def test_what_several_executors_order_at_once_is_trained_once(
    bus: Bus, tasks: asyncio.TaskGroup, tmp_path: Path
) -> None:
    """The job that finds a table newer than itself is done: the same answers are not learned from again."""
    table = learn(records(Random(1), 250))[0].to_bytes()
    begun: list[str] = []  # jobs
    over = asyncio.Event()

    async def take(training: Training) -> Accepted:
        if not begun:
            begun.append(training.job)
        if training.job not in begun:
            raise Overloaded("another training is under way", retry_after_s=1.0)
        if over.is_set():
            ended = TrainingEnded(task=training.task, job=training.job, result=table)
            await bus.publish(bus.subjects.events(training.je), ended)
        return Accepted(request=training.task, attempt=0, by="pod-1")

    await bus.serve(bus.subjects.task("pod-1"), (Training,), take)
    executors = [Executor(bus, f"je-{number}", tmp_path, ["pod-1"]) for number in range(2)]
    for executor in executors:
        await executor.start(tasks)
        executor.serve(400)

    async def both(*status: JobStatus) -> bool:
        rows = (await executors[0].jobs._table.all(JobRow)).values()
        return len(rows) == 2 and all(row.status in status for row in rows)

    await eventually(lambda: both(JobStatus.IN_PROGRESS))
    await eventually(lambda: bool(begun))
    over.set()
    await eventually(lambda: both(JobStatus.COMPLETED), within_s=20)
    assert len(begun) == 1


async def test_an_executor_bears_what_others_put_into_the_table(
    bus: Bus, tasks: asyncio.TaskGroup, tmp_path: Path
) -> None:
    """An entry that is no table is left out, a report that is none is not told; the others are read."""
    table = learn(records(Random(1), 250))[0].to_bytes()
    entries = await bus.table("predictors")
    for model, data, report in (
        ("rubbish", b"rubbish", "{}"),
        ("short", table[:-1], "{}"),
        ("unreported", table, "{no json"),
        ("oddly-reported", table, "[1]"),
        ("good", table, '{"accuracy": 0.5}'),
    ):
        await entries.put(model, PredictorEntry(model=model, created=7, table=data, report=report))
    reading = Executor(bus, "je-1", tmp_path, [], records=False)
    await reading.start(tasks)
    assert reading.predictors.status() == {
        "unreported": {"created": 7},
        "oddly-reported": {"created": 7},
        "good": {"created": 7, "accuracy": 0.5},
    }
    assert reading.lengths.created("rubbish") is None


async def test_a_trainer_does_one_thing_at_a_time_and_each_once(
    bus: Bus, tasks: asyncio.TaskGroup
) -> None:
    """A known training is not begun again, its end is told again, another must wait, an unknown one is unknown."""
    ends: list[TrainingEnded] = []
    await bus.listen(bus.subjects.events("je-1"), (TrainingEnded,), ends.append)
    await pod(bus, tasks, "pod-1")

    async def ask(task: str, data: bytes) -> Accepted:
        order = Training(task=task, job="j", je="je-1", kind=KIND, model="m", data=data)
        return await bus.request(bus.subjects.task("pod-1"), order, Accepted, timeout_s=5)

    data = packed(records(Random(1), 250))
    await ask("j.1", data)
    await ask("j.1", data)
    await ask("j.1", b"")
    with pytest.raises(Overloaded):
        await ask("j.2", data)
    with pytest.raises(NotFound):
        await ask("j.3", b"")
    await eventually(lambda: len(ends) == 1, within_s=30)
    await ask("j.1", b"")
    await eventually(lambda: len(ends) == 2)
    assert ends[0] == ends[1]
    assert ends[0].failure is None


async def test_a_killed_training_is_worth_another_try_and_a_leaving_pod_takes_none(
    bus: Bus, tasks: asyncio.TaskGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 of the child is told as unavailable, and so is one that takes too long; when the pod host leaves, the
    child ends with it."""
    ends: list[TrainingEnded] = []
    await bus.listen(bus.subjects.events("je-1"), (TrainingEnded,), ends.append)
    trainer = await pod(bus, tasks, "pod-1")

    def children() -> list[psutil.Process]:
        found = []
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.Error):  # it has ended meanwhile
                if "services.worker.training" in child.cmdline():
                    found.append(child)
        return found

    async def ask(task: str) -> None:
        data = packed(records(Random(1), 250))
        order = Training(task=task, job="j", je="je-1", kind=KIND, model="m", data=data)
        await bus.request(bus.subjects.task("pod-1"), order, Accepted, timeout_s=5)

    await ask("j.1")
    await eventually(lambda: len(children()) == 1)
    children()[0].kill()
    await eventually(lambda: len(ends) == 1)
    assert ends[0].failure is not None
    assert ends[0].failure.code == Unavailable.code
    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "TIMEOUT_S", 0.05)
        await ask("j.2")
        await eventually(lambda: len(ends) == 2)
    assert (ends[1].task, ends[1].failure and ends[1].failure.code) == ("j.2", Unavailable.code)
    assert children() == []
    await ask("j.3")
    await eventually(lambda: len(children()) == 1)
    await trainer.leave()
    assert children() == []


async def test_an_executor_predicts_what_it_has_seen_and_records_it_if_told_to(
    nats: NatsServer, bus: Bus, tmp_path: Path
) -> None:
    """A JE process: each task says how much is expected, as earlier answers tell; a drain leaves all lines on disk."""
    await publish_model(bus)
    env = {"DEEPFLOW_HOME": str(tmp_path), "DEEPFLOW_RECORD": "lengths"}
    async with (
        process("scheduler", nats, **env) as (child, je),
        Te(bus, "te-1") as te,
        Client(bus) as client,
    ):
        await wait_ready(bus, "scheduler", je)
        await eventually(lambda: known(bus, je))
        for number in range(9):
            await client.submit(f"r{number}", sampling=Sampling(max_tokens=999, seed=1))
            await te.ended(te.tasks[-1], "stop")
        assert te.tasks[0].expected_output == PRIOR.mid
        assert te.tasks[-1].expected_output == 1  # as those before: the played TE says so
        await eventually(lambda: idle(bus, je))  # it has heard of the last end
        child.terminate()
        assert await child.wait() == 0
    lines = [path.read_bytes() for path in tmp_path.glob("traffic/*/*")]
    assert b"".join(lines).count(b"LengthRecord") == 9


async def idle(bus: Bus, je: str) -> bool:
    """Whether the JE has no request in hand."""
    return bool((await status(bus, "scheduler", je))["active"] == 0)


async def known(bus: Bus, je: str) -> bool:
    """Whether the JE knows a TE that is ready."""
    return [te["state"] for te in (await status(bus, "scheduler", je))["tes"]] == ["ready"]
