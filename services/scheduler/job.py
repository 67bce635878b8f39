"""request -> job -> task (the paper, section 3): what a request set in motion, and how far it has come.

A request starts one or more jobs, a job one or more tasks; jobs wait for jobs and tasks for tasks of the same job.
A task is the smallest thing given to a TE. The one table `_LEGAL` says which steps a task may take; job and plan states
follow from their tasks and are never stored. Pure: this module must not know the bus, a clock, or where ids come from.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from shared.messages import TaskKind


class JobKind(StrEnum):
    """What a job is for. The first three come from `Request.kind`; a fine-tune is the last three, one after another."""

    CHAT = "chat"
    COMPLETION = "completion"
    CACHE = "cache"  # a prompt is computed so that its pages can be kept
    EMBEDDING = "embedding"
    BATCH = "batch"
    PREPROCESS = "preprocess"
    TRAIN = "train"
    EVALUATE = "evaluate"


class State(StrEnum):
    """Of a task, and, derived, of a job and a plan."""

    WAITING = "waiting"  # for what comes before it
    READY = "ready"  # for a TE
    RUNNING = "running"  # a TE has accepted it
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def terminal(self) -> bool:
        return self in _TERMINAL


_TERMINAL: Final = frozenset({State.DONE, State.FAILED, State.CANCELLED})
_LEGAL: Final[dict[State, frozenset[State]]] = {
    State.WAITING: frozenset({State.READY, State.CANCELLED}),
    State.READY: frozenset({State.RUNNING, State.FAILED, State.CANCELLED}),
    # Back to READY: the TE was lost, and the task may be repeated (tasks are idempotent by id).
    State.RUNNING: frozenset({State.READY, State.DONE, State.FAILED, State.CANCELLED}),
    State.DONE: frozenset(),
    State.FAILED: frozenset(),
    State.CANCELLED: frozenset(),
}


class IllegalTransition(Exception):
    """A task was asked to take a step that its state does not allow: a fault of the caller."""


@dataclass(slots=True, kw_only=True)
class Task:
    """One thing for one TE to do. `after` names tasks of the same job; `te` is set while and after it runs."""

    id: str
    kind: TaskKind
    after: tuple[str, ...] = ()
    state: State = State.WAITING
    te: str | None = None


@dataclass(slots=True, kw_only=True)
class Job:
    """Tasks that together serve one purpose. `after` names jobs of the same plan."""

    id: str
    kind: JobKind
    tasks: list[Task]
    after: tuple[str, ...] = ()

    @property
    def state(self) -> State:
        return _merge(task.state for task in self.tasks)


class Plan:
    """All jobs of one (request, attempt). Every change of a task's state goes through here.

    Raises ValueError at construction if an id repeats, a name in `after` is unknown, or the order has a cycle.
    """

    def __init__(self, request: str, attempt: int, jobs: list[Job]) -> None:
        self.request = request
        self.attempt = attempt
        self.jobs = jobs
        self._tasks: dict[str, Task] = {task.id: task for job in jobs for task in job.tasks}
        if not self._tasks or not all(job.tasks for job in jobs):
            raise ValueError("a plan has jobs, and every job has tasks")
        if len(self._tasks) != sum(len(job.tasks) for job in jobs):
            raise ValueError("task ids repeat")
        _check_order({job.id: job.after for job in jobs}, len(jobs))
        for job in jobs:
            _check_order({task.id: task.after for task in job.tasks}, len(job.tasks))
        self._release()

    @property
    def state(self) -> State:
        return _merge(job.state for job in self.jobs)

    def task(self, task: str) -> Task:
        return self._tasks[task]

    def ready(self) -> list[Task]:
        """The tasks that a TE may take now."""
        return [task for task in self._tasks.values() if task.state is State.READY]

    def start(self, task: str, te: str) -> None:
        """`te` accepted the task."""
        self._move(self._tasks[task], State.RUNNING)
        self._tasks[task].te = te

    def finish(self, task: str) -> None:
        """The task is done; those that waited only for it become ready."""
        self._move(self._tasks[task], State.DONE)
        self._release()

    def lose(self, task: str) -> None:
        """The task's TE is gone; another may take the task from the start."""
        if self._tasks[task].state is not State.RUNNING:
            raise IllegalTransition(f"task {task} does not run and cannot be lost")
        self._move(self._tasks[task], State.READY)
        self._tasks[task].te = None

    def fail(self, task: str) -> None:
        """The task failed for good, and with it the plan: whatever has not ended is cancelled."""
        self._move(self._tasks[task], State.FAILED)
        self.cancel()

    def cancel(self) -> list[Task]:
        """Cancels all that has not ended; returns the tasks that were running, whose TEs must be told."""
        running = [task for task in self._tasks.values() if task.state is State.RUNNING]
        for task in self._tasks.values():
            if not task.state.terminal:
                self._move(task, State.CANCELLED)
        return running

    def _move(self, task: Task, state: State) -> None:
        if state not in _LEGAL[task.state]:
            raise IllegalTransition(f"task {task.id}: {task.state} -> {state}")
        task.state = state

    def _release(self) -> None:
        done_jobs = {job.id for job in self.jobs if job.state is State.DONE}
        for job in self.jobs:
            if not done_jobs.issuperset(job.after):
                continue
            done = {task.id for task in job.tasks if task.state is State.DONE}
            for task in job.tasks:
                if task.state is State.WAITING and done.issuperset(task.after):
                    self._move(task, State.READY)


def serve(kind: JobKind, request: str, attempt: int) -> Plan:
    """The plan of a request that one TE serves: one job, one task."""
    job = f"{request}.{attempt}"
    tasks = [Task(id=f"{job}.0", kind=TaskKind.GENERATE)]
    return Plan(request, attempt, [Job(id=job, kind=kind, tasks=tasks)])


def split(kind: JobKind, request: str, attempt: int) -> Plan:
    """The plan of a request that one TE prefills and another decodes: one job, a pair of tasks."""
    job = f"{request}.{attempt}"
    prefill = Task(id=f"{job}.prefill", kind=TaskKind.PREFILL)
    decode = Task(id=f"{job}.decode", kind=TaskKind.DECODE, after=(prefill.id,))
    return Plan(request, attempt, [Job(id=job, kind=kind, tasks=[prefill, decode])])


def _merge(states: Iterable[State]) -> State:
    """The state of a whole: failed or cancelled as soon as a part is, done when all are, else the busiest part's."""
    seen = set(states)
    for state in (State.FAILED, State.CANCELLED, State.RUNNING, State.READY):
        if state in seen:
            return state
    return State.DONE if seen == {State.DONE} else State.WAITING


def _check_order(after: dict[str, tuple[str, ...]], num: int) -> None:
    if len(after) != num:
        raise ValueError("job or task ids repeat")
    placed: set[str] = set()

    def placeable() -> Iterator[str]:
        return (name for name, names in after.items() if placed.issuperset(names))

    while len(placed) < num:
        found = set(placeable()) - placed
        if not found:
            raise ValueError("`after` names something unknown or goes in a circle")
        placed |= found
