"""request -> job -> task: states, legal transitions, and that the types carry every workload of the paper."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.scheduler.job import IllegalTransition, Job, JobKind, Plan, State, Task, serve, split
from shared.messages import TaskKind


def test_chat_is_one_job_with_one_task() -> None:
    """A chat's plan has one GENERATE task, ready at once, and is done when that is."""
    plan = serve(JobKind.CHAT, "r", 2)
    assert plan.attempt == 2
    assert [task.kind for task in plan.ready()] == [TaskKind.GENERATE]
    assert plan.state is State.READY
    plan.start("r.2.0", "te-1")
    assert plan.state is State.RUNNING
    assert plan.task("r.2.0").te == "te-1"
    plan.finish("r.2.0")
    assert plan.state is State.DONE


P, D = "r.1.prefill", "r.1.decode"


def pd_pair() -> Plan:
    """A chat on a disaggregated pair."""
    return split(JobKind.CHAT, "r", 1)


def test_decode_waits_for_prefill() -> None:
    """A prefill/decode pair is one job of two tasks, the second ready only when the first is done."""
    plan = pd_pair()
    assert [task.id for task in plan.ready()] == [P]
    with pytest.raises(IllegalTransition):
        plan.start(D, "te-2")
    plan.start(P, "te-1")
    assert plan.ready() == []
    plan.finish(P)
    assert [task.id for task in plan.ready()] == [D]
    plan.start(D, "te-2")
    plan.finish(D)
    assert plan.state is State.DONE


def test_lost_te_gives_the_task_back() -> None:
    """A task whose TE is lost is ready again, and what waits for it keeps waiting."""
    plan = pd_pair()
    plan.start(P, "te-1")
    plan.lose(P)
    assert [task.id for task in plan.ready()] == [P]
    assert plan.task(P).te is None
    assert plan.task(D).state is State.WAITING


def fine_tune() -> Plan:
    """A fine-tune: three jobs in a row; the evaluation is two tasks side by side."""
    return Plan(
        "r",
        1,
        [
            Job(id="pre", kind=JobKind.PREPROCESS, tasks=[Task(id="a", kind=TaskKind.TRAIN)]),
            Job(
                id="train",
                kind=JobKind.TRAIN,
                tasks=[Task(id="b", kind=TaskKind.TRAIN)],
                after=("pre",),
            ),
            Job(
                id="eval",
                kind=JobKind.EVALUATE,
                tasks=[
                    Task(id="c", kind=TaskKind.GENERATE),
                    Task(id="d", kind=TaskKind.GENERATE),
                ],
                after=("train",),
            ),
        ],
    )


def test_fine_tune_runs_its_jobs_one_after_another() -> None:
    """Preprocessing, training and evaluation become ready in turn, tasks of one job together."""
    plan = fine_tune()
    order = []
    while plan.state is not State.DONE:
        ready = [task.id for task in plan.ready()]
        order.append(ready)
        for task in ready:
            plan.start(task, "te")
        for task in ready:
            plan.finish(task)
    assert order == [["a"], ["b"], ["c", "d"]]


def test_failure_cancels_what_has_not_ended() -> None:
    """A failed task fails its plan: what waited is cancelled, what was done stays done."""
    plan = fine_tune()
    plan.start("a", "te")
    plan.finish("a")
    plan.start("b", "te")
    plan.fail("b")
    states = [plan.task(name).state for name in "abcd"]
    assert states == [State.DONE, State.FAILED, State.CANCELLED, State.CANCELLED]
    assert plan.state is State.FAILED


def test_cancel_names_the_running_tasks() -> None:
    """Cancelling a plan returns the tasks whose TEs must be told, and is final."""
    plan = pd_pair()
    plan.start(P, "te-1")
    assert [task.te for task in plan.cancel()] == ["te-1"]
    assert plan.cancel() == []
    assert plan.state is State.CANCELLED
    with pytest.raises(IllegalTransition):
        plan.finish(P)


@pytest.mark.parametrize(
    "jobs",
    [
        [],
        [Job(id="j", kind=JobKind.CHAT, tasks=[])],
        [
            Job(
                id="j",
                kind=JobKind.CHAT,
                tasks=[Task(id="a", kind=TaskKind.GENERATE, after=("b",))],
            )
        ],
        [
            Job(
                id="j",
                kind=JobKind.CHAT,
                tasks=[Task(id="a", kind=TaskKind.GENERATE, after=("a",))],
            )
        ],
        [Job(id="j", kind=JobKind.CHAT, tasks=[Task(id="a", kind=TaskKind.GENERATE)] * 2)],
        [
            Job(id=j, kind=JobKind.CHAT, tasks=[Task(id=j, kind=TaskKind.TRAIN)], after=(k,))
            for j, k in ("ab", "ba")
        ],
    ],
)
def test_impossible_plans_are_refused(jobs: list[Job]) -> None:
    """Empty plans, repeated ids, unknown names and circles raise ValueError."""
    with pytest.raises(ValueError, match=r"job|task|after"):
        Plan("r", 1, jobs)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["start", "finish", "lose", "fail", "cancel"]), st.sampled_from("abcd")
        ),
        max_size=30,
    )
)
def test_any_sequence_of_steps_keeps_the_order(steps: list[tuple[str, str]]) -> None:
    """Whatever is tried, no task runs before all it waits for is done, and ended tasks never change again."""
    plan = fine_tune()
    before = {"a": "", "b": "a", "c": "ab", "d": "ab"}
    for verb, name in steps:
        ended = {n: plan.task(n).state for n in "abcd" if plan.task(n).state.terminal}
        try:
            if verb == "cancel":
                plan.cancel()
            elif verb == "start":
                plan.start(name, "te")
            else:
                getattr(plan, verb)(name)
        except IllegalTransition:
            pass
        for n in "abcd":
            if plan.task(n).state in (State.READY, State.RUNNING, State.DONE):
                assert all(plan.task(b).state is State.DONE for b in before[n])
        assert all(plan.task(n).state is state for n, state in ended.items())
